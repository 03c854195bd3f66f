"""Plays one cell: load, fault, end of the fault, and what every stream and every process has to look like then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import assert_never

from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.events import Event, EventKind
from controlplane.contract.records import OperationKind, OperationState
from controlplane.contract.status import ClusterStatus, OperationRequest
from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from tests.e2e.cluster import all_home, summary
from tests.matrix.cells import Cell, Kill, Phase
from tests.matrix.faults import Faults
from tests.matrix.hosts import CLIENT, CONTROLLERS, ETCD, GATEWAYS, HostCluster
from tests.matrix.streams import Load, Result, judge

DECODE = sample_prompts(16, 160)
PREFILL = sample_prompts(16, 24, first_seed=100, words=300)
FRESH = sample_prompts(4, 40, first_seed=200)
HOME_LIMIT_S = 60.0
# Who could not be reached by its pipeline is on probation for 10 s, each further time within ten minutes for twice as
# long, and from the third on for longer than a cell may take: no cluster plays on with a node that was on it twice.
PROBATIONS_MAX = 2
HEARD_LIMIT_S = 5.0  # where nobody had to be moved: a path that has healed is used again
BEGIN_LIMIT_S = 20.0
PAUSE_MAX_S = 5.0  # of a stream, beyond the length of the fault
ETCD_AGE_MAX_S = 3.0
POLL_S = 0.05
EVENTS = 200  # more than one cell brings


class Player:
    """Plays cells on one cluster, one after the other; every one leaves it whole or has `problems`."""

    def __init__(self, cluster: HostCluster) -> None:
        self._cluster = cluster
        self._faults = Faults(cluster)
        self._references: dict[Prompt, Stream] = {}
        self._probations = Counter[str]()  # by node

    @property
    def is_worn(self) -> bool:
        """The next cell needs a fresh cluster."""
        return any(count >= PROBATIONS_MAX for count in self._probations.values())

    def play(self, cell: Cell) -> Result:
        with self._cluster.network.inside(CLIENT):
            return asyncio.run(self._play(cell))

    async def _play(self, cell: Cell) -> Result:
        result, playing_since, since_unix_s = Result(cell.name), time.monotonic(), time.time()
        prompts = PREFILL if cell.phase is Phase.PREFILLING else DECODE
        await self._home(HOME_LIMIT_S)
        await self._refer([*prompts, *FRESH])
        pids = {name: self._cluster.pid(name) for name in self._cluster.servers}
        load = Load(self._cluster.generator, () if cell.phase is Phase.IDLE else prompts)
        spared: set[str] = set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run())
                try:
                    await load.flows(cell.phase)
                    spared |= await self._begin(cell.phase)
                    before = await self._epochs()
                    began, began_unix_s = time.monotonic(), time.time()
                    spared |= await self._faults.play(cell.fault)
                    ended = time.monotonic()
                    await self._end(cell.phase)
                    await self._home(HOME_LIMIT_S)
                    result.home_s = time.monotonic() - ended
                    if cell.ends == ():
                        assert result.home_s <= HEARD_LIMIT_S, f"home again only after {result.home_s:.1f} s"
                    after = await self._epochs()
                    result.ended = sorted(name for name in before if after.get(name) != before[name])
                    if cell.ends is not None:
                        await self._expect_ends(cell.ends, result, began_unix_s)
                finally:
                    load.over.set()
            fresh = await self._cluster.generator.streams(FRESH)
        except* (AssertionError, KevlarFlowError, TimeoutError) as errors:
            result.problems += [f"{type(e).__name__}: {e}" for e in errors.exceptions]
            fresh = []
        with contextlib.suppress(KevlarFlowError):
            for event in await asyncio.to_thread(self._events, since_unix_s):
                if event.kind is EventKind.CLEARED and "on probation" in event.message:
                    self._probations[event.subject] += 1
        result.problems += load.failures
        whole = [s for s in load.streams if s.finish_reason or s.error]  # who was given up is told of above
        judge(result, [*whole, *fresh], self._references)
        if load.streams and not result.problems:
            pauses = [s.longest_pause_s(max(began, s.sent), 1e9) for s in load.streams if s.ended > began]
            result.longest_pause_s = longest_s = max((p for p in pauses if p is not None), default=0.0)
            limit_s = PAUSE_MAX_S + (0.0 if isinstance(cell.fault, Kill) else cell.fault.hold_s)
            if longest_s > limit_s:
                result.problems.append(f"a stream stood still for {longest_s:.1f} s, more than {limit_s:g} s")
        for name, pid in pids.items():
            with contextlib.suppress(ProcessLookupError):
                if name not in spared and self._cluster.pid(name) != pid:
                    result.problems.append(f"{name} was restarted, which nobody asked for")
        result.seconds, result.load = time.monotonic() - playing_since, os.getloadavg()[0]
        return result

    # ---- what the streams brought

    async def _refer(self, prompts: Sequence[Prompt]) -> None:
        if missing := [prompt for prompt in prompts if prompt not in self._references]:
            for stream in await self._cluster.generator.streams(missing):
                assert not stream.error, stream.error
                self._references[stream.prompt] = stream

    # ---- phases

    async def _begin(self, phase: Phase) -> set[str]:
        """Bring the cluster into the phase; who may be restarted by it."""
        match phase:
            case Phase.IDLE | Phase.PREFILLING | Phase.DECODING:
                return set()
            case Phase.DRAINING | Phase.REPLACING:
                kind = OperationKind.DRAIN if phase is Phase.DRAINING else OperationKind.REPLACE
                # The fault hits it from its first moment on: a move takes half a second.
                await self._operate(kind)
                return {"n1"} if phase is Phase.REPLACING else set()
            case Phase.RECOVERING:
                counter = (await self._status()).counter
                self._cluster.signal("n1", signal.SIGKILL)
                await self._wait(lambda s: s.counter > counter, "the death is answered", BEGIN_LIMIT_S)
                return {"n1"}
            case _:
                assert_never(phase)

    async def _end(self, phase: Phase) -> None:
        if phase in (Phase.DRAINING, Phase.REPLACING):
            await self._wait(
                lambda s: all(not op.open for op in s.operations), "the operation has ended", HOME_LIMIT_S
            )
            newest = max((await self._status()).operations, key=lambda op: op.created_unix_s)
            assert newest.state is OperationState.DONE, f"{newest.kind}: {newest.state}: {newest.message}"
        if phase is Phase.DRAINING:
            await self._operate(OperationKind.UNDRAIN)

    async def _operate(self, kind: OperationKind) -> None:
        request = OperationRequest(id=f"matrix-{secrets.token_hex(4)}", kind=kind.value, node="n1")

        def submit() -> bool:
            with self._cluster.admin() as admin:
                return admin.submit(request).accepted

        assert await asyncio.to_thread(submit), f"{kind} was refused"

    # ---- what the control plane thought

    async def _epochs(self) -> dict[str, int]:
        return {pipeline.id: pipeline.epoch for pipeline in (await self._status()).pipelines}

    async def _expect_ends(self, ends: Sequence[str], result: Result, since_unix_s: float) -> None:
        """Exactly these pipelines were moved; if none was, nobody was taken for dead either."""
        assert result.ended == list(ends), f"epochs ended of {result.ended}, and not of {list(ends)}"

        if not ends:
            events = await asyncio.to_thread(self._events, since_unix_s)
            dead = [event for event in events if event.kind is EventKind.DIED]
            assert not dead, f"the living were taken for dead: {[(e.subject, e.message) for e in dead]}"

    def _events(self, since_unix_s: float) -> list[Event]:
        with self._cluster.admin() as admin:
            return [row.event for row in admin.events(EVENTS) if row.event.unix_s >= since_unix_s]

    # ---- seeing and waiting

    async def _status(self) -> ClusterStatus:
        return await asyncio.to_thread(self._cluster.status)

    async def _home(self, limit_s: float) -> None:
        await self._wait(self._whole, "every process is back and every node serves at home", limit_s)

    def _whole(self, status: ClusterStatus) -> bool:
        """Somebody leads, and what the cluster knows is what runs: right after a kill the dead still look well."""
        known = {node.node: node.pid for node in status.nodes}
        known |= {c.id: c.pid for c in status.controllers} | {g.id: g.pid for g in status.gateways}
        try:
            running = {
                name: self._cluster.pid(name) for name in (*self._cluster.nodes, *CONTROLLERS, *GATEWAYS)
            }
        except ProcessLookupError:
            return False
        whole = (
            known == running
            and bool(status.leader)
            and status.etcd_age_s < ETCD_AGE_MAX_S
            and all_home(status)
        )
        return whole and all(map(self._cluster.etcd_healthy, ETCD))

    async def _wait(self, condition: Callable[[ClusterStatus], object], what: str, limit_s: float) -> None:
        deadline, last = time.monotonic() + limit_s, "nothing"
        while time.monotonic() < deadline:
            try:
                status = await self._status()
            except KevlarFlowError as error:
                last = str(error)
            else:
                if await asyncio.to_thread(condition, status):
                    return
                last = summary(status)
            await asyncio.sleep(POLL_S)
        kept = await asyncio.to_thread(self._cluster.keep)
        raise AssertionError(f"not within {limit_s} s: {what}; last seen: {last}; more in {kept}")
