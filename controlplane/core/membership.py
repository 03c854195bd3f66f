"""Who is registered, who may be given a duty, and what everybody last reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.records import NodeRecord
from controlplane.contract.reports import NodeReport, PipelineReport, TargetReport
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Pipeline, Topology
from controlplane.core.detector import Detector

PATIENCE = 3.0  # times as long as the longest step of late: only then does a step stall


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as its newest process."""

    record: NodeRecord
    state: NodeState
    registered: bool
    usable: bool  # may be given a new duty, as far as the process itself goes (cordons are not looked at)
    why_not: str = ""
    demoted: bool = False  # usable when nobody else is

    @property
    def member(self) -> Member:
        return self.record.member


@dataclass(frozen=True, slots=True)
class Nodes:
    """One moment's view of all nodes. Read only."""

    views: Mapping[NodeId, NodeView]
    dead: frozenset[Member] = frozenset()
    reports: Mapping[Member, NodeReport] = field(default_factory=dict)
    faulty: frozenset[Member] = frozenset()  # dead ones that still run and have to be restarted
    unsure: frozenset[Member] = frozenset()  # dead ones that may be alive all the same

    @property
    def demoted(self) -> frozenset[NodeId]:
        return frozenset(node for node, view in self.views.items() if view.demoted)

    def usable(self, node: NodeId) -> Member | None:
        """The node's newest process, if it may be given a duty."""
        view = self.views.get(node)
        return view.member if view is not None and view.usable else None

    def is_dead(self, member: Member) -> bool:
        """Dead by evidence, or outlived by a newer process of the same node."""
        view = self.views.get(member.node)
        return member in self.dead or (view is not None and view.member != member)

    def is_gone(self, member: Member) -> bool:
        """Dead beyond doubt: a place that nobody can take is not kept for it."""
        return self.is_dead(member) and (member not in self.unsure or member not in self.dead)

    def report(self, member: Member | None, pipeline: PipelineId, stage: int) -> PipelineReport | None:
        """What a member last said of a stage; also what a dead one said last."""
        report = self.reports.get(member) if member is not None else None
        if report is None:
            return None
        return next((r for r in report.pipelines if r.pipeline == pipeline and r.stage == stage), None)

    def exchange(self, source: Member | None, copy: Member | None) -> bool:
        """Whether KV of one is KV of the other. Of a process that is not its node's newest nothing is known."""
        known = []
        for member in (source, copy):
            view = self.views.get(member.node) if member is not None else None
            if view is None or view.member != member:
                return True
            known.append(view.record.numerics)
        return known[0] == known[1]

    def acted_on(self, member: Member | None) -> int:
        """The counter of the newest topology that a member has acted on; -1: unknown."""
        report = self.reports.get(member) if member is not None else None
        return -1 if report is None else report.topology_counter

    def target(self, pipeline: Pipeline, stage: int, target: Member) -> TargetReport | None:
        """How far `target` is behind the stage's serving member, by the last report; None: unknown."""
        report = self.report(pipeline.stages[stage].leader, pipeline.id, stage)
        if report is None or report.epoch != pipeline.epoch:
            return None
        return next((t for t in report.targets if t.target == target), None)

    def lag(self, pipeline: Pipeline, stage: int, target: Member) -> int | None:
        """The same in tokens."""
        found = self.target(pipeline, stage, target)
        return None if found is None else found.lag_tokens

    def load(self, pipeline: Pipeline) -> int:
        """Requests running, by the scheduler's last report; also a dead scheduler's."""
        report = self.report(pipeline.stages[0].leader, pipeline.id, 0)
        return 0 if report is None else report.running

    def queued(self, pipeline: Pipeline) -> int:
        report = self.report(pipeline.stages[0].leader, pipeline.id, 0)
        return 0 if report is None else report.waiting

    def stalled(
        self, topology: Topology, speaks: Callable[[Member], bool] = lambda _: True
    ) -> dict[Member, float]:
        """Who holds a pipeline up, and for how long: the first stage that lacks a step which its predecessor has
        executed. Where all have the same steps it is the first one, whose scheduler issued the oldest in flight.

        What a member has done since its last report is not known. So the scheduler has to be heard, and of the one
        that is blamed and its predecessor at least one; else nobody is blamed."""
        guilty: dict[Member, float] = {}
        for pipeline in topology.pipelines:
            scheduler = pipeline.scheduler
            first = self.report(scheduler, pipeline.id, 0)
            if scheduler is None or first is None or first.epoch != pipeline.epoch or not speaks(scheduler):
                continue
            if (
                first.stalled_s <= PATIENCE * first.round_s
            ):  # under load, or with long prompts, steps take long
                continue
            blamed, before = scheduler, scheduler
            for index, stage in enumerate(pipeline.stages[1:], start=1):
                if stage.leader is None:
                    continue
                report = self.report(stage.leader, pipeline.id, index)
                if report is None or report.epoch != pipeline.epoch or report.last_step < first.last_step:
                    blamed = stage.leader
                    break
                before = stage.leader
            if speaks(blamed) or speaks(before):
                guilty[blamed] = max(guilty.get(blamed, 0.0), first.stalled_s)
        return guilty


