"""Who is registered, who may be given a duty, and what everybody last reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from msgspec import structs

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.records import NodeRecord
from controlplane.contract.reports import NodeReport, PipelineReport, TargetReport
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Pipeline, Topology
from controlplane.core.detector import Detector

Votes = Counter[tuple[str, str]]  # digest of a stage's weights, and the checkpoint that they are of
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
    unfit: bool = False  # not usable for what it is made of: only a fresh process can be

    @property
    def member(self) -> Member:
        return self.record.member


@dataclass(frozen=True)
class Nodes:
    """One moment's view of all nodes. Read only, and not to be kept: `Membership` goes on with its mappings."""

    views: Mapping[NodeId, NodeView]
    dead: frozenset[Member] = frozenset()
    reports: Mapping[Member, NodeReport] = field(default_factory=dict)
    faulty: frozenset[Member] = frozenset()  # dead ones that still run and have to be restarted
    unsure: frozenset[Member] = frozenset()  # dead ones that may be alive all the same

    @cached_property
    def demoted(self) -> frozenset[NodeId]:
        return frozenset(node for node, view in self.views.items() if view.demoted)

    @cached_property
    def by_stage(self) -> Mapping[int, Mapping[NodeId, NodeView]]:
        """The views of those that hold a stage's weights."""
        found: dict[int, dict[NodeId, NodeView]] = {}
        for node, view in self.views.items():
            found.setdefault(view.record.stage, {})[node] = view
        return found

    @cached_property
    def living(self) -> frozenset[Member]:
        """Each node's newest process, if it is not dead. Others may live as well: `is_dead` tells."""
        return frozenset(view.record.member for view in self.views.values()) - self.dead

    def usable(self, node: NodeId) -> Member | None:
        """The node's newest process, if it may be given a duty."""
        view = self.views.get(node)
        return view.member if view is not None and view.usable else None

    def is_dead(self, member: Member) -> bool:
        """Dead by evidence, or outlived by a newer process of the same node."""
        view = self.views.get(member.node)
        return member in self.dead or (view is not None and view.record.member != member)

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

    def target(self, pipeline: Pipeline, stage: int, target: Member) -> TargetReport | None:
        """How far `target` is behind the stage's serving member, by the last report; None: unknown."""
        report = self.report(pipeline.leader_at(stage), pipeline.id, stage)
        if report is None or report.epoch != pipeline.epoch:
            return None
        return next((t for t in report.targets if t.target == target), None)

    def lag(self, pipeline: Pipeline, stage: int, target: Member) -> int | None:
        """The same in tokens."""
        found = self.target(pipeline, stage, target)
        return None if found is None else found.lag_tokens

    def load(self, pipeline: Pipeline) -> int:
        """Requests running, by the scheduler's last report; also a dead scheduler's."""
        report = self.report(pipeline.leader_at(0), pipeline.id, 0)
        return 0 if report is None else report.running

    def stands_still(self, pipeline: Pipeline) -> bool:
        """Whether a step of the pipeline, or an answer, is overdue, by the scheduler's last report."""
        report = self.report(pipeline.scheduler, pipeline.id, 0)
        return report is not None and report.epoch == pipeline.epoch and _stalls(report)

    def queued(self, pipeline: Pipeline) -> int:
        report = self.report(pipeline.leader_at(0), pipeline.id, 0)
        return 0 if report is None else report.waiting

    def stalled(
        self,
        topology: Topology,
        speaks: Callable[[Member], bool] = lambda _: True,
        only: Collection[PipelineId] | None = None,
    ) -> dict[Member, float]:
        """Who holds a pipeline up, and for how long: the first stage that lacks a step which its predecessor has
        executed. Where all have the same steps it is the first one, whose scheduler issued the oldest in flight. While
        the scheduler waits to hear what the stages hold, it is the first that has not said so.

        The scheduler has to be heard (`speaks`), since what a member has done after its last report is not known. For
        a step, so has the one that is blamed or its predecessor: who of the two lacks it is read off their reports.
        For an answer the scheduler's word is enough: it asks each stage itself and knows who owes one, and that is one
        kind of evidence, which alone makes nobody red (evidence.py) before `STUCK_S`."""
        guilty: dict[Member, float] = {}
        for pipeline in topology.pipelines:
            if only is not None and pipeline.id not in only:
                continue
            scheduler = pipeline.scheduler
            first = self.report(scheduler, pipeline.id, 0)
            if scheduler is None or first is None or first.epoch != pipeline.epoch:
                continue
            if not _stalls(first) or not speaks(scheduler):
                continue
            blamed, before = scheduler, scheduler
            if 0 <= first.unanswered < len(pipeline.stages):
                owes = pipeline.leader_at(first.unanswered)
                if owes is not None:
                    guilty[owes] = max(guilty.get(owes, 0.0), first.stalled_s)
                continue
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


