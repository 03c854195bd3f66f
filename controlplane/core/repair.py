"""What happens without being asked for: dead members are replaced, empty stages filled, copies re-targeted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace as replace_situation

from msgspec.structs import replace

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.topology import HOLDER_MODES, Mode, Move, Pipeline, Topology
from controlplane.core.edit import successor, with_stage
from controlplane.core.placement import Layout, first_takers, is_target, replica_target
from controlplane.core.policy import Situation


def repair(s: Situation) -> Topology | None:
    """Pipelines with a dead member: a peer takes over, or what died is emptied. Their moves are called off.

    Who may be alive stays where nobody can take its place: to be taken for dead costs nobody anything then."""
    draft = _Draft(s)
    serving: set[PipelineId] | None = None
    for pipeline in s.pipelines:
        if s.nodes.living.issuperset(pipeline.members()):
            continue
        dead = [i for i, st in enumerate(pipeline.stages) if any(s.nodes.is_dead(m) for m in st.ranks)]
        gone = [i for i in dead if any(s.nodes.is_gone(m) for m in pipeline.stages[i].ranks)]
        if s.topology.mode is Mode.STOP_RESTART:
            if gone:
                return _stop(s, pipeline)
            continue
        if s.topology.mode in HOLDER_MODES:
            if dead and serving is None:
                serving = _serving(s)
            if lost := dead if serving and serving != {pipeline.id} else gone:
                for index in lost:
                    pipeline = with_stage(pipeline, index, ranks=())
                draft.put(replace(pipeline, move=None), lost)
            continue
        if mended := _staffed(s, draft, pipeline, dead) if dead else None:
            draft.put(replace(mended, move=None), dead)
        elif gone:
            # Whatever is left of a pipeline that is down keeps its KV, and waits.
            mended = _staffed(s, draft, pipeline, gone)
            for index in gone if mended is None else ():
                pipeline = with_stage(pipeline, index, ranks=())
            draft.put(replace(mended or pipeline, move=None), gone)
    # Who died held copies of others, too: a second write would come while nodes resume.
    if changed := draft.changed:
        _drop_dead(s, draft, [pipeline for pipeline in s.pipelines if pipeline.id not in changed])
    return draft.topology()


def fill(s: Situation) -> Topology | None:
    """Pipelines that are down and can be up: all of their empty stages at once, in one epoch."""
    draft = _Draft(s)
    for pipeline in s.pipelines:
        empty = [i for i, stage in enumerate(pipeline.stages) if not stage.ranks]
        if not empty:
            continue
        staffed = _at_home(s, pipeline, empty)
        if staffed is None and _may_borrow(s, pipeline):
            staffed = _staffed(s, draft, pipeline, empty)
        if staffed is not None:
            draft.put(staffed, range(len(pipeline.stages)))
    return draft.topology()


def drop_dead(s: Situation) -> Topology | None:
    """Copies on dead members are no copies; moves to dead or avoided members lead nowhere."""
    draft = _Draft(s)
    _drop_dead(s, draft, s.pipelines)
    return draft.topology()


def _drop_dead(s: Situation, draft: _Draft, pipelines: Iterable[Pipeline]) -> None:
    for pipeline in pipelines:
        move = pipeline.move
        lost = [i for i in range(len(pipeline.stages)) if _has_lost_copies(s, draft, pipeline, i)]
        if move is not None and (
            s.nodes.is_dead(move.to) or move.to.node in s.avoid or not _sane(pipeline, move)
        ):
            draft.put(replace(pipeline, move=None), lost)
        elif lost:
            draft.put(pipeline, lost)


def _sane(pipeline: Pipeline, move: Move) -> bool:
    return pipeline.up and 0 <= move.stage < len(pipeline.stages)


def _has_lost_copies(s: Situation, draft: _Draft, pipeline: Pipeline, index: int) -> bool:
    replicas = pipeline.stages[index].replicas
    if not any(s.nodes.is_dead(m) for m in replicas):
        return False
    return any(map(s.nodes.is_gone, replicas)) or _replicas(s, draft.layout, pipeline, index) != replicas


def retarget(s: Situation) -> Topology | None:
    """Pipelines with a copy in the wrong place: add the right one; drop the other when it caught up."""
    draft = _Draft(s)
    moved = []
    for pipeline in s.pipelines:
        changed = pipeline
        for index, stage in enumerate(pipeline.stages):
            replicas = _replicas(s, draft.layout, pipeline, index) if stage.ranks else stage.replicas
            if replicas != stage.replicas:
                changed = with_stage(changed, index, replicas=replicas)
        if changed is not pipeline:
            moved.append(changed)
    return successor(s.topology, *moved) if moved else None


def release(s: Situation) -> Topology | None:
    """`retarget` where a report may be what it waited for: of two copies one goes when the other is near."""
    twofold = {p.id for p in s.pipelines if any(len(stage.replicas) > 1 for stage in p.stages)}
    return retarget(replace_situation(s, only=twofold)) if twofold else None


class _Draft:
    """The next topology while one pipeline after the other is decided upon, each in the knowledge of those before."""

    def __init__(self, s: Situation) -> None:
        self._s = s
        self._changed: list[Pipeline] = []
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        if self._layout is None:
            self._layout = Layout(self._s.topology)
        return self._layout

    @property
    def changed(self) -> set[PipelineId]:
        return {pipeline.id for pipeline in self._changed}

    def put(self, pipeline: Pipeline, stages: Iterable[int]) -> None:
        """`pipeline` as it is to be, with the copies of some of its stages where they can be."""
        self.layout.put(pipeline)
        changed = pipeline
        for index in stages:
            replicas = _replicas(self._s, self.layout, pipeline, index)
            changed = with_stage(changed, index, replicas=replicas)
        self._changed.append(changed)

    def topology(self) -> Topology | None:
        return successor(self._s.topology, *self._changed) if self._changed else None


def _stop(s: Situation, pipeline: Pipeline) -> Topology:
    """Mode stop-restart: the whole instance goes, its survivors are restarted from cold."""
    survivors = [m for m in pipeline.members() if not s.nodes.is_dead(m)]
    emptied = pipeline
    for index in range(len(pipeline.stages)):
        emptied = with_stage(emptied, index, ranks=(), replicas=())
    return successor(s.topology, replace(emptied, move=None), retired=(*s.topology.retired, *survivors))


def _serving(s: Situation) -> set[PipelineId]:
    """The pipelines that can go on with another one's requests."""
    return {p.id for p in s.topology.pipelines if p.up and not any(map(s.nodes.is_dead, p.members()))}


