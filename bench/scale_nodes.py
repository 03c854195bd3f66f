"""Hosts full of simulated nodes: real registrations and leases, real streams of reports, no models behind them.

A host is one stream, and the code of its relay (dataplane/core/relay.py, report_stream.py) decides what goes on it and
when. A node acts on the topology that it sees in etcd as a real one does: it takes duties up, tells its links, answers
moves, and says that a neighbour's link broke when that neighbour is killed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from controlplane.backoff import Backoff
from controlplane.contract import rpc
from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member, new_incarnation
from controlplane.contract.keys import Keys, decode, encode
from controlplane.contract.records import NodeRecord
from controlplane.contract.reports import (
    REPORT_BEATS,
    LinkReport,
    NodeReport,
    PipelineReport,
    RecoveryReport,
    RelayedBatch,
    ReportAck,
    StepTimes,
    TargetReport,
)
from controlplane.contract.topology import Pipeline, Topology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdLeaseGone
from controlplane.etcd.lease import LeaseKeeper
from controlplane.etcd.values import Put
from dataplane.core.relay import Line, Relay, Source
from dataplane.report_stream import keep_reporting
from dataplane.reporter import COUNTERS_REPORTS

NODES_PER_HOST = 8
COUNTERS = {f"counter_number_{k}": k * 1000 for k in range(30)}
TIMES = tuple(StepTimes(k << 8 | 3, 1000 + k, 20_000_000) for k in range(8))
LEASE_S = 30
REGISTERING_MAX = 8  # hosts at a time


@dataclass(slots=True, eq=False)
class Node:
    """What one node would say of itself."""

    name: str
    stage: int
    host: Host
    member: Member
    alive: bool = True
    source: Source | None = None  # since it has reported
    seq: int = 0
    report_at: float = 0.0  # it sends a whole report then, news or none
    counters_at: float = 0.0  # its next report from then on brings its counters
    hurried: bool = False  # a pipeline of ours is being moved
    news: bool = True
    progress: int = 0
    pipelines: list[Pipeline] = field(default_factory=list)
    neighbours: list[Member] = field(default_factory=list)
    down: set[Member] = field(default_factory=set)
    recoveries: list[RecoveryReport] = field(default_factory=list)

    def speak(self, relay: Relay, counter: int, now: float, heartbeat_s: float) -> None:
        """A whole report if there is news or one is due, else a beat."""
        if self.source is None or self.news or now >= self.report_at:
            if self.source is None:
                self.source = relay.join(self.member)
            report = self.report(counter, now >= self.counters_at)
            raw = msgspec.Raw(rpc.encode(report))
            relay.report(self.source, raw, now, self.news or self.hurried, bool(report.recoveries))
            every_s = max(REPORT_BEATS * heartbeat_s, relay.report_s())
            self.news, self.report_at = False, now + (heartbeat_s if self.hurried else every_s)
            if report.counters:
                self.counters_at = now + COUNTERS_REPORTS * every_s
        else:
            relay.beat(self.source, now)

    def report(self, counter: int, counters: bool) -> NodeReport:
        self.seq += 1
        self.progress += 25
        recoveries, self.recoveries = tuple(self.recoveries), []
        return NodeReport(
            member=self.member,
            seq=self.seq,
            unix_s=time.time(),
            progress=self.progress,
            pipelines=tuple(self._duties()),
            links=tuple(
                LinkReport(m, m not in self.down, 0.0 if m in self.down else 0.05) for m in self.neighbours
            ),
            recoveries=recoveries,
            blocks_used=700,
            blocks_replica=650,
            blocks_total=2048,
            times=TIMES,
            timed_s=self.seq * 0.5,
            overdue_s=self.seq * 0.001,
            topology_counter=counter,
            counters=COUNTERS if counters else {},
        )

    def _duties(self) -> Iterator[PipelineReport]:
        for pipeline in self.pipelines:
            move = pipeline.move
            for index, stage in enumerate(pipeline.stages):
                if self.member not in stage.ranks:
                    continue
                targets = list(stage.replicas)
                if move is not None and move.stage == index and move.to not in targets:
                    targets.append(move.to)
                yield PipelineReport(
                    pipeline=pipeline.id,
                    epoch=pipeline.epoch,
                    stage=index,
                    last_step=7,
                    running=8 if index == 0 else 0,
                    round_s=0.05,
                    targets=tuple(TargetReport(t, 0) for t in targets),
                )


@dataclass(slots=True, eq=False)
class Host:
    name: str
    relay: Relay
    nodes: list[Node] = field(default_factory=list)
    due: asyncio.Event = field(default_factory=asyncio.Event)

    def wake_at(self, line: Line) -> float:
        """When the controller is due to hear from this host, were there no news."""
        hurried = [node.report_at for node in self.nodes if node.alive and node.hurried]
        return min([line.beat_at, *hurried])

    def batches(self, line: Line, counter: int, now: float, heartbeat_s: float) -> Iterator[RelayedBatch]:
        """What is to be sent now."""
        for node in self.nodes:
            if node.alive:
                node.speak(self.relay, counter, now, heartbeat_s)
        while (batch := line.next(now)) is not None:
            yield batch


class Fleet:
    """All hosts, and what they see in etcd. `killed` has when each member was killed, `written` how long it took until
    a topology in etcd no longer named it as serving (as its watch tells it here), seconds."""

    def __init__(self, config: ClusterConfig, client: EtcdClient, token: str, address: str) -> None:
        self.topology: Topology | None = None
        self.writes = 0
        self.killed: dict[Member, float] = {}
        self.written: dict[Member, float] = {}
        self.broken = 0  # streams of reports that ended: each was opened anew, as by a real relay
        self.late_s = 0.0  # the longest that a heartbeat left after its time: how busy this side was
        self._config = config
        self._client = client
        self._keys = Keys.of(config)
        self._token = token
        self._address = address
        self._hosts: list[Host] = []
        self.nodes: dict[str, Node] = {}
        self._tasks: list[asyncio.Task[None]] = []
        # Of all: each node's own would be etcd's work and ours, and no controller's.
        self._lease: LeaseKeeper | None = None
        self._room = asyncio.Semaphore(REGISTERING_MAX)
        for index in range(config.instances * config.stages):
            if index % NODES_PER_HOST == 0:
                self._hosts.append(Host(f"h{len(self._hosts)}", Relay(config.timing.heartbeat_s)))
            name = f"n{index}"
            node = Node(name, index % config.stages, self._hosts[-1], Member(name, new_incarnation()))
            self._hosts[-1].nodes.append(node)
            self.nodes[name] = node

    async def start(self) -> None:
        """Everybody registers, and reports as soon as all of its host are registered."""
        self._tasks.append(asyncio.create_task(self._follow()))
        self._lease = await self._client.lease_keeper(LEASE_S)

        async def join(number: int, host: Host) -> None:
            async with self._room:
                await self._register(*host.nodes)
            self._tasks.append(asyncio.create_task(self._report(host, number / len(self._hosts))))

        await asyncio.gather(*(join(number, host) for number, host in enumerate(self._hosts)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._lease is not None:
            await self._lease.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Raise what a task of this side raised, or EtcdLeaseGone."""
        if self._lease is not None and self._lease.lost.is_set():
            raise EtcdLeaseGone(f"the nodes' lease: {self._lease.lost_reason}")
        for task in self._tasks:
            if task.done():
                task.result()

    # -- faults -----------------------------------------------------------------------------------------------

    def kill(self, names: Iterable[str]) -> None:
        """At one moment. Streams and links of these nodes break; their keys stay for as long as a lease lasts."""
        victims = [self.nodes[name] for name in names]
        now = time.monotonic()
        for node in victims:
            node.alive = False
            self.killed[node.member] = now
            if node.source is not None:
                node.host.relay.leave(node.source)
            node.host.due.set()
        self._tasks.append(asyncio.create_task(self._expire({node: node.member for node in victims})))
        for node in victims:
            for peer in node.neighbours:
                other = self.nodes[peer.node]
                if other.alive and other.member == peer:
                    other.down.add(node.member)
                    other.news = True
                    other.host.due.set()

    async def restart(self, names: Iterable[str]) -> None:
        """As fresh processes."""

        async def one(node: Node) -> None:
            node.member = Member(node.name, new_incarnation())
            node.source, node.pipelines, node.neighbours, node.news = None, [], [], True
            node.down.clear()
            await self._register(node)
            node.alive = True
            node.host.due.set()

        await asyncio.gather(*(one(self.nodes[name]) for name in names))

    # -- what etcd tells ----------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        key = self._keys.topology(self._config.group)
        async for batch in self._client.watch_prefix(key):
            came = time.monotonic()
            for event in batch.events:
                if event.now is not None:
                    self.writes += 1
                    self._adopt(decode(event.now.value, Topology, key), came)

    def _adopt(self, after: Topology, came: float) -> None:
        before, self.topology = self.topology, after
        old = {} if before is None else {p.id: p for p in before.pipelines}
        touched: set[Member] = set()
        for pipeline in after.pipelines:
            was = old.get(pipeline.id)
            if was == pipeline:
                continue
            touched.update(_named(pipeline))
            if was is not None:
                touched.update(_named(was))
                if was.epoch != pipeline.epoch:
                    self._recovered(pipeline)
        serving: set[Member] | None = None
        for member, since in self.killed.items():
            if member not in self.written:
                if serving is None:
                    serving = {m for p in after.pipelines for m in p.members()}
                if member not in serving:
                    self.written[member] = came - since
        if touched:
            self._take_up(after, touched)

    def _take_up(self, topology: Topology, touched: set[Member]) -> None:
        duties: defaultdict[Member, list[Pipeline]] = defaultdict(list)
        for pipeline in topology.pipelines:
            for member in _named(pipeline) & touched:
                duties[member].append(pipeline)
        for member in touched:
            node = self.nodes[member.node]
            if node.member != member:
                continue
            node.pipelines = duties[member]
            node.neighbours = sorted(_neighbours(node.pipelines, member))
            node.hurried = any(p.move is not None for p in node.pipelines)
            node.news = True
            node.host.due.set()

    def _recovered(self, pipeline: Pipeline) -> None:
        scheduler = pipeline.scheduler
        node = None if scheduler is None else self.nodes[scheduler.node]
        if node is not None and node.member == scheduler:
            now = time.time()
            node.recoveries.append(
                RecoveryReport(pipeline.id, pipeline.epoch, now, now, now, now, 8, 100, planned=False)
            )

    # -- what etcd is told --------------------------------------------------------------------------------------

    async def _register(self, *nodes: Node) -> None:
        """In one revision. A controller whose loop is busy needs a few turns of it for each message of its watch: 4,000
        of them would take minutes."""
        lease = 0 if self._lease is None else self._lease.lease_id
        puts = [Put(self._keys.node(node.name), encode(self._record(node)), lease) for node in nodes]
        await self._client.txn([], puts, timeout_s=20.0)

    def _record(self, node: Node) -> NodeRecord:
        config = self._config
        return NodeRecord(
            member=node.member,
            group=config.group,
            stage=node.stage,
            num_stages=config.stages,
            link_address="tcp=127.0.0.1:1",
            rpc_address="127.0.0.1:1",
            weights_digest=f"digest-of-stage-{node.stage}",
            pool_blocks=config.engine.pool_blocks,
            block_size=config.engine.block_size,
            pid=os.getpid(),
            fault_domain={"host": node.host.name, "node": node.name},
            started_unix_s=time.time(),
        )

    async def _expire(self, members: dict[Node, Member]) -> None:
        """What etcd does when a dead node's lease ends, unless a fresh process has taken the key over."""
        await asyncio.sleep(self._config.timing.node_lease_s)
        for node, member in members.items():
            if node.member == member:
                await self._client.delete(self._keys.node(node.name), timeout_s=20.0)

    # -- reports ------------------------------------------------------------------------------------------------

    async def _report(self, host: Host, phase: float) -> None:
        heartbeat_s = self._config.timing.heartbeat_s

        def acknowledged(ack: ReportAck) -> None:
            host.relay.lines[self._address].acknowledge(max(ack.beat_s, heartbeat_s), ack.report_s)

        def broken(_why: str) -> None:
            self.broken += 1
            host.relay.close(self._address)

        await keep_reporting(
            self._address,
            self._token,
            Backoff(0.05, 1.0),
            lambda: self._batches(host, phase * heartbeat_s, heartbeat_s),
            acknowledged,
            broken,
        )

    async def _batches(self, host: Host, phase_s: float, heartbeat_s: float) -> AsyncIterator[RelayedBatch]:
        line = host.relay.open(self._address, time.monotonic() + phase_s)
        while True:
            timer = asyncio.get_running_loop().call_at(host.wake_at(line), host.due.set)
            await host.due.wait()
            host.due.clear()
            timer.cancel()
            now = time.monotonic()
            self.late_s = max(self.late_s, now - line.beat_at)
            counter = 0 if self.topology is None else self.topology.counter
            for batch in host.batches(line, counter, now, heartbeat_s):
                yield batch


def _named(pipeline: Pipeline) -> set[Member]:
    named = {m for stage in pipeline.stages for m in (*stage.ranks, *stage.replicas)}
    if pipeline.move is not None:
        named.add(pipeline.move.to)
    return named


def _neighbours(pipelines: list[Pipeline], me: Member) -> set[Member]:
    """As dataplane/world.py: who exchanges steps or copies with us."""
    found: set[Member] = set()
    for pipeline in pipelines:
        leaders = [stage.leader for stage in pipeline.stages]
        for index, stage in enumerate(pipeline.stages):
            around = {leaders[(index + 1) % len(leaders)], leaders[index - 1], *stage.replicas}
            if pipeline.move is not None and pipeline.move.stage == index:
                around.add(pipeline.move.to)
            mine = leaders[index]
            if mine == me:
                found.update(m for m in around if m is not None)
            elif mine is not None and me in around:
                found.add(mine)
    found.discard(me)
    return found


def settled(topology: Topology | None) -> bool:
    """Everybody serves at home with a copy, and nothing moves."""
    return topology is not None and all(
        p.up
        and p.move is None
        and all(stage.replicas and stage.ranks[0].node in stage.homes for stage in p.stages)
        for p in topology.pipelines
    )