def _stalls(report: PipelineReport) -> bool:
    """Under load, or with long prompts, steps take long."""
    return report.stalled_s > PATIENCE * report.round_s


@dataclass(slots=True)
class Membership:
    """Registrations and reports as they come in, and the views that follow, made anew only for whom it may matter."""

    config: ClusterConfig
    detector: Detector
    reports: dict[Member, NodeReport] = field(default_factory=dict)
    _records: dict[NodeId, NodeRecord] = field(default_factory=dict)
    _registered: set[NodeId] = field(default_factory=set)
    _views: dict[NodeId, NodeView] = field(default_factory=dict)
    _stages: dict[int, dict[NodeId, NodeView]] = field(default_factory=dict)  # the same by stage
    _stale: set[NodeId] = field(default_factory=set)  # views to be made anew
    _votes: dict[int, Votes] = field(default_factory=dict)  # by stage, one a record
    _checkpoint: str = ""  # the group's
    _digests: dict[int, str] = field(default_factory=dict)
    _counted: Topology | None = None  # the topology that checkpoint and digests follow from
    # Schedulers whose last report has a step that is overdue.
    _stalling: set[Member] = field(default_factory=set)
    _nodes: Nodes | None = None
    _touched: set[NodeId] = field(default_factory=set)  # of whom there was a report, or another view
    _version: int = 0

    @property
    def version(self) -> object:
        """Changes with all that a plan may look at, apart from reports."""
        detector = self.detector
        return self._version, detector.dead(), detector.faulty(), detector.unsure()

    def register(self, record: NodeRecord, now: float) -> bool:
        """True if this is a process that was not known."""
        if record.group != self.config.group:
            return False
        self.detector.registered(record.member, now)
        node = record.member.node
        old = self._records.get(node)
        if old is not None:
            self._unvote(old)
        self._votes.setdefault(record.stage, Counter())[_vote(record)] += 1
        self._records[node] = record
        self._registered.add(node)
        self._renew(node)
        return old is None or old.member != record.member

    def gone(self, node: NodeId) -> None:
        """The record stays: a process that is still heard is not dead only because etcd was away."""
        self._registered.discard(node)
        self._renew(node)
        self.detector.lease_gone(node)

    def reported(self, report: NodeReport) -> None:
        before = self.reports.get(report.member)
        if before is not None and before.counters and not report.counters:
            report = structs.replace(report, counters=before.counters)
        self.reports[report.member] = report
        self._touched.add(report.member.node)
        self._stalling.discard(report.member)
        for said in report.pipelines:
            if _stalls(said):
                self._stalling.add(report.member)

    def record(self, node: NodeId) -> NodeRecord | None:
        return self._records.get(node)

    def forget(self, topology: Topology | None, now: float) -> None:
        """Drop what nobody will ask for again, so that crash loops do not fill the memory."""
        self._touched &= self._records.keys()
        named = set() if topology is None else named_members(topology)
        for member in self.detector.forget(frozenset(named), now):
            self.reports.pop(member, None)
            self._stalling.discard(member)
            record = self._records.get(member.node)
            if record is not None and record.member == member:
                self._unvote(record)
                del self._records[member.node]
                self._renew(member.node)

    def stalled(self, topology: Topology | None, now: float) -> dict[Member, float]:
        """See Nodes.stalled."""
        if topology is None or not self._stalling:
            return {}
        said = {p.pipeline for m in self._stalling for p in self.reports[m].pipelines}
        reported = Nodes({}, reports=self.reports)
        return reported.stalled(topology, lambda member: self.detector.speaks(member, now), said)

    def nodes(self, topology: Topology | None) -> Nodes:
        self._recount(topology)
        for member in self.detector.changed():
            self._renew(member.node)
        if self._nodes is None:
            for node in self._stale:
                self._look(node)
            self._stale = set()
            detector = self.detector
            self._nodes = Nodes(
                self._views, detector.dead(), self.reports, detector.faulty(), detector.unsure()
            )
            self._nodes.__dict__["by_stage"] = self._stages
        return self._nodes

    def touched(self) -> set[NodeId]:
        """Of whom there was news since this was asked last; silence and slowness are none."""
        touched, self._touched = self._touched, set()
        return touched

    def _renew(self, node: NodeId) -> None:
        self._stale.add(node)
        self._touched.add(node)
        self._nodes = None

    def _look(self, node: NodeId) -> None:
        old = self._views.pop(node, None)
        if old is not None:
            del self._stages[old.record.stage][node]
        record = self._records.get(node)
        view = None if record is None else self._view(node, record)
        if view is not None:
            self._views[node] = self._stages.setdefault(view.record.stage, {})[node] = view
        if old is None or view is None or replace(old, why_not="") != replace(view, why_not=""):
            self._version += 1

    def _view(self, node: NodeId, record: NodeRecord) -> NodeView:
        state = self.detector.state(record.member)
        demoted = record.member in self.detector.demoted()
        registered = node in self._registered
        unfit = why_not = self._unfit(record)
        if not unfit and not registered:
            why_not = "not registered"
        elif not unfit and state is not NodeState.GREEN and not demoted:
            why_not = self.detector.evidence(record.member)
        return NodeView(record, state, registered, not why_not, why_not, demoted, bool(unfit))

    def _unfit(self, record: NodeRecord) -> str:
        """Why no process that registers this can serve the group."""
        stages, block_size = self.config.stages, self.config.engine.block_size
        if record.num_stages != stages or not 0 <= record.stage < stages:
            return f"holds stage {record.stage} of {record.num_stages}, the group has {stages}"
        if record.block_size != block_size:
            return f"KV blocks of {record.block_size} tokens, the controller's settings say {block_size}"
        if self._checkpoint and record.checkpoint not in ("", self._checkpoint):
            return "its checkpoint is not the one that serves the group"
        if record.weights_digest != self._digests[record.stage]:
            return f"its weights are not those that serve stage {record.stage}"
        return ""

    def _unvote(self, record: NodeRecord) -> None:
        votes = self._votes[record.stage]
        votes[_vote(record)] -= 1
        if not votes[_vote(record)]:
            del votes[_vote(record)]

    def _recount(self, topology: Topology | None) -> None:
        """The checkpoint that counts for the group, and of it the weights for each stage: what serves now, else what
        most nodes hold."""
        if self._nodes is not None and topology is self._counted:
            return
        self._counted = topology
        split = any(len({digest for digest, _ in votes}) > 1 for votes in self._votes.values())
        checkpoints = {of for votes in self._votes.values() for _, of in votes if of}
        serving = self._serving(topology) if split or len(checkpoints) > 1 else {}
        checkpoint = _most(self._by_checkpoint(self._votes), self._by_checkpoint(serving))
        digests = {
            stage: _most(_by_digest(votes, checkpoint), _by_digest(serving.get(stage, {}), checkpoint))
            for stage, votes in self._votes.items()
        }
        for stage in digests.keys() | self._digests.keys():
            if checkpoint != self._checkpoint or digests.get(stage) != self._digests.get(stage):
                for node in self._stages.get(stage, {}):
                    self._renew(node)
        self._checkpoint, self._digests = checkpoint, digests

    def _serving(self, topology: Topology | None) -> dict[int, Votes]:
        """The votes of those alone who have a duty."""
        found: dict[int, Votes] = {}
        for member in () if topology is None else {m for p in topology.pipelines for m in p.members()}:
            record = self._records.get(member.node)
            if record is not None and record.member == member:
                found.setdefault(record.stage, Counter())[_vote(record)] += 1
        return found

    def _by_checkpoint(self, votes: Mapping[int, Votes]) -> Counter[str]:
        """How many hold each. A node that does not say holds every one of which others have its tensors."""
        found: Counter[str] = Counter()
        for stage, of_stage in votes.items():
            for (digest, checkpoint), count in of_stage.items():
                known = {of for other, of in self._votes[stage] if other == digest and of}
                for of in {checkpoint} if checkpoint else known:
                    found[of] += count
        return found


def _vote(record: NodeRecord) -> tuple[str, str]:
    return record.weights_digest, record.checkpoint


def _by_digest(votes: Mapping[tuple[str, str], int], checkpoint: str) -> Counter[str]:
    """How many hold each, of those that may be of this checkpoint."""
    found: Counter[str] = Counter()
    for (digest, of), count in votes.items():
        if not checkpoint or of in ("", checkpoint):
            found[digest] += count
    return found


def _most(votes: Counter[str], serving: Counter[str]) -> str:
    return max(sorted(votes), key=lambda one: (serving[one], votes[one]), default="")


def named_members(topology: Topology) -> set[Member]:
    """Every process that a topology names, in whatever part."""
    return members_of(topology.pipelines) | set(topology.retired)


def members_of(pipelines: Iterable[Pipeline]) -> set[Member]:
    """Who serves these, holds their copies, or is about to serve."""
    named: set[Member] = set()
    for pipeline in pipelines:
        for stage in pipeline.stages:
            named.update(stage.ranks)
            named.update(stage.replicas)
        if pipeline.move is not None:
            named.add(pipeline.move.to)
    return named