def _at_home(s: Situation, pipeline: Pipeline, stages: list[int]) -> Pipeline | None:
    """The stages served by their own homes, if all of these are ready."""
    staffed = pipeline
    for index in stages:
        homes = pipeline.stages[index].homes
        ranks = tuple(m for m in map(s.nodes.usable, homes) if m is not None)
        if len(ranks) < len(homes) or any(m in s.topology.retired or m.node in s.avoid for m in ranks):
            return None
        staffed = with_stage(staffed, index, ranks=ranks)
    return staffed


def _may_borrow(s: Situation, pipeline: Pipeline) -> bool:
    if s.topology.mode is Mode.STOP_RESTART or s.topology.mode in HOLDER_MODES:
        return False
    since = s.policy.timers.unformed.get(pipeline.id, s.now)
    return pipeline.epoch > 0 or s.now - since >= s.policy.config.timing.form_grace_s


def _staffed(s: Situation, draft: _Draft, pipeline: Pipeline, stages: list[int]) -> Pipeline | None:
    """The stages with their dead or missing ranks replaced; None if anybody is missing."""
    keep_kv = s.nodes.load(pipeline) > 0
    staffed = pipeline
    for index in stages:
        stage = pipeline.stages[index]
        old: list[Member | None] = [None if s.nodes.is_dead(m) else m for m in stage.ranks]
        old = old or [None] * len(stage.homes)
        able = first_takers(s, draft.layout, pipeline, index, keep_kv=keep_kv)
        ranks = [m if m is not None else next(able, None) for m in old]
        staffed = with_stage(staffed, index, ranks=tuple(m for m in ranks if m is not None))
        if None in ranks:
            return None
    return staffed


def _replicas(s: Situation, layout: Layout, pipeline: Pipeline, index: int) -> tuple[Member, ...]:
    """Copies of one stage after the next small step: at most the old one and the right one."""
    stage = pipeline.stages[index]
    if len(stage.replicas) == 1 and is_target(s, layout, pipeline, index, stage.replicas[0]):
        return stage.replicas
    serving = {m.node for m in pipeline.members()}
    held = [
        m
        for m in stage.replicas
        if not s.nodes.is_gone(m) and m.node not in serving and s.nodes.exchange(stage.leader, m)
    ]
    live = [m for m in held if not s.nodes.is_dead(m)]
    if layout.topology.mode is not Mode.REPLICATE:
        return ()
    if not stage.ranks:
        return tuple(held)  # nobody serves; what is left of the KV may be promoted yet
    kept = [m for m in live or held if m.node not in s.emptying]
    target = replica_target(s, layout, pipeline, index)
    if target is None:
        return tuple(kept[:2])  # on a cordoned node, or one that may be alive, too: better than none
    if target in live:
        # The others go once the right one has what they have.
        if s.near(pipeline, index, target):
            return (target,)
        return (*[m for m in live if m != target][:1], target) if len(live) > 1 else (target,)
    calm = s.now - s.policy.timers.calm_since >= s.policy.limits.settle_s
    if live and not any(m.node in s.avoid for m in live) and not calm:
        return tuple(live[:2])
    return (*live[:1], target)
