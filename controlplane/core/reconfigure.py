"""A planned move of one stage: KV is copied to the destination while the pipeline serves, then the epoch is switched.

    copied, but for what is soon computed again  ->  the switch: ranks changed, new epoch, move cleared
    not so within copy_limit_s                   ->  called off

The switch is that of a death with a copy that is near: steps in flight are void, and each request goes on at what every
stage holds. What the destination lacks (the last blocks, part-filled ones, what was in flight) is one short prefill.
"""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Topology
from controlplane.core.edit import successor, with_stage
from controlplane.core.placement import Layout, replica_target
from controlplane.core.policy import Situation


def carried(s: Situation, pipeline: Pipeline, move: Move) -> bool:
    """Whether the destination has nearly all KV of the stage, or can have none: then all of it is computed again."""
    copies = s.topology.mode is not Mode.NONE and s.nodes.exchange(
        pipeline.stages[move.stage].leader, move.to
    )
    return not copies or s.near(pipeline, move.stage, move.to)


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
    served = with_stage(pipeline, move.stage, ranks=(move.to,), replicas=kept)
    moved = replace(served, move=None, moved=s.topology.counter + 1)
    draft = successor(s.topology, moved)
    target = replica_target(s, Layout(draft), moved, move.stage)
    if target is not None and target not in kept:
        # The old node has everything: if it is not the ring's choice it would be a second copy worth nothing later.
        moved = with_stage(moved, move.stage, replicas=(*kept[:1], target))
    return successor(s.topology, moved)


def advance(s: Situation, pipeline: Pipeline) -> Topology | None:
    """The next step of the pipeline's move, or None while it has to wait."""
    move = pipeline.move
    if move is None:
        return None
    # By a leader of older code: nodes of older code compute nothing meanwhile.
    if move.phase is MovePhase.QUIESCE:
        return successor(s.topology, replace(pipeline, move=replace(move, phase=MovePhase.COPY)))
    # A destination under suspicion gets no new duty: wait for it. A pipeline that stands still may have a member whose
    # computation hangs: who is to be found dead and restarted must not leave as if it were well.
    able = s.nodes.usable(move.to.node) == move.to and not s.nodes.stands_still(pipeline)
    if able and carried(s, pipeline, move):
        return switch(s, pipeline, move)
    seen = s.policy.timers.moves.get(pipeline.id)
    since = seen.since if seen is not None and seen.move == move else s.now
    if s.now - since >= s.policy.limits.copy_limit_s:
        return successor(s.topology, replace(pipeline, move=None))
    return None
