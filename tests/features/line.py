"""One pipeline with a peer for each stage, and the gateways before it, in one event loop and without sockets.

All within is production code: schedulers, workers, stages, copies, kernels, frames; dispatcher, router, the API's
requests and answers. Left out are gRPC, links, HTTP and the control plane: `Line` writes the topologies that a leader
would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord
from controlplane.contract.requests import GatewayMessage, SchedulerMessage
from controlplane.contract.topology import Mode, Move, Pipeline, Stage, Topology
from controlplane.grammar import Compiler
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.messages import HeldMeta, LostMeta, Meta, ReadyMeta, ResultMeta, StepFailedMeta
from dataplane.core.speculation import Proposer, StepCost
from dataplane.executor import StageExecutor
from dataplane.grammars import Grammars
from dataplane.inbox import LinkChanged, Message
from dataplane.schedulers import Schedulers
from dataplane.transport import frames
from dataplane.worker import Worker
from tests.features.gateway import Gateway
from web.gateway.metrics import Metrics
from web.gateway.model import Model

PIPELINE, BLOCK, BLOCKS, CONTEXT, ROWS = "p0", 8, 2048, 320, 128
TICK_S = 0.05  # a node's
FOR_SCHEDULERS = (ResultMeta, StepFailedMeta, HeldMeta, ReadyMeta, LostMeta)


class Free(StepCost):
    """Rows cost nothing, so that every draft that may be right is in a step, however fast this machine is."""

    def ran(self, rows: int, took_s: float) -> None:
        pass

    def seconds(self, rows: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Parts:
    """What is loaded once. `executors`: of each stage two, whose KV pools keep what earlier runs left in them."""

    executors: Sequence[tuple[StageExecutor, StageExecutor]]
    compiler: Compiler
    model: Model
    proposer: Proposer | None
    metrics: Metrics
    context: int = CONTEXT  # tokens of a request
    blocks: int = BLOCKS


class Node:
    """A process that serves a stage, with its scheduler if that is the first one."""

    def __init__(self, line: Line, member: Member, stage: int, executor: StageExecutor) -> None:
        self.member, self.stage, self.alive = member, stage, True
        self.gateways: dict[int, Gateway] = {}  # by session
        self._line = line
        self._sessions = 0
        last = stage == line.stages - 1
        store = KvStore(executor.kv.num_blocks, BLOCK, ROWS, line.parts.context // BLOCK)
        grammars = Grammars(line.parts.compiler) if last else None
        self.worker = Worker(member, executor, store, self.send, grammars=grammars)
        # It stands where a front door is, too.
        self.schedulers = Schedulers(
            member, line.limits, 1, cast(Any, Door(self)), self.worker.put, self.send, lambda: None,
            line.parts.proposer,
        )  # fmt: skip
        self.record = NodeRecord(
            member, "g", stage, line.stages, "", "", executor.weights_digest, line.parts.blocks, BLOCK, 1,
            host_parallel=1, numerics=executor.numerics,
        )  # fmt: skip
        self.task = asyncio.create_task(self.worker.run())

    def send(self, peer: Member, meta: Meta, payload: frames.Buffer) -> bool:
        if peer == self.member:
            self._dispatch(peer, meta, payload)
            return True
        target = self._line.nodes[peer]
        if not (self.alive and target.alive):
            return False
        data = frames.join(frames.encode(meta, payload))
        asyncio.get_running_loop().call_soon(target._receive, self.member, data)
        return True

    def _receive(self, peer: Member, data: bytes) -> None:
        if self.alive:
            frame = frames.decode(data)
            self._dispatch(peer, frame.meta, frame.payload)

    def _dispatch(self, peer: Member, meta: Meta, payload: frames.Buffer) -> None:
        if isinstance(meta, FOR_SCHEDULERS):
            self.schedulers.on_message(meta)
            if isinstance(meta, ResultMeta):
                self._line.stepped(self.schedulers)
        else:
            self.worker.put(Message(peer, meta, payload))

    def die(self) -> None:
        self.alive = False
        self.task.cancel()
        for gateway in self.gateways.values():
            gateway.lost(self.member)
        self.gateways.clear()

    def tick(self) -> None:
        if self.alive:
            self.schedulers.tick()
            self.worker.wake()

    def opened(self, gateway: Gateway) -> int:
        self._sessions += 1
        self.gateways[self._sessions] = gateway
        return self._sessions

    def heard(self, session: int, message: GatewayMessage) -> None:
        if self.alive and session in self.gateways:
            self.schedulers.on_gateway(session, message)

    def closed(self, session: int) -> None:
        if self.alive and self.gateways.pop(session, None) is not None:
            self.schedulers.on_session_lost(session)

    def close(self) -> None:
        self.worker.close()
        self.worker.compute._pool.shutdown()  # the next run has the same executor


@dataclass(slots=True)
class Door:
    """A node's end of its gateways' streams."""

    node: Node

    def send(self, session: int, message: SchedulerMessage) -> None:
        asyncio.get_running_loop().call_soon(self._deliver, session, message)

    def _deliver(self, session: int, message: SchedulerMessage) -> None:
        gateway = self.node.gateways.get(session)  # what a node that has died had not sent yet is lost
        if gateway is not None:
            gateway.heard(self.node.member, message)


class Line:
    """Use as an async context manager. `looks`: called at each result of the last stage, with how many tokens each
    running choice has, by its seed."""

    def __init__(self, parts: Parts, limits: Limits, *, copies: bool, free_drafts: bool) -> None:
        self.parts, self.limits, self.stages = parts, limits, len(parts.executors)
        self.tokens: dict[int, int] = {}  # that have come of each choice, by its seed
        self.looks: Callable[[dict[int, int]], None] = lambda had: None
        self._copies, self._free_drafts = copies, free_drafts
        self._counter = self._epoch = 1
        self._move: Move | None = None
        self._moved = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Line:
        self.nodes: dict[Member, Node] = {}
        homes = [Member(f"n{i}", "a") for i in range(self.stages)]
        peers = [Member(f"n{i}", "a") for i in range(self.stages, 2 * self.stages)]
        for copy, members in enumerate((homes, peers)):
            for stage, member in enumerate(members):
                self.nodes[member] = Node(self, member, stage, self.parts.executors[stage][copy])
        self.serving, self.peers = homes, peers
        self.records = {member.node: node.record for member, node in self.nodes.items()}
        self.gateways = [Gateway(self, name) for name in ("g1", "g2")]
        self._spawn(self._tick())
        self._apply()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks, *(node.task for node in self.nodes.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for gateway in self.gateways:
            await gateway.close()
        for node in self.nodes.values():
            node.close()

    @property
    def topology(self) -> Topology:
        stages = []
        for home, (member, peer) in enumerate(zip(self.serving, self.peers, strict=True)):
            holds = self._copies and peer != member and self.nodes[peer].alive
            stages.append(Stage((f"n{home}",), (member,), (peer,) if holds else ()))
        mode = Mode.REPLICATE if self._copies else Mode.NONE
        pipeline = Pipeline(PIPELINE, self._epoch, tuple(stages), self._move, moved=self._moved)
        return Topology("g", self._counter, mode, (pipeline,))

    def stepped(self, schedulers: Schedulers) -> None:
        """A result of the last stage has come to the scheduler."""
        scheduler = schedulers.by_pipeline.get(PIPELINE)
        if scheduler is not None:
            had = {request.sampling.seed: len(request.output) for request in scheduler.requests.values()}
            self.tokens |= had
            self.looks(had)

    # ---- what happens

    def kill(self, stage: int) -> None:
        """kill -9 of the node that serves a stage; its peer takes over, with the copies that it has."""
        dead = self.serving[stage]
        self.nodes[dead].die()
        for node in self._living():
            node.worker.put(LinkChanged(dead.node))
        self.serving[stage] = self.peers[stage]
        self._move = None
        self._switch()

    def move(self, stage: int) -> None:
        """A planned move to the peer, as of a drain: the copy, and the switch once it is near."""
        self._spawn(self._moving(stage))

    def end_gateway(self, kindly: bool) -> None:
        """The first gateway ends: killed, or told to stop."""
        (self.gateways[0].stop if kindly else self.gateways[0].die)()

    async def _moving(self, stage: int) -> None:
        source, to = self.nodes[self.serving[stage]], self.peers[stage]
        self._move = Move(stage, to, "drain")
        self._counter += 1
        self._apply()
        while not self._near(source, to):  # noqa: ASYNC110 - as often as the loop turns
            await asyncio.sleep(0)
        self.peers[stage], self.serving[stage] = source.member, to
        self._move, self._moved = None, self._counter + 1
        self._switch()

    def _near(self, source: Node, to: Member) -> bool:
        scheduler = self.nodes[self.serving[0]].schedulers.by_pipeline[PIPELINE]
        stage = source.worker.stages.get(PIPELINE)
        lags = {target.target: target.lag_tokens for target in source.worker.replicator.targets(PIPELINE)}
        if stage is None or to not in lags or stage.fence.epoch != self._epoch:
            return False
        return lags[to] <= 2 * BLOCK * len(scheduler.requests)

    def _switch(self) -> None:
        self._counter += 1
        self._epoch = self._counter
        self._apply()

    def _apply(self) -> None:
        topology = self.topology
        for node in self._living():
            node.worker.put(topology)
        for node in self._living():
            node.schedulers.on_topology(topology, self.records)
            for scheduler in node.schedulers.by_pipeline.values() if self._free_drafts else ():
                scheduler.speculator.cost = Free()
        for gateway in self.gateways:
            gateway.saw(topology)

    def _living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    # ---- time

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for node in self.nodes.values():
                node.tick()

    def check(self) -> None:
        """Raises what a task of ours or of a node's raised."""
        for task in [*self._tasks, *(node.task for node in self.nodes.values())]:
            if task.done() and not task.cancelled():
                task.result()