@dataclass(slots=True)
class Membership:
    """Registrations and reports as they come in."""

    config: ClusterConfig
    detector: Detector
    reports: dict[Member, NodeReport] = field(default_factory=dict)
    _records: dict[NodeId, NodeRecord] = field(default_factory=dict)
    _registered: set[NodeId] = field(default_factory=set)

    def register(self, record: NodeRecord, now: float) -> bool:
        """True if this is a process that was not known."""
        if record.group != self.config.group:
            return False
        self.detector.registered(record.member, now)
        node = record.member.node
        old = self._records.get(node)
        self._records[node] = record
        self._registered.add(node)
        return old is None or old.member != record.member

    def gone(self, node: NodeId) -> None:
        """The record stays: a process that is still heard is not dead only because etcd was away."""
        self._registered.discard(node)
        self.detector.lease_gone(node)

    def record(self, node: NodeId) -> NodeRecord | None:
        return self._records.get(node)

    def forget(self, topology: Topology | None, now: float) -> None:
        """Drop what nobody will ask for again, so that crash loops do not fill the memory."""
        named = set() if topology is None else named_members(topology)
        for member in self.detector.forget(frozenset(named), now):
            self.reports.pop(member, None)
            record = self._records.get(member.node)
            if record is not None and record.member == member:
                del self._records[member.node]

    def nodes(self, topology: Topology | None) -> Nodes:
        digests = self._digests(topology)
        demoted = self.detector.demoted()
        views = {
            node: self._view(node, record, digests, demoted) for node, record in sorted(self._records.items())
        }
        detector = self.detector
        return Nodes(views, detector.dead(), self.reports, detector.faulty(), detector.unsure())

    def _view(
        self, node: NodeId, record: NodeRecord, digests: Mapping[int, str], demoted: frozenset[Member]
    ) -> NodeView:
        state = self.detector.state(record.member)
        registered = node in self._registered
        why_not = ""
        if record.num_stages != self.config.stages or not 0 <= record.stage < self.config.stages:
            why_not = f"holds stage {record.stage} of {record.num_stages}, the group has {self.config.stages}"
        elif record.block_size != self.config.engine.block_size:
            why_not = (
                f"KV blocks of {record.block_size} tokens, the group's have {self.config.engine.block_size}"
            )
        elif record.weights_digest != digests[record.stage]:
            why_not = f"its weights are not those that serve stage {record.stage}"
        elif not registered:
            why_not = "not registered"
        elif state is not NodeState.GREEN and record.member not in demoted:
            why_not = self.detector.evidence(record.member)
        return NodeView(record, state, registered, not why_not, why_not, record.member in demoted)

    def _digests(self, topology: Topology | None) -> dict[int, str]:
        """For each stage the weights that count: what serves now, else what most nodes hold."""
        serving = set() if topology is None else {m for p in topology.pipelines for m in p.members()}
        votes: dict[int, Counter[str]] = {}
        for record in self._records.values():
            weight = 1000 if record.member in serving else 1
            votes.setdefault(record.stage, Counter())[record.weights_digest] += weight
        return {stage: max(sorted(count), key=lambda d: count[d]) for stage, count in votes.items()}


def named_members(topology: Topology) -> set[Member]:
    """Every process that a topology names, in whatever part."""
    named = set(topology.retired)
    for pipeline in topology.pipelines:
        for stage in pipeline.stages:
            named.update(stage.ranks)
            named.update(stage.replicas)
        if pipeline.move is not None:
            named.add(pipeline.move.to)
    return named
