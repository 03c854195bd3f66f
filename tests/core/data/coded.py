"""The pipeline of pure parts, with parity in the place of copies: the peers are a second pipeline, which encodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from controlplane.contract.config import ParityConfig
from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane.core.messages import FetchMeta, HeldMeta, Meta, ParityMeta, RejoinMeta, RestoredMeta, StepMeta
from dataplane.core.prefix import unpack_names
from dataplane.parity import Parity
from dataplane.replica import never
from tests.core.data.pipeline import PIPELINE, Cluster, Node, done, here

OTHER = "p1"
PARITY = get_args(ParityMeta)


class CodedNode(Node):
    cluster: Coded

    def __post_init__(self) -> None:
        super().__post_init__()
        replicator, size = self.replicator, self.kv.block_bytes
        self.stages: dict = {}
        self.parity = Parity(
            self.me, self.store, self.kv, here, self.send, self.send, replicator, self.stages,
            self.answer, self.cluster.settings, lambda stages: size,
        )  # fmt: skip
        pump = replicator.pump

        async def both(now: float, others_wait: Callable[[], bool] = never) -> None:
            await self.parity.pump(now, others_wait)
            await pump(now, others_wait)

        replicator.pump = both  # type: ignore[method-assign]

    def answer(self, pipeline: str, held: HeldMeta) -> None:
        self.cluster.to_scheduler(self.me, held)

    def serve(self, epoch: int, replicas: list[Member]) -> None:
        super().serve(epoch, [])
        self.stages[PIPELINE] = self.stage

    def leave(self, demote: bool) -> None:
        self.stages.clear()
        super().leave(demote=False)

    def handle(self, peer: Member, meta: Meta, payload: bytes) -> None:
        if isinstance(meta, RejoinMeta | ParityMeta) and meta.fence.epoch >= self.cluster.epoch:
            of_the_stage = isinstance(meta, RejoinMeta | FetchMeta | RestoredMeta)
            if of_the_stage and (self.stage is None or self.stage.stale(meta.fence)):
                return
            if isinstance(meta, RejoinMeta):
                assert self.stage is not None
                self.parity.rejoin(self.stage, meta, self.cluster.now)
            else:
                done(self.parity.handle(peer, meta, memoryview(payload), self.cluster.now))
            done(self.replicator.pump(self.cluster.now))
            self.store.check()
        elif not isinstance(meta, RejoinMeta | ParityMeta):
            super().handle(peer, meta, payload)

    def run(self, stage: object, meta: StepMeta, payload: bytes) -> None:
        super().run(stage, meta, payload)  # type: ignore[arg-type]
        self.parity.sealed(PIPELINE, [name for name in unpack_names(meta.seals) if self.store.pool.has(name)])


class Coded(Cluster):
    """`mode`: NONE, to compare."""

    nodes: dict[Member, CodedNode]  # type: ignore[assignment]
    settings = ParityConfig()
    mode = Mode.PARITY
    counter = 0

    def add(self, member: Member, stage: int, blocks: int) -> None:
        self.nodes[member] = CodedNode(self, member, stage, blocks)

    def topology(self) -> Topology:
        self.counter += 1
        homes = [f"n{index}" for index in range(self.stages)]
        mine = [Stage((homes[i],), (member,)) for i, member in enumerate(self.serving)]
        others = [Stage((f"m{i}",), tuple(self.encoders(i))) for i in range(self.stages)]
        pipelines = Pipeline(PIPELINE, self.epoch, tuple(mine)), Pipeline(OTHER, 1, tuple(others))
        return Topology("g", self.counter, self.mode, pipelines)

    def encoders(self, stage: int) -> list[Member]:
        """Who serves this stage of the other pipeline: the last one that came."""
        alive = [m for m, node in self.nodes.items() if node.alive and node.stage_index == stage]
        spare = [m for m in alive if m not in self.serving]
        return (spare or alive)[-1:]

    def apply_topology(self) -> None:
        super().apply_topology()
        topology = self.topology()
        for node in self.nodes.values():
            if node.alive:
                node.parity.apply(topology)

    def lose(self, *members: Member) -> None:
        """kill -9 of nodes that encode."""
        for member in members:
            self.nodes[member].alive = False
        self.apply_topology()

    def kill_stages(self, *stages: int) -> None:
        """kill -9 of several serving nodes at the same time; one write of the topology answers them."""
        for stage in stages:
            self.nodes[self.serving[stage]].alive = False
        for stage in stages[:-1]:
            self.serving[stage] = self.peers[stage]
        if 0 in stages[:-1]:
            stages = (*(s for s in stages if s), 0)
            self.serving[stages[0]] = self.peers[stages[0]]
        self.replace(stages[-1], self.peers[stages[-1]])

    # ------------------------------------------------------------------ what is protected

    def lags(self) -> list[int]:
        return [self.nodes[m].parity.sources[PIPELINE].lag_blocks for m in self.serving]

    def settle(self, limit: int = 2000) -> None:
        """Until everything that can be protected is."""
        for _ in range(limit):
            if not any(self.lags()):
                return
            self.run(1)
        raise AssertionError(f"blocks without parity: {self.lags()}")

    def settle_some(self) -> None:
        """While streams run: new blocks fill all the time, so that the lag is small, not always nothing."""
        for _ in range(300):
            if not any(self.lags()):
                return
            self.run(1)

    def wait_for_drops(self, limit: int = 2000) -> None:
        """Until there is parity of what is kept, and of nothing else. (For when all requests have ended.)"""
        for _ in range(limit):
            kept, *others = [set(self.nodes[m].store.kept[PIPELINE]) for m in self.serving]
            encoded = [name for names in self.encoded().values() for name in names]
            if len(encoded) == len(kept) and set(encoded) == kept and all(names == kept for names in others):
                return
            self.run(1)
        raise AssertionError(f"{len(kept)} blocks are kept, there is parity of {len(encoded)}")

    def encoded(self) -> dict[Member, set[bytes]]:
        return {
            m: set(node.parity.encoding.encoder.names(PIPELINE))
            for m, node in self.nodes.items()
            if node.alive
        }
