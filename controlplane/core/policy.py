"""What a plan is made from, beside the topology itself: settings, what operators want, and memories of time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.records import Operation
from controlplane.contract.topology import Move, Pipeline, Topology
from controlplane.core.events import PeersSeen
from controlplane.core.membership import Nodes

HAND_BACK = "hand-back"
PROBATION = "probation"
GATHER = "gather"
LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of automation. Seconds; tests shorten them."""

    moves_max: int = 2  # at once over the whole group: copies compete with serving for the links
    # Borrowed stages stay where they are until nobody has moved for so long (gather.py).
    gather_s: float = 5.0
    settle_s: float = 3.0  # a copy that is only in the wrong place waits until nobody has moved for so long
    copy_limit_s: float = 60.0  # then the move is called off ...
    bar_s: float = 30.0  # ... and not tried again for so long
    # How far behind a copy may be at the switch: blocks a running request, and seconds of copying.
    lag_blocks: int = 2
    behind_s: float = 0.3


@dataclass(frozen=True, slots=True)
class Want:
    """Somebody wants (pipeline, stage) to be served by one of `to`, best first."""

    pipeline: PipelineId
    stage: int
    to: Iterable[NodeId]  # read as often as one likes; who they are may be found out only then
    reason: str  # HAND_BACK, PROBATION, GATHER, LEAVING or an operation's id


@dataclass(frozen=True, slots=True)
class Seen:
    """Since when this controller has seen a move. A new leader counts from when it first looked, which is safe."""

    move: Move
    since: float


@dataclass(slots=True)
class Timers:
    """What the topology cannot say: how long something has been so. Lost with the controller, and rebuilt."""

    limits: Limits
    moves: dict[PipelineId, Seen] = field(default_factory=dict)
    unformed: dict[PipelineId, float] = field(default_factory=dict)
    barred: dict[tuple[PipelineId, int, NodeId], float] = field(default_factory=dict)
    calm_since: float = 0.0
    _epochs: dict[PipelineId, int] = field(default_factory=dict)

    def note(self, topology: Topology, now: float) -> None:
        """Look at a topology. Call it for every new one."""
        epochs = {p.id: p.epoch for p in topology.pipelines}
        if epochs != self._epochs:
            self._epochs, self.calm_since = epochs, now
        for gone in (self.unformed.keys() | self.moves.keys()) - epochs.keys():
            self.unformed.pop(gone, None)
            self.moves.pop(gone, None)
        for pipeline in topology.pipelines:
            if pipeline.epoch == 0:
                self.unformed.setdefault(pipeline.id, now)
            else:
                self.unformed.pop(pipeline.id, None)
            self._note_move(pipeline.id, pipeline.move, now)
        self.barred = {key: until for key, until in self.barred.items() if until > now}

    def next_deadline(self, config: ClusterConfig, now: float) -> float:
        """When something may be due because of time alone; infinity: nothing will."""
        limits, timing = self.limits, config.timing
        times = [self.calm_since + limits.gather_s, self.calm_since + limits.settle_s, *self.barred.values()]
        times += [since + timing.form_grace_s for since in self.unformed.values()]
        times += [seen.since + limits.copy_limit_s for seen in self.moves.values()]
        return min((at for at in times if at > now), default=math.inf)

    def _note_move(self, pipeline: PipelineId, move: Move | None, now: float) -> None:
        seen = self.moves.get(pipeline)
        if seen is not None and seen.move == move:
            return
        if seen is not None and move is None and now - seen.since >= self.limits.copy_limit_s:
            self.barred[pipeline, seen.move.stage, seen.move.to.node] = now + self.limits.bar_s
        if move is None:
            self.moves.pop(pipeline, None)
        else:
            self.moves[pipeline] = Seen(move, now)


@dataclass(frozen=True, slots=True)
class Policy:
    config: ClusterConfig
    timers: Timers  # read only
    operations: Mapping[str, Operation] = field(default_factory=dict)
    limits: Limits = Limits()
    peers: PeersSeen = field(default_factory=PeersSeen)
    me: str = ""  # the controller that decides
    unknown: frozenset[str] = frozenset()  # operations that are there and cannot be read


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything a decision may look at."""

    topology: Topology
    nodes: Nodes
    policy: Policy
    now: float
    avoid: frozenset[NodeId]  # cordoned, or being emptied by a running operation: they get no new duty
    # Those of `avoid` whose copies have to go as well: also who leaves.
    emptying: frozenset[NodeId] = frozenset()
    operations: tuple[Operation, ...] = ()  # whose turn it is; a restart stands as the replacement it is at
    only: Collection[PipelineId] | None = None  # the pipelines to look at; None: all

    @property
    def pipelines(self) -> Sequence[Pipeline]:
        """Those to look at."""
        every = self.topology.pipelines
        return every if self.only is None else [p for p in every if p.id in self.only]

    def idle(self, pipeline: Pipeline) -> bool:
        """Whether nobody would miss the pipeline: its scheduler says that it has no request, and has led for so long
        that gateways have told it of those that were with another one."""
        report = self.nodes.report(pipeline.scheduler, pipeline.id, 0)
        if report is None or report.epoch != pipeline.epoch or report.running or report.waiting:
            return False
        return self.now - self.policy.timers.calm_since >= self.policy.limits.settle_s

    def near(self, pipeline: Pipeline, stage: int, copy: Member) -> bool:
        """Whether a copy is so close behind that what it lacks is soon copied, or computed again."""
        limits = self.policy.limits
        target = self.nodes.target(pipeline, stage, copy)
        if target is None or target.behind_s > limits.behind_s:
            return False
        room = limits.lag_blocks * self.policy.config.engine.block_size * self.nodes.load(pipeline)
        return target.lag_tokens <= room
