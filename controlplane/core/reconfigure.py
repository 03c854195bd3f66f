"""A planned move of one stage: copy, quiesce, switch. Its phases are the table PHASES.

    COPY     --caught up-->  QUIESCE  --quiet-->  (switch: ranks changed, new epoch, move cleared)
    COPY     --copy_limit_s-->  called off
    QUIESCE  --quiesce_limit_s-->  COPY, attempt + 1, after a growing pause

`quiet` looks only at reports of nodes that have acted on the quiescing topology: the scheduler has issued its last
step, the moving stage has executed it, and the destination has acknowledged every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Topology
from controlplane.core.edit import successor, with_stage
from controlplane.core.placement import Layout, replica_target
from controlplane.core.policy import Seen, Situation


def copies(s: Situation, pipeline: Pipeline, move: Move) -> bool:
    """Whether the destination gets copies; else it recomputes."""
    return s.topology.mode is not Mode.NONE and s.nodes.exchange(pipeline.stages[move.stage].leader, move.to)


def caught_up(s: Situation, pipeline: Pipeline, move: Move, seen: Seen) -> bool:
    """The copy is so close that the rest fits into a short pause. Repeated attempts wait longer each time."""
    if move.attempt:
        pause = min(s.policy.limits.backoff_s * 2 ** (move.attempt - 1), s.policy.limits.backoff_max_s)
        if s.now - seen.since < pause:
            return False
    return not copies(s, pipeline, move) or s.near(pipeline, move.stage, move.to)


def quiet(s: Situation, pipeline: Pipeline, move: Move, seen: Seen) -> bool:
    scheduler, source = pipeline.scheduler, pipeline.stages[move.stage].leader
    if min(s.nodes.acted_on(scheduler), s.nodes.acted_on(source)) < seen.counter:
        return False
    first = s.nodes.report(scheduler, pipeline.id, 0)
    here = s.nodes.report(source, pipeline.id, move.stage)
    if first is None or here is None or {first.epoch, here.epoch} != {pipeline.epoch}:
        return False
    if first.quiesced_step < -1 or first.quiesced_step != here.last_step:
        return False
    return not copies(s, pipeline, move) or s.nodes.lag(pipeline, move.stage, move.to) == 0


def begin_quiesce(s: Situation, pipeline: Pipeline, move: Move) -> Topology:
    return successor(s.topology, replace(pipeline, move=replace(move, phase=MovePhase.QUIESCE)))


def back_to_copy(s: Situation, pipeline: Pipeline, move: Move) -> Topology:
    again = replace(move, phase=MovePhase.COPY, attempt=move.attempt + 1)
    return successor(s.topology, replace(pipeline, move=again))


def call_off(s: Situation, pipeline: Pipeline, move: Move) -> Topology:
    return successor(s.topology, replace(pipeline, move=None))


def switch(s: Situation, pipeline: Pipeline, move: Move) -> Topology:
    """The destination serves from this epoch on; its copy is where the ring wants it, which is often the old node."""
    stage = pipeline.stages[move.stage]
    kept = tuple(
        m
        for m in stage.replicas
        if m != move.to
        and m.node not in s.emptying
        and not s.nodes.is_dead(m)
        and s.nodes.exchange(move.to, m)
    )
    moved = replace(with_stage(pipeline, move.stage, ranks=(move.to,), replicas=kept), move=None)
    draft = successor(s.topology, moved)
    target = replica_target(s, Layout(draft), moved, move.stage)
    if target is not None and target not in kept:
        # The old node has everything: if it is not the ring's choice it would be a second copy worth nothing later.
        moved = with_stage(moved, move.stage, replicas=(*kept[:1], target))
    return successor(s.topology, moved)


@dataclass(frozen=True, slots=True)
class Phase:
    ready: Callable[[Situation, Pipeline, Move, Seen], bool]
    then: Callable[[Situation, Pipeline, Move], Topology]
    limit_s: Callable[[Situation], float]
    otherwise: Callable[[Situation, Pipeline, Move], Topology]


PHASES = {
    MovePhase.COPY: Phase(caught_up, begin_quiesce, lambda s: s.policy.limits.copy_limit_s, call_off),
    MovePhase.QUIESCE: Phase(quiet, switch, lambda s: s.policy.config.timing.quiesce_limit_s, back_to_copy),
}


def advance(s: Situation, pipeline: Pipeline) -> Topology | None:
    """The next step of the pipeline's move, or None while it has to wait."""
    move = pipeline.move
    if move is None:
        return None
    seen = s.policy.timers.moves.get(pipeline.id)
    if seen is None or seen.move != move:
        seen = Seen(move, s.now, s.topology.counter)
    phase = PHASES[move.phase]
    # A destination under suspicion gets no new duty: wait for it, as long as the phase allows.
    if s.nodes.usable(move.to.node) == move.to and phase.ready(s, pipeline, move, seen):
        return phase.then(s, pipeline, move)
    if s.now - seen.since >= phase.limit_s(s):
        return phase.otherwise(s, pipeline, move)
    return None
