"""Whole instances without sockets: a gateway's router, and real schedulers and workers of several pipelines."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord
from controlplane.contract.requests import Refused, Sampling, SchedulerMessage, Tokens
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.messages import (
    CopiedMeta,
    HeldMeta,
    LoadMeta,
    LostMeta,
    Meta,
    ReadyMeta,
    ResultMeta,
    StepFailedMeta,
)
from dataplane.frontdoor import Frontdoor
from dataplane.inbox import LinkChanged, Message
from dataplane.schedulers import Schedulers
from dataplane.worker import Worker
from tests.core.data.line import BLOCK, oracles
from web.gateway.routing import events
from web.gateway.routing.policy import Policy
from web.gateway.routing.router import Router

LIMIT_S = 60.0
OF_SCHEDULERS = (ResultMeta, StepFailedMeta, HeldMeta, ReadyMeta, LostMeta, CopiedMeta)


class Node:
    def __init__(self, cluster: Instances, me: Member, executor: Any, blocks: int) -> None:
        self.cluster, self.me, self.alive = cluster, me, True
        store = KvStore(blocks, BLOCK, 64, 64)
        self.worker = Worker(me, executor, store, self.send)
        frontdoor = Frontdoor("token", lambda *_: None, lambda _: None)
        frontdoor.send = self.answer  # type: ignore[method-assign]
        limits = Limits(BLOCK, 16, 16, 64, 120, 60.0)
        self.schedulers = Schedulers(me, limits, 0, frontdoor, self.worker.put, self.send, lambda: None)
        self.worker.hosts = self.schedulers.hosts

    def send(self, peer: Member, meta: Meta, payload: Any) -> bool:
        node = self.cluster.nodes.get(peer)  # None: of no process, as only another hand can have named it
        if node is None or not node.alive or not self.alive:
            return False
        if isinstance(meta, OF_SCHEDULERS):
            node.schedulers.on_message(meta)
        elif isinstance(meta, LoadMeta):
            node.schedulers.on_load(meta)
        else:
            node.worker.put(Message(self.me, meta, memoryview(payload).tobytes()))
        return True

    def answer(self, session: int, message: SchedulerMessage) -> None:
        if not self.alive:
            return
        if isinstance(message, Tokens):
            self.cluster.happened.append(events.TokensReceived(self.me, message))
        elif isinstance(message, Refused):
            self.cluster.happened.append(events.RefusalReceived(self.me, message))


class Instances:
    """`hosts`: of the instances; one each if none are named."""

    def __init__(
        self, mode: Mode, instances: int, stages: int, blocks: int = 128, hosts: tuple[str, ...] = ()
    ) -> None:
        self.stages = stages
        self.nodes: dict[Member, Node] = {}
        self.records: dict[str, NodeRecord] = {}
        self.happened: deque[events.Event] = deque()
        self.router = Router(Policy())
        self.received: dict[int, list[int]] = {}
        self.moved: list[tuple[int, str]] = []  # requests that went on, and where
        self.failed: list[events.Fail] = []
        self.ended: set[int] = set()
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        pipelines = []
        for instance in range(instances):
            members = [Member(f"n{instance * stages + stage}", "a") for stage in range(stages)]
            for stage, (member, executor) in enumerate(zip(members, oracles(stages, blocks), strict=True)):
                self.nodes[member] = Node(self, member, executor, blocks)
                host = hosts[instance] if hosts else f"h{instance}"
                self.records[member.node] = NodeRecord(
                    member, "g", stage, stages, "", "", "", blocks, BLOCK, 1, 0, {"host": host},
                    numerics=executor.numerics or "oracle",
                )  # fmt: skip
                self.nodes[member].worker.replicator.numerics = executor.numerics
            parts = tuple(Stage((member.node,), (member,)) for member in members)
            pipelines.append(Pipeline(f"p{instance}", 1, parts))
        self.topology = Topology("g", 1, mode, tuple(pipelines))

    # ------------------------------------------------------------------ the control plane

    def write(self, topology: Topology) -> None:
        self.topology = topology
        for node in self.nodes.values():
            if node.alive:
                node.worker.put(topology)
                node.schedulers.on_topology(topology, self.records)
        self.happened.append(events.TopologySeen(topology))

    def kill(self, member: Member) -> None:
        """kill -9, and what the leader writes then: its stage is served by nobody."""
        node = self.nodes[member]
        node.alive = False
        self._tasks.pop(member).cancel()
        counter = self.topology.counter + 1
        pipelines = []
        for pipeline in self.topology.pipelines:
            if member in pipeline.members():
                parts = tuple(
                    Stage(s.homes, tuple(m for m in s.ranks if m != member)) for s in pipeline.stages
                )
                pipeline = Pipeline(pipeline.id, counter, parts)
            pipelines.append(pipeline)
        for other in self.nodes.values():
            if other.alive:
                other.worker.put(LinkChanged(member.node))
        self.happened.append(events.StreamDown(member))
        self.write(Topology("g", counter, self.topology.mode, tuple(pipelines)))

    # ------------------------------------------------------------------ the gateway

    def submit(self, rid: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.received[rid] = []
        self.happened.append(events.SubmitAsked(rid, prompt, Sampling(max_tokens, seed=rid)))

    def _gateway(self, event: events.Event) -> None:
        for effect in self.router.step(event, time.monotonic()):
            match effect:
                case events.SendSubmit(member, submit):
                    if submit.emitted:
                        self.moved.append((submit.rid, submit.pipeline))
                    if self.nodes[member].alive:
                        self.nodes[member].schedulers.on_gateway(1, submit)
                case events.SendCancel(member, cancel):
                    if self.nodes[member].alive:
                        self.nodes[member].schedulers.on_gateway(1, cancel)
                case events.OpenStream(member):
                    self.happened.append(events.StreamUp(member))
                case events.Deliver(rid, tokens):
                    self.received[rid] += [token.token for token in tokens]
                    if tokens[-1].finish is not None:
                        self.ended.add(rid)
                case events.Fail():
                    self.failed.append(effect)
                    self.ended.add(effect.rid)

    # ------------------------------------------------------------------ time

    async def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        turns = 0
        while not condition():
            assert time.monotonic() < deadline, f"ended: {sorted(self.ended)} of {sorted(self.received)}"
            for task in self._tasks.values():
                if task.done():
                    task.result()
            while self.happened:
                self._gateway(self.happened.popleft())
            turns += 1
            if turns % 8 == 0:
                self._gateway(events.Tick())
                for node in self.nodes.values():
                    if node.alive:
                        node.schedulers.tick()
                        node.worker.wake()
            await asyncio.sleep(0)

    async def __aenter__(self) -> Instances:
        self._tasks = {m: asyncio.create_task(node.worker.run()) for m, node in self.nodes.items()}
        self.write(self.topology)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for node in self.nodes.values():
            node.worker.close()

    def scheduler(self, pipeline: str) -> Any:
        found = self.topology.pipeline(pipeline)
        assert found is not None
        assert found.scheduler is not None
        return self.nodes[found.scheduler].schedulers.by_pipeline[pipeline]

    @property
    def recomputed(self) -> int:
        return sum(n.schedulers.counters()["tokens_recomputed"] for n in self.nodes.values() if n.alive)
