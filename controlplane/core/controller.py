"""The controller as one pure state machine: events in, effects out, in the order in which they are to be performed.

Every candidate feeds one with the same events, so that whoever becomes leader decides at once; only the leader's
emits writes and history.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable
from dataclasses import replace as replace_value
from typing import assert_never

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.events import Event, EventKind
from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.records import NodeRecord, Operation
from controlplane.contract.reports import NodeReport
from controlplane.contract.status import ClusterStatus, NodeState, OperationAnswer, OperationRequest
from controlplane.contract.topology import Topology
from controlplane.core import events, narrate
from controlplane.core.detector import Detector, Verdict
from controlplane.core.edit import initial, interned, resumed
from controlplane.core.events import (
    CoreEvent,
    Effect,
    ForgetOperation,
    PeersSeen,
    Record,
    Reread,
    Resign,
    Write,
    WriteOperation,
    WriteTopology,
)
from controlplane.core.handover import Handover
from controlplane.core.invariants import blemishes
from controlplane.core.membership import Membership, Nodes, members_of, named_members
from controlplane.core.operations import progress, should_resign, survey
from controlplane.core.pieces import at_once
from controlplane.core.plan import propose
from controlplane.core.policy import Limits, Policy, Situation, Timers
from controlplane.core.preflight import preflight
from controlplane.core.slot import Slot
from controlplane.core.view import Overview

TOLD_MAX = 256  # blemishes that are remembered as told
FINISHED_KEPT = 100  # operations that are over stay in etcd until this many newer ones are
FORGET_EVERY_S = 5.0
OPERATIONS_EVERY_S = 0.2  # how often operations under way are looked at when nothing else happens
# Of which a decision looks at so many, and the next one at the next: to say how far one is takes a look at the whole
# group, and hundreds may be under way. What they want is planned for at once all the same.
OPERATIONS_LOOKED_AT_MAX = 16
RESYNC_S = 10.0  # a plan is made so often although nothing that is known of asks for one
# From a suspicion on only what is urgent is planned for so long. A storm begins with hundreds of them, and a look at
# the places of all copies after each one would keep its deaths waiting.
SUSPICION_S = 0.25


class Controller:
    """`take` notes an event and costs the same however large the group is; `ready` decides, once for all events that
    were taken since, and gives the effects. `step` is both. `status` and `preflight` only look."""

    def __init__(self, config: ClusterConfig, me: str, limits: Limits | None = None) -> None:
        self._config = config
        self._me = me
        self._limits = limits or Limits()
        self._detector = Detector(config.timing)
        self._members = Membership(config, self._detector)
        self._overview = Overview(config, me, self._members)
        self._topology: Slot[Topology] = Slot()
        self._operations: dict[str, Slot[Operation]] = {}
        self._timers = Timers(self._limits)
        # The newest one that was in etcd, if etcd has none now, or an older one.
        self._lost: Topology | None = None
        self._recovered: dict[PipelineId, int] = {}  # newest epoch whose recovery is on record
        self._blemishes: tuple[str, ...] = ()  # of the topology as it stands
        self._refused: tuple[str, ...] = ()  # of the last plan
        self._told: dict[str, None] = {}  # blemishes that are on record, the newest last
        self._last_counter = 0  # of the newest topology ever heard of, in etcd or from anybody
        self._peers = PeersSeen()
        self._handover = Handover(after_s=2 * config.timing.dead_after_s)
        self._leader = False
        self._resigning = False
        self._now = 0.0
        self._unix_now = 0.0
        self._effects: list[Effect] = []  # of what was taken
        self._eventful = False  # something was taken that a decision may follow from
        self._news = 0  # how many such events were more than time that passed
        self._replan = True  # ... namely another topology
        self._progressed: set[PipelineId] = set()  # of those `_waiting`, who reported
        self._waiting: set[PipelineId] = set()  # what is to become of them depends on reports
        self._version: object = None  # of the membership, at the last decision
        self._suspected = False  # nothing changed since then but that somebody is under suspicion
        self._urgent_until: float | None = None  # then the rest is planned, once at least
        self._plan_at = 0.0  # a plan is made then although nothing changed
        self._operations_at = 0.0
        self._operation_last = ""  # that was looked at
        self._forget_at = 0.0

    @property
    def leader(self) -> bool:
        return self._leader

    @property
    def hears(self) -> int:
        """How many of the registered nodes are heard: to be told to the other candidates."""
        return self._detector.hears(self._now)

    @property
    def newest(self) -> int:
        """Counter of the newest topology ever heard of: to be told to the other candidates."""
        return self._last_counter

    @property
    def topology(self) -> Topology | None:
        return self._topology.value

    @property
    def news(self) -> int:
        """How much was taken that a decision may follow from; that time passed is none."""
        return self._news

    @property
    def writing(self) -> bool:
        """A topology is being written, or read again: no decision writes another one before the answer."""
        return self._topology.busy

    def step(self, event: CoreEvent, now: float, unix_now: float) -> list[Effect]:
        """Take one event in. `now`: a monotonic clock, seconds; `unix_now`: for people and deadlines of operations."""
        self.take(event, now, unix_now)
        return self.ready(now, unix_now)

    def take(self, event: CoreEvent, now: float, unix_now: float) -> None:
        """Note an event; what follows from it is decided by `ready`."""
        self._now, self._unix_now = now, unix_now
        self._detector.advance(now)
        if self._take(event, self._effects):
            self._eventful = True
            self._news += not isinstance(event, events.Tick)

    def ready(self, now: float, unix_now: float) -> list[Effect]:
        """What is to be done about everything that was taken, in the order in which it is to be done."""
        self._now, self._unix_now = now, unix_now
        effects, self._effects = self._effects, []
        if self._eventful:
            self._eventful, self._news = False, 0
            self._observe(effects)
            if self._leader and not self._resigning:
                self._decide(effects)
        return effects

    def status(self, now: float) -> ClusterStatus:
        """Everything but `controllers`, `gateways`, `leader` and `etcd_age_s`, which the shell knows."""
        return at_once(self.status_in_pieces(now))

    def status_in_pieces(self, now: float) -> Generator[None, None, ClusterStatus]:
        """The same as the generator's result: see Overview.pieces."""
        topology = self._topology.value
        status = yield from self._overview.pieces(topology, self._nodes(), self._known_operations(), now)
        return replace(status, blemishes=(*self._blemishes, *self._refused))

    def preflight(self, request: OperationRequest) -> OperationAnswer:
        """Whether the operation may begin and what it would do. Accepted: the shell writes `operation`, if absent."""
        topology = self._topology.value
        situation = None if topology is None else self._situation(topology, self._nodes())
        return preflight(request, situation, self._known_operations(), self._unix_now)

    # -- taking events in ---------------------------------------------------------------------------------

    def _take(self, event: CoreEvent, effects: list[Effect]) -> bool:
        """Note an event; whether it can change any decision."""
        match event:
            case events.ReportReceived(report):
                return self._take_report(report, effects)
            case events.HeartbeatsReceived(members):
                for member in members:
                    self._detector.heard(member, self._now)
                return False  # the next tick weighs them
            case events.NodeRegistered(record):
                self._take_record(record, effects)
            case events.NodeGone(node):
                self._members.gone(node)
            case PeersSeen():
                self._peers = event
                self._last_counter = max(self._last_counter, event.forgotten)
            case events.ReportStreamBroken(member):
                self._detector.stream_broken(member, self._now)
                return True
            case events.ProcessEnded(member):
                self._detector.ended(member, self._now)
                return True
            case events.TopologySeen(topology, mod_revision, read):
                before = self._topology.value
                after = None if topology is None else interned(before, topology)
                if self._topology.seen(after, mod_revision, read):
                    self._adopt(before, after, effects)
            case events.OperationSeen(operation, mod_revision, read):
                self._slot(operation.id).seen(operation, mod_revision, read)
            case events.OperationUnknown(operation_id):
                self._slot(operation_id).unreadable()
            case events.OperationGone(operation_id):
                self._operations.pop(operation_id, None)
            case events.BecameLeader():
                self._lead(effects)
            case events.LostLeadership():
                self._leader = self._resigning = False
                self._topology.forget_writes()
                for slot in self._operations.values():
                    slot.forget_writes()
            case events.WriteDone(write, mod_revision):
                self._written(write, mod_revision, effects)
            case events.WriteConflict(write) | events.WriteUnknown(write):
                self._not_written(write, effects)
            case events.Tick():
                if self._now >= self._forget_at:
                    self._forget_at = self._now + FORGET_EVERY_S
                    self._members.forget(self._topology.value, self._now)
                return True
            case _:
                assert_never(event)
        self._replan = True
        return True

    def _take_report(self, report: NodeReport, effects: list[Effect]) -> bool:
        """Nearly all reports say nothing new: they are only heartbeats, and the next tick weighs them."""
        member = report.member
        before = self._members.reports.get(member)
        self._detector.reported(report, self._now)
        self._members.reported(report)
        self._last_counter = max(self._last_counter, report.topology_counter)
        for recovery in report.recoveries:
            if recovery.epoch > self._recovered.get(recovery.pipeline, 0):
                self._recovered[recovery.pipeline] = recovery.epoch
                self._record(narrate.of_recovery(recovery, member.node, self._unix_now), effects)
        awaited = self._waiting and self._waiting.intersection([p.pipeline for p in report.pipelines])
        if awaited:
            self._progressed.update(awaited)
        return (
            before is None
            or report.leaving
            or self._detector.state(member) is not NodeState.GREEN
            or bool(awaited)
            or report.broken_links() != before.broken_links()
        )

    def _take_record(self, record: NodeRecord, effects: list[Effect]) -> None:
        if self._members.register(record, self._now):
            text = f"{record.member.node} joined with the weights of stage {record.stage}"
            details: dict[str, float | int | str] = {
                "incarnation": record.member.incarnation,
                "pid": record.pid,
            }
            self._record(
                Event(EventKind.JOINED, record.member.node, text, self._unix_now, details=details), effects
            )

    def _lead(self, effects: list[Effect]) -> None:
        self._leader = True
        self._handover.began(self._now)
        counter = 0 if self._topology.value is None else self._topology.value.counter
        text = f"{self._me} leads from topology {counter} on"
        self._record(Event(EventKind.LEADER, self._me, text, self._unix_now, counter), effects)
        if self._topology.value is not None:  # who died while nobody led
            for member in sorted(named_members(self._topology.value) & self._detector.red()):
                why, silent_s = self._detector.evidence(member), self._detector.silent_s(member, self._now)
                self._tell_verdict(Verdict(member, NodeState.GREEN, NodeState.RED, why, silent_s), effects)

    def _written(self, write: Write, mod_revision: int, effects: list[Effect]) -> None:
        match write:
            case WriteTopology(topology):
                before = self._topology.value
                if self._topology.done(topology, mod_revision):
                    self._adopt(before, topology, effects)
            case WriteOperation(operation):
                slot = self._slot(operation.id)
                if slot.pending is operation and not operation.open:
                    self._record(narrate.of_operation(operation, self._unix_now), effects)
                slot.done(operation, mod_revision)

    def _not_written(self, write: Write, effects: list[Effect]) -> None:
        match write:
            case WriteTopology(topology):
                if self._topology.failed(topology, self._now):
                    effects.append(Reread())
            case WriteOperation(operation):
                if self._slot(operation.id).failed(operation, self._now):
                    effects.append(Reread(operation.id))

    def _adopt(self, before: Topology | None, after: Topology | None, effects: list[Effect]) -> None:
        if after is None:
            # Deleted by hand, or etcd lost its data: the next one goes on counting, epochs never repeat.
            self._lost = before if before is not None else self._lost
            return
        if after.counter < self._last_counter and before is not None:  # etcd was restored from a snapshot
            self._lost = before
        self._last_counter = max(self._last_counter, after.counter)
        self._timers.note(after, self._now)
        old = {} if before is None else {p.id: p for p in before.pipelines}
        changed = [p for p in after.pipelines if p is not old.get(p.id)]
        self._waiting &= {p.id for p in after.pipelines}
        self._detector.expect(members_of(changed) - set(after.retired), self._now)
        for pipeline in changed:
            twofold = any(len(stage.replicas) > 1 for stage in pipeline.stages)
            if pipeline.move is not None or pipeline.closing or twofold:
                self._waiting.add(pipeline.id)
            else:
                self._waiting.discard(pipeline.id)
        # Where nothing was wrong before, only what changed can be.
        only = None if self._blemishes or before is None else frozenset(p.id for p in changed)
        situation = replace_value(self._situation(after, self._members.nodes(after)), only=only)
        self._blemishes = tuple(blemishes(situation))
        if self._leader and before is not None:
            for event in narrate.of_topology(before, after, self._died_s(), self._unix_now):
                self._record(event, effects)

    # -- deciding -----------------------------------------------------------------------------------------

    def _observe(self, effects: list[Effect]) -> None:
        stalled = self._members.stalled(self._topology.value, self._now)
        verdicts = self._detector.evaluate(self._now, stalled)
        self._suspected = bool(verdicts) and all(v.after is NodeState.YELLOW for v in verdicts)
        for verdict in verdicts:
            # First heard is "joined", told elsewhere.
            if verdict.known or verdict.after is not NodeState.GREEN:
                self._tell_verdict(verdict, effects)

    def _tell_verdict(self, verdict: Verdict, effects: list[Effect]) -> None:
        """Who was asked to exit has left, also if its goodbye came late or never."""
        topology, member = self._topology.value, verdict.member
        asked = topology is not None and member in topology.retired and member not in self._detector.faulty()
        verdict = replace_value(verdict, left=verdict.left or asked)
        self._record(narrate.of_verdict(verdict, self._unix_now), effects)

    def _decide(self, effects: list[Effect]) -> None:
        self._tell(self._blemishes, effects)
        if self._topology.ask_again(self._now):
            effects.append(Reread())
        topology = self._topology.value
        nodes = self._nodes()
        self._weigh_news()
        everything = self._replan or self._now >= self._plan_at
        if not self._topology.busy and (everything or self._progressed):
            self._next_topology(topology, nodes, None if everything else frozenset(self._progressed), effects)
            self._progressed.clear()
            if everything:
                self._planned()
        if topology is not None and (everything or self._now >= self._operations_at):
            self._operations_at = self._now + OPERATIONS_EVERY_S
            situation = self._situation(topology, nodes)
            self._next_operations(situation, effects)
            if why := should_resign(situation) or self._outheard(effects):
                self._resigning = True
                effects.append(Resign(why))

    def _weigh_news(self) -> None:
        """Whether what is known of the members now asks for a plan at once, or for one soon."""
        version = self._members.version
        if version == self._version:
            return
        self._version = version
        if not self._suspected:
            self._replan = True
            return
        if self._urgent_until is None:
            self._urgent_until = self._now + SUSPICION_S
        self._plan_at = min(self._plan_at, self._urgent_until)

    @property
    def _urgent(self) -> bool:
        return self._urgent_until is not None and self._now < self._urgent_until

    def _planned(self) -> None:
        """For all pipelines."""
        self._replan = False
        self._plan_at = min(self._timers.next_deadline(self._config, self._now), self._now + RESYNC_S)
        if self._urgent_until is not None and self._urgent:
            self._plan_at = min(self._plan_at, self._urgent_until)
        else:
            self._urgent_until = None

    def _next_topology(
        self,
        topology: Topology | None,
        nodes: Nodes,
        only: frozenset[PipelineId] | None,
        effects: list[Effect],
    ) -> None:
        if topology is None:
            after = initial(self._config, self._last_counter + 1)
            if self._lost is not None:  # who serves goes on serving, in the same epochs
                after = replace(self._lost, counter=after.counter)
        elif topology.counter < self._last_counter:
            # Nodes would not look at its successors. (Or the watch lags: then the guard of this write fails.)
            after = resumed(topology, self._last_counter + 1)
            if self._lost is not None and self._lost.counter == self._last_counter:
                after = replace(self._lost, counter=after.counter)
        else:
            proposal = propose(replace_value(self._situation(topology, nodes), only=only), self._urgent)
            self._refused = proposal.refused
            self._tell(proposal.refused, effects)
            if proposal.transition is None:
                return
            after = proposal.transition.topology
        self._topology.pending = after
        effects.append(WriteTopology(after, self._topology.mod_revision))

    def _next_operations(self, situation: Situation, effects: list[Effect]) -> None:
        for operation_id, slot in sorted(self._operations.items()):
            if slot.ask_again(self._now):
                effects.append(Reread(operation_id))
        for slot in self._operations_due():
            if slot.value is None:
                continue
            after = progress(situation, slot.value, self._unix_now)
            if after != slot.value:
                slot.pending = after
                effects.append(WriteOperation(after, slot.mod_revision))
        known = self._known_operations().values()
        over = [op for op in known if not op.open and not self._operations[op.id].unknown]
        over.sort(key=lambda op: op.finished_unix_s)
        for op in over[:-FINISHED_KEPT]:
            del self._operations[op.id]
            effects.append(ForgetOperation(op.id))

    def _operations_due(self) -> list[Slot[Operation]]:
        """Whose turn it is to be looked at, of those that are open."""
        due = sorted(
            name
            for name, slot in self._operations.items()
            if not slot.busy and slot.value is not None and slot.value.open
        )
        if len(due) > OPERATIONS_LOOKED_AT_MAX:
            first = bisect_right(due, self._operation_last)
            due = [*due[first:], *due[:first]][:OPERATIONS_LOOKED_AT_MAX]
            self._operation_last = due[-1]
            self._operations_at = self._now  # the others' turn comes with the next decision
        return [self._operations[name] for name in due]

    def _tell(self, problems: Iterable[str], effects: list[Effect]) -> None:
        """Once each, for as long as it is remembered."""
        for text in problems:
            if text not in self._told:
                self._record(narrate.of_blemish(text, self._unix_now), effects)
                self._told[text] = None
                if len(self._told) > TOLD_MAX:
                    del self._told[next(iter(self._told))]

    def _outheard(self, effects: list[Effect]) -> str:
        """Why a candidate that hears more nodes should lead, or nothing."""
        others = {name: count for name, count in self._peers.hears if name != self._me}
        standing = {name: count for name, count in others.items() if name in self._peers.candidates}
        why = self._handover.weigh(self.hears, standing, self._now)
        if why:
            text = f"{self._me} hands leadership over: {why}"
            self._record(Event(EventKind.LEADER, self._me, text, self._unix_now), effects)
        return why

    # -- helpers ------------------------------------------------------------------------------------------

    def _record(self, event: Event, effects: list[Effect]) -> None:
        """History is the leader's to write: every candidate sees the same things."""
        if self._leader:
            effects.append(Record(event))

    def _slot(self, operation_id: str) -> Slot[Operation]:
        return self._operations.setdefault(operation_id, Slot())

    def _known_operations(self) -> dict[str, Operation]:
        return {key: slot.value for key, slot in sorted(self._operations.items()) if slot.value is not None}

    def _nodes(self) -> Nodes:
        return self._members.nodes(self._topology.value)

    def _policy(self) -> Policy:
        operations = self._known_operations()
        unknown = frozenset(key for key, slot in self._operations.items() if slot.unknown)
        return Policy(self._config, self._timers, operations, self._limits, self._peers, self._me, unknown)

    def _situation(self, topology: Topology, nodes: Nodes) -> Situation:
        return survey(topology, nodes, self._policy(), self._now)

    def _died_s(self) -> dict[Member, float]:
        return {m: self._now - (self._detector.changed_at(m) or 0.0) for m in self._detector.red()}
