"""A chain of real workers without sockets, each serving one stage of several pipelines, and steps made by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.requests import Sampling
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane.core.blocks import KvStore
from dataplane.core.messages import Admit, Fence, Meta, ResultMeta, StepFailedMeta, StepMeta, pack_rows
from dataplane.demo import model_dir
from dataplane.devices import PROFILES, DeviceProfile
from dataplane.inbox import Item, Message
from dataplane.model.config import load_config
from dataplane.oracle import OracleExecutor
from dataplane.worker import Worker

BLOCK = 4
LIMIT_S = 20.0


def oracles(stages: int, blocks: int = 64, profile: DeviceProfile = PROFILES["instant"]) -> list[Any]:
    config = load_config(model_dir())
    return [
        OracleExecutor(config, index, stages, num_blocks=blocks, block_size=BLOCK, profile=profile)
        for index in range(stages)
    ]


def step(
    pipeline: PipelineId,
    number: int,
    rows: Sequence[tuple[int, int, Sequence[int]]],
    epoch: int = 1,
    frees: tuple[int, ...] = (),
    samples: bool = True,
) -> Item:
    """A step as its scheduler sends it: (rid, start, tokens) a row, and all of them sample or none; who begins is
    admitted."""
    admits = tuple(
        Admit(rid, Sampling(100, seed=rid, logprobs=8), b"", b"") for rid, start, _ in rows if start == 0
    )
    packed = pack_rows([(rid, start, len(tokens), samples) for rid, start, tokens in rows])
    meta = StepMeta(pipeline, Fence(epoch), number, packed, admits, frees)
    return Message(Member("n0", "a"), meta, b"", tuple(token for _, _, tokens in rows for token in tokens))


def topology(pipelines: Sequence[PipelineId], stages: int, epoch: int = 1) -> Topology:
    members = [Member(f"n{index}", "a") for index in range(stages)]
    parts = tuple(Stage((member.node,), (member,)) for member in members)
    return Topology("g", epoch, Mode.NONE, tuple(Pipeline(name, epoch, parts) for name in pipelines))


@dataclass
class Line:
    """`answers`: what schedulers were told; `passed`: activations from stage to stage, in order."""

    executors: list[Any]
    pipelines: Sequence[PipelineId]
    blocks: int = 64
    answers: list[ResultMeta | StepFailedMeta] = field(default_factory=list)
    passed: list[tuple[PipelineId, int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workers: list[Worker] = []
        for index, executor in enumerate(self.executors):
            me = Member(f"n{index}", "a")
            store = KvStore(self.blocks, executor.kv.block_size, 64, 16)
            self.workers.append(Worker(me, executor, store, self._sender(me)))
            self.workers[-1].put(topology(self.pipelines, len(self.executors)))

    def _sender(self, me: Member) -> Any:
        def send(peer: Member, meta: Meta, payload: Any) -> bool:
            if isinstance(meta, ResultMeta | StepFailedMeta):
                self.answers.append(meta)
                return True
            assert isinstance(meta, StepMeta)
            data = memoryview(payload).tobytes()
            self.passed.append((meta.pipeline, meta.step, data))
            self.workers[int(peer.node[1:])].put(Message(me, meta, data))
            return True

        return send

    async def run(self, items: Sequence[Item], answers: int) -> list[ResultMeta | StepFailedMeta]:
        """Give the first stage these items at once; the answers that come of them."""
        del self.answers[:]
        for item in items:
            self.workers[0].put(item)
        tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        deadline = time.monotonic() + LIMIT_S
        try:
            while len(self.answers) < answers or any(w.compute.busy or w._inbox for w in self.workers):
                assert time.monotonic() < deadline, f"{len(self.answers)} of {answers} answers"
                for task in tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.answers

    @property
    def merged(self) -> list[int]:
        return [worker.stats.merged for worker in self.workers]

    def kv(self, pipeline: PipelineId) -> list[dict[int, list[bytes]]]:
        """By stage: the blocks of each request."""
        found = []
        for worker in self.workers:
            store, cache = worker._store, worker._executor.kv
            found.append(
                {
                    rid: [bytes(cache.view(block)) for block in store.table.blocks(row)]
                    for rid, row in store.own[pipeline].items()
                }
            )
        return found

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
