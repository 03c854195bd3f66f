"""The harness of the end-to-end tests: a real cluster, streams with a reference to compare to, and waiting.

What the benches share (streams, the cluster itself) is in `controlplane/kfadmin`; here is only what tests need.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from controlplane.contract.config import ClusterConfig, EngineConfig, TimingConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.kfadmin.loadgen import LoadGenerator, Prompt, Stream
from controlplane.kfadmin.local import LocalCluster
from controlplane.kfadmin.supervise import tied
from controlplane.kfadmin.up import demo_model
from tests.e2e.warm import quick

WAIT_S = 20.0  # for what has to come, where nothing else is said
POLL_S = 0.02  # of what the test itself knows
ASK_S = 0.05  # of the controllers: a question costs client and controller 5 ms


class Cluster:
    """One running cluster. Use as a context manager; nothing of it outlives the `with`."""

    def __init__(
        self,
        *,
        engine: EngineConfig | None = None,
        timing: TimingConfig | None = None,
        controllers: int = 1,
        etcd_members: int = 1,
        gateways: int = 1,
        secure: bool = False,
        progress: Callable[[str], None] = lambda line: None,
        **settings: Any,
    ) -> None:
        # Not pytest's tmp_path: SQLite and sockets want a short path, and a failed run's logs are printed.
        self._folder = tempfile.TemporaryDirectory(prefix="kf-e2e-", ignore_cleanup_errors=True)
        # Until it starts it has no certificates.
        given: dict[str, Any] = {"model": str(demo_model()), "insecure": secure, **settings}
        config = ClusterConfig(
            run_dir=self._folder.name, etcd=(), gateway_port=0, admin_port=0,
            engine=engine or EngineConfig(pool_blocks=1024), timing=timing or TimingConfig(), **given,
        )  # fmt: skip
        self.local = LocalCluster(
            config, controllers=controllers, gateways=gateways, etcd_members=etcd_members, progress=progress,
            secure=secure, program=quick if config.engine.executor == "torch" else tied,
        )  # fmt: skip
        self._references: dict[Prompt, Stream] = {}

    def __enter__(self) -> Cluster:
        self.local.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.local.stop()
        self._folder.cleanup()

    # ---- streams

    @property
    def generator(self) -> LoadGenerator:
        return LoadGenerator(
            self.local.gateway_url,
            self.local.api_key,
            self.local.config.model_name,
            ca=self.local.endpoints.ca,
        )

    @property
    def resuming(self) -> LoadGenerator:
        """A client that knows every gateway."""
        first, *others = self.local.endpoints.gateways
        return LoadGenerator(
            first, self.local.api_key, self.local.config.model_name, tuple(others), self.local.endpoints.ca
        )

    async def references(self, prompts: Sequence[Prompt]) -> list[Stream]:
        """The same requests undisturbed; run once each and remembered."""
        if fresh := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._references]:
            for stream in await self.generator.streams(fresh):
                assert stream.error == "", stream.error
                self._references[stream.prompt] = stream
        return [self._references[prompt] for prompt in prompts]

    def know(self, references: Sequence[Stream]) -> None:
        """What another cluster has brought undisturbed is what this one has to bring."""
        self._references.update((stream.prompt, stream) for stream in references)

    async def expect_equal(self, streams: Sequence[Stream]) -> None:
        """Every stream has brought exactly what its undisturbed run brings: nothing lost, doubled or different."""
        wanted = await self.references([stream.prompt for stream in streams])
        for index, (got, want) in enumerate(zip(streams, wanted, strict=True)):
            assert not got.error, f"stream {index}: {got.error}"
            assert got.tokens == want.tokens, f"stream {index}: {difference(got.tokens, want.tokens)}"
            assert got.same_as(want), f"stream {index}: {got.answer[1:]} / {want.answer[1:]}"

    # ---- seeing and waiting

    async def status(self) -> ClusterStatus:
        return await asyncio.to_thread(self.local.status)

    async def wait_for(
        self, condition: Callable[[ClusterStatus], object], what: str, limit_s: float = WAIT_S
    ) -> ClusterStatus:
        """Poll the status until the condition holds; controllers may be away meanwhile."""
        deadline, last = time.monotonic() + limit_s, "no controller answered"
        while time.monotonic() < deadline:
            try:
                status = await self.status()
            except KevlarFlowError as error:
                last = str(error)
            else:
                if condition(status):
                    return status
                last = summary(status)
            await asyncio.sleep(ASK_S)
        raise AssertionError(f"not within {limit_s} s: {what}; last seen: {last}\n{self.logs()}")

    async def wait_all_home(self, limit_s: float = 30.0) -> ClusterStatus:
        """Every node is green and every stage is served at home."""
        return await self.wait_for(all_home, "everything is home", limit_s)

    def node_pid(self, node: str) -> int:
        return self.local.node_pids()[node]

    def kill(self, name: str, number: int = signal.SIGKILL) -> float:
        """Send a signal; the moment (monotonic seconds)."""
        self.local.kill(name, number)
        return time.monotonic()

    def logs(self, lines: int = 5) -> str:
        """The end of every log."""
        names = sorted(path.stem for path in Path(self.local.config.run_dir, "logs").glob("*.log"))
        return "\n".join(f"--- {name}\n{self.local.run_dir.tail(name, lines)}" for name in names)


async def until(condition: Callable[[], object], what: str, limit_s: float = WAIT_S) -> None:
    """Wait for something of the test itself, such as tokens having arrived."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        await asyncio.sleep(POLL_S)


async def while_streaming(
    cluster: Cluster,
    prompts: Sequence[Prompt],
    act: Callable[[list[Stream]], Awaitable[None]],
    generator: LoadGenerator | None = None,
) -> list[Stream]:
    """Run the streams and, beside them, `act`; both have ended well when this returns."""
    streams = [Stream(prompt) for prompt in prompts]
    async with asyncio.TaskGroup() as group:
        group.create_task((generator or cluster.generator).streams(prompts, streams))
        group.create_task(_acting(act, streams))
    return streams


async def _acting(act: Callable[[list[Stream]], Awaitable[None]], streams: list[Stream]) -> None:
    await act(streams)


def all_home(status: ClusterStatus) -> bool:
    green = all(node.state is NodeState.GREEN for node in status.nodes)
    return green and all(
        pipeline.state is PipelineState.UP
        and not any(stage.borrowed or not stage.serving for stage in pipeline.stages)
        for pipeline in status.pipelines
    )


def summary(status: ClusterStatus) -> str:
    nodes = " ".join(
        f"{node.node}:{node.state.value}{f' ({node.evidence})' if node.evidence else ''}"
        for node in status.nodes
    )
    pipelines = " ".join(
        f"{p.id}:{p.state.value}@{p.epoch}[{','.join(s.serving[0].node if s.serving else '-' for s in p.stages)}]"
        for p in status.pipelines
    )
    return f"counter {status.counter} leader {status.leader or 'none'}; {pipelines}; {nodes}"


def difference(got: list[int], want: list[int]) -> str:
    """Where two token sequences part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
    )
    return f"{len(got)} tokens instead of {len(want)}, equal up to {at}: {got[at : at + 5]} / {want[at : at + 5]}"
