"""A whole group around real controllers, in one thread and in simulated time: etcd, nodes, launchers.

Only what the core cannot see through is modelled: etcd is a dictionary with revisions, a node is what it reports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.events import Event, EventKind
from controlplane.contract.hosting import wanted_here
from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord, Operation, OperationState
from controlplane.contract.reports import LinkReport, NodeReport, PipelineReport, TargetReport
from controlplane.contract.status import OperationAnswer, OperationRequest
from controlplane.contract.topology import Mode, Move, Topology
from controlplane.core import events
from controlplane.core.controller import Controller
from controlplane.core.events import (
    CoreEvent,
    Effect,
    PeersSeen,
    Record,
    Reread,
    Resign,
    WriteOperation,
    WriteTopology,
)
from dataplane.core.peers import Peers, pipelines_of
from tests.core.control.world import make_config, make_record

STEP_S = 0.1
UNIX = 1_000_000.0
FAR = 10_000  # tokens: no copy is near that is so far behind
LINK_LIMIT_S = 3.0  # a link over which nothing passes is given up then


@dataclass
class Node:
    record: NodeRecord
    alive: bool = True
    stopped_at: float | None = None  # SIGSTOP
    leased: bool = True
    seq: int = 0
    born: float = 0.0
    timed_s: float = 0.0
    overdue_s: float = 0.0
    throttled: float = 0.0  # 1: its timers are overdue half of the time
    hung_at: float | None = None  # its computation does not end
    usual_s: float = 0.01  # what its computation under way usually takes
    advances: bool | None = None  # whether that gets on
    poisoned: int = 0
    peers: Peers = field(init=False)

    def __post_init__(self) -> None:
        self.peers = Peers(self.member, self.record.stage)

    @property
    def member(self) -> Member:
        return self.record.member


@dataclass
class Sim:
    config: ClusterConfig
    controllers: int = 2
    gateways: int = 1
    restart_s: float | None = 0.5  # the launcher's; None: dead nodes stay dead
    now: float = 100.0
    leader: str = ""
    topology: Topology | None = None
    topology_revision: int = 0
    operations: dict[str, tuple[Operation, int]] = field(default_factory=dict)
    etcd_up: bool = True
    # Of the next topology writes: done, conflict, lost, landed.
    outcomes: deque[str] = field(default_factory=deque)
    deaf: set[tuple[str, str]] = field(default_factory=set)  # (controller, node): reports do not get through
    # Links over which nothing passes, in no direction, and since when. Both ends take them for broken after a while.
    parted: dict[frozenset[str], float] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # nodes that their launcher does not restart
    lag: int = 0
    near: bool = True  # copies at the destinations of moves are no further behind than the others
    running: dict[str, int] = field(default_factory=dict)  # requests of a pipeline; of others 2
    ended: list[str] = field(default_factory=list)  # nodes that the launcher has ended for good
    history: list[Event] = field(default_factory=list)
    written: list[Topology] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    cores: dict[str, Controller] = field(default_factory=dict)
    peers: dict[str, Member] = field(default_factory=dict)  # controllers and gateways
    candidates: list[str] = field(default_factory=list)  # the leader first
    heard: tuple[tuple[str, int], ...] = ()  # how many nodes each controller hears, as it has told
    messages: list[str] = field(default_factory=list)  # all that operations ever said
    led: list[str] = field(default_factory=list)  # who, one after the other
    installed: tuple[str, str] = (
        "1",
        "s",
    )  # version of the code and digest of the settings that a fresh process gets
    recorded: dict[str, object] = field(default_factory=dict)  # what else is new in a fresh process's record
    made_of: dict[str, tuple[str, str]] = field(default_factory=dict)  # controllers and gateways
    _dead_since: dict[str, float] = field(default_factory=dict)
    _revision: int = 1
    _numbers: count[int] = field(default_factory=count)
    _backlog: list[CoreEvent] = field(default_factory=list)  # watch events that wait for etcd

    def __post_init__(self) -> None:
        for k in range(self.controllers):
            name = f"c{k + 1}"
            self.cores[name] = Controller(self.config, name)
            self.candidates.append(name)
        for name in (*self.cores, *(f"g{k + 1}" for k in range(self.gateways))):
            self.peers[name] = Member(name, f"i{next(self._numbers)}")
            self.made_of[name] = self.installed
        self.tell(self.peers_seen())
        self.tell(events.TopologySeen(None, 0))
        total = (self.config.instances + self.config.spares) * self.config.stages
        for k in range(total):
            self.start(f"n{k}")
        self.elect("c1")

    # -- the world's doings -------------------------------------------------------------------------------

    def start(self, node: str) -> Member:
        stage = int(node[1:]) % self.config.stages
        record = make_record(self.config, node, f"i{next(self._numbers)}", stage)
        record = replace(record, version=self.installed[0], settings=self.installed[1], **self.recorded)
        self.nodes[node] = Node(record, born=self.now)
        self._dead_since.pop(node, None)
        self.watch(events.NodeRegistered(record))
        return record.member

    def kill(self, *names: str) -> None:
        """kill -9: streams and links break at once, the lease runs out later."""
        for name in names:
            node = self.nodes[name]
            if node.alive:
                node.alive = False
                self._dead_since[name] = self.now
                self.tell(events.ReportStreamBroken(node.member))
        for node in self.nodes.values():
            self._report(node)  # neighbours see it at once

    def stop(self, name: str) -> None:
        if self.nodes[name].alive:
            self.nodes[name].stopped_at = self.now

    def cont(self, name: str) -> None:
        node = self.nodes[name]
        if node.stopped_at is not None:
            node.stopped_at = None
            if node.alive and not node.leased:
                node.leased = True
                self.watch(events.NodeRegistered(node.record))

    def cut_reports(self, controller: str, *names: str) -> None:
        """What these nodes say does not reach a controller any more; their streams end after a while, or now."""
        for name in names:
            self.deaf.add((controller, name))
            self._step(controller, events.ReportStreamBroken(self.nodes[name].member))

    def part(self, some: Iterable[str], others: Iterable[str]) -> None:
        """No link passes anything between two sets of nodes."""
        self.parted.update({frozenset((a, b)): self.now for a in some for b in others if a != b})

    def hang(self, name: str, usual_s: float = 0.01, advances: bool | None = None) -> None:
        """A computation that does not end. advances: whether it gets on nevertheless; None: it does not say."""
        node = self.nodes[name]
        node.hung_at, node.usual_s, node.advances = node.hung_at or self.now, usual_s, advances

    def elect(self, name: str) -> None:
        if self.leader in self.cores:
            self._step(self.leader, events.LostLeadership())
        self.leader = name
        self.led.append(name)
        self.candidates.remove(name)
        self.candidates.insert(0, name)
        self.watch(self.peers_seen())
        self._step(name, events.BecameLeader())

    def peers_seen(self) -> PeersSeen:
        found = sorted(self.peers.values())
        controllers = tuple(m for m in found if m.node in self.cores)
        gateways = tuple(m for m in found if m.node not in self.cores)
        made_of = tuple((name, *made) for name, made in sorted(self.made_of.items()))
        return PeersSeen(controllers, gateways, tuple(self.candidates), self.heard, made_of)

    def kill_leader(self) -> None:
        """The process is gone, and a fresh candidate joins; the next one in line leads."""
        old = self.leader
        self.leader = ""
        self._restart(old)
        self.elect(self.candidates[0])

    def _restart(self, name: str) -> None:
        """A fresh process of a controller or gateway."""
        self.peers[name] = Member(name, f"i{next(self._numbers)}")
        self.made_of[name] = self.installed
        if name in self.cores:
            self.candidates.remove(name)
            self.candidates.append(name)
            self._join(name)
        self.watch(self.peers_seen())

    def _join(self, old: str) -> None:
        """A fresh controller learns what is in etcd."""
        self.cores[old] = Controller(self.config, old)
        self._step(old, self.peers_seen())
        for node in self.nodes.values():
            if node.leased:
                self._step(old, events.NodeRegistered(node.record))
        for operation, revision in self.operations.values():
            self._step(old, events.OperationSeen(operation, revision))
        self._step(old, events.TopologySeen(self.topology, self.topology_revision))

    def submit(
        self,
        kind: str,
        node: str = "",
        *,
        id: str = "op",
        substitute: str | None = None,
        deadline_s: float = 0.0,
        version: str = "",
        settings: str = "",
        instances: int = 0,
    ) -> OperationAnswer:
        request = OperationRequest(
            id,
            kind,
            node,
            substitute,
            deadline_s=deadline_s,
            version=version,
            settings=settings,
            instances=instances,
        )
        answer = self.cores[self.leader].preflight(request)
        if answer.accepted and answer.operation is not None and id not in self.operations:
            self.put_operation(answer.operation)
        return answer

    def put_operation(self, operation: Operation) -> None:
        self._revision += 1
        self.operations[operation.id] = (operation, self._revision)
        self.messages.append(operation.message)
        self.watch(events.OperationSeen(operation, self._revision))

    def cancel(self, id: str) -> None:
        self.put_operation(replace(self.operations[id][0], state=OperationState.CANCELLED))

    def put_topology(self, topology: Topology | None) -> None:
        self._revision += 1
        self.topology = topology
        self.topology_revision = self._revision if topology is not None else 0
        self.watch(events.TopologySeen(topology, self._revision))

    def etcd_back(self) -> None:
        self.etcd_up = True
        backlog, self._backlog = self._backlog, []
        for event in backlog:
            self.tell(event)
        if not self.leader:
            self.elect(self.candidates[0])

    # -- delivery -----------------------------------------------------------------------------------------

    def watch(self, event: CoreEvent) -> None:
        if self.etcd_up:
            self.tell(event)
        else:
            self._backlog.append(event)

    def tell(self, event: CoreEvent) -> None:
        for name in list(self.cores):
            self._step(name, event)

    def _step(self, name: str, event: CoreEvent) -> None:
        inbox = deque([event])
        while inbox:
            effects = self.cores[name].step(inbox.popleft(), self.now, UNIX + self.now)
            for effect in effects:
                answer = self._perform(name, effect)
                if answer is not None:
                    inbox.append(answer)

    def _perform(self, name: str, effect: Effect) -> CoreEvent | None:
        match effect:
            case Record(event):
                self.history.append(event)
                return None
            case Resign():
                if name == self.leader:
                    self.candidates.append(self.candidates.pop(0))
                    if self.etcd_up:
                        self.elect(self.candidates[0])
                        return None  # elect() has told it
                    self.leader = ""  # nobody can be elected without etcd
                return events.LostLeadership()
            case Reread(None):
                return self._read_topology() if self.etcd_up else None
            case Reread(str() as id):
                if not self.etcd_up:
                    return None
                known = self.operations.get(id)
                return events.OperationSeen(*known, read=True) if known else events.OperationGone(id)
            case WriteTopology():
                return self._write_topology(name, effect)
            case WriteOperation(operation, expected):
                known = self.operations.get(operation.id)
                if not self.etcd_up:
                    return events.WriteUnknown(effect)
                if known is None or known[1] != expected or name != self.leader:
                    return events.WriteConflict(effect)
                self.put_operation(operation)
                return events.WriteDone(effect, self._revision)
        raise AssertionError(effect)

    def _read_topology(self) -> CoreEvent:
        return events.TopologySeen(self.topology, self.topology_revision, read=True)

    def _write_topology(self, name: str, write: WriteTopology) -> CoreEvent:
        topology, expected = write.topology, write.expected_mod_revision
        outcome = self.outcomes.popleft() if self.outcomes else "done"
        if not self.etcd_up or outcome == "lost":
            return events.WriteUnknown(write)
        if name != self.leader or expected != self.topology_revision or outcome == "conflict":
            return events.WriteConflict(write)
        assert self.topology is None or topology.counter > self.topology.counter
        for old in self.topology.pipelines if self.topology else ():
            new = topology.pipeline(old.id)
            assert new is not None or old.closing
            assert new is None or new.epoch >= old.epoch
        self.written.append(topology)
        self._revision += 1
        self.topology, self.topology_revision = topology, self._revision
        for other in self.cores:
            if other != name:
                self._step(other, events.TopologySeen(topology, self._revision))
        return events.WriteUnknown(write) if outcome == "landed" else events.WriteDone(write, self._revision)

    # -- time ---------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self._turn()

    def run_until(self, condition: Callable[[], bool], limit_s: float = 60.0) -> float:
        """Seconds until the condition held; fails after `limit_s`."""
        start = self.now
        while not condition():
            assert self.now - start < limit_s, (self.topology, self.operations)
            self._turn()
        return self.now - start

    def _turn(self) -> None:
        self.now += STEP_S
        for name, node in list(self.nodes.items()):
            self._live(name, node)
        self._restart_retired()
        self._launch()
        self.tell(events.Tick())
        if self.etcd_up and round(self.now / STEP_S) % 5 == 0:  # shell/hearing.py
            heard = tuple((name, core.hears) for name, core in sorted(self.cores.items()))
            if heard != self.heard:
                self.heard = heard
                self.watch(self.peers_seen())

    def _launch(self) -> None:
        """The launcher follows the topology: it starts who is wanted, and ends who has nothing to do any more."""
        if self.topology is None or not self.etcd_up:
            return
        wanted = wanted_here(self.topology, self.config)
        for name in wanted.run:
            if name not in self.nodes and name not in self.held:
                self.start(name)
        for name in wanted.stop:
            if name in self.nodes and self.nodes[name].alive:
                self._report(self.nodes[name], leaving=True)
                self.kill(name)
                self.ended.append(name)
            if self.nodes.pop(name, None) is not None:
                self.watch(events.NodeGone(name))

    def _restart_retired(self) -> None:
        """Controllers and gateways that the topology has retired exit; their supervisors start fresh ones."""
        for name, member in list(self.peers.items()):
            if self.etcd_up and self.topology is not None and member in self.topology.retired:
                if name in self.held:
                    continue
                if name == self.leader:
                    self.kill_leader()
                else:
                    self._restart(name)

    def _live(self, name: str, node: Node) -> None:
        silent_since = self._dead_since.get(name, node.stopped_at)
        if node.leased and silent_since is not None and self.now - silent_since > 5.0:
            node.leased = False
            self.watch(events.NodeGone(name))
        if not node.alive:
            waited = self.now - self._dead_since[name]
            if name not in self.held and self.restart_s is not None and waited >= self.restart_s:
                self.start(name)
            return
        if node.stopped_at is None:
            if self.topology is not None and node.member in self.topology.retired:
                self._report(node, leaving=True)
                self.kill(name)
            else:
                self._report(node)

    def _report(self, node: Node, leaving: bool = False) -> None:
        if not node.alive or node.stopped_at is not None:
            return
        node.seq += 1
        node.timed_s += 0.1
        node.overdue_s += 0.05 * node.throttled
        links = self.links(node)
        report = NodeReport(
            node.member,
            node.seq,
            UNIX + self.now,
            node.seq,
            pipelines=self._pipelines(node.member),
            links=links,
            blocks_used=20,
            blocks_replica=10,
            blocks_total=100,
            topology_counter=self.topology.counter if self.topology else 0,
            leaving=leaving,
            busy_s=0.0 if node.hung_at is None else self.now - node.hung_at,
            usual_s=0.0 if node.hung_at is None else node.usual_s,
            still_s=None
            if node.advances is None or node.hung_at is None
            else 0.0
            if node.advances
            else self.now - node.hung_at,
            poisoned=node.poisoned,
            timed_s=node.timed_s,
            overdue_s=node.overdue_s,
        )
        for controller in self.cores:
            if (controller, node.member.node) not in self.deaf:
                self._step(controller, events.ReportReceived(report))

    def links(self, node: Node) -> tuple[LinkReport, ...]:
        ours = pipelines_of(self.topology, node.member) if self.topology is not None else []
        registered = {name: other.record for name, other in self.nodes.items() if other.leased}
        node.peers.follow(ours, registered, self.now)
        for peer in self.nodes.values():
            parted_at = self._parted_at(node, peer.member.node)
            if not peer.alive:
                node.peers.broke(peer.member, "reset")
            elif parted_at is not None and self.now - parted_at >= LINK_LIMIT_S:
                node.peers.broke(peer.member, "timed out")
            else:
                node.peers.opened(peer.member)

        def heard(name: str) -> float:
            ends = (self.nodes[name].stopped_at, self._parted_at(node, name))
            return min([self.now - 0.01, *(at for at in ends if at is not None)])

        return tuple(node.peers.report(heard, self.now))

    def _parted_at(self, node: Node, peer: str) -> float | None:
        return self.parted.get(frozenset((node.member.node, peer)))

    def _pipelines(self, member: Member) -> tuple[PipelineReport, ...]:
        found = []
        for pipeline in self.topology.pipelines if self.topology else ():
            move = pipeline.move
            hung = {
                i: n.hung_at for n in self.nodes.values() for i in pipeline.stages_of(n.member) if n.hung_at
            }
            for index in pipeline.stages_of(member):
                targets = list(pipeline.stages[index].replicas)
                if move is not None and move.stage == index and move.to not in targets:
                    targets.append(move.to)
                found.append(
                    PipelineReport(
                        pipeline.id,
                        pipeline.epoch,
                        index,
                        last_step=6 if hung and index < min(hung) else 5,
                        stalled_s=self.now - min(hung.values()) if hung and index == 0 else 0.0,
                        running=self.running.get(pipeline.id, 2) if index == 0 else 0,
                        targets=tuple(TargetReport(t, self._lag(t, move)) for t in targets),
                    )
                )
        return tuple(found)

    def _lag(self, target: Member, move: Move | None) -> int:
        return FAR if not self.near and move is not None and target == move.to else self.lag

    # -- looking ------------------------------------------------------------------------------------------

    def serving(self, pipeline: str = "p0") -> list[str]:
        found = self.topology.pipeline(pipeline) if self.topology else None
        return [s.leader.node if s.leader else "-" for s in found.stages] if found else []

    def home(self) -> bool:
        """Everything is served at home by living processes, every copy is where the ring wants it."""
        if self.topology is None:
            return False
        size = self.config.instances
        for i, pipeline in enumerate(self.topology.pipelines):
            for s, stage in enumerate(pipeline.stages):
                if (
                    stage.ranks != tuple(self.nodes[h].member for h in stage.homes)
                    or pipeline.move is not None
                ):
                    return False
                target = (
                    (self.nodes[f"n{(i + 1) % size * self.config.stages + s}"].member,) if size > 1 else ()
                )
                if self.config.mode is Mode.REPLICATE and not self.config.spares and stage.replicas != target:
                    return False
        return not self.topology.retired

    def up(self) -> bool:
        return self.topology is not None and all(p.up for p in self.topology.pipelines)

    def state(self, id: str = "op") -> OperationState:
        return self.operations[id][0].state

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.history]


def formed(
    instances: int = 2,
    stages: int = 4,
    *,
    spares: int = 0,
    mode: Mode = Mode.REPLICATE,
    controllers: int = 2,
    gateways: int = 1,
    restart_s: float | None = 0.5,
) -> Sim:
    """A group in which everybody serves at home."""
    config = make_config(instances, stages, spares, mode)
    sim = Sim(config, controllers=controllers, gateways=gateways, restart_s=restart_s)
    sim.run_until(sim.home, limit_s=15)
    return sim
