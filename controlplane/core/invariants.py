"""What no step may break, whatever the situation. Each check has a name and a test that makes it fail.

A step answers for what it breaks, and not for what was broken before: a blemish in one pipeline (written by hand, or by
another version) must not keep the others from being mended. So each problem is told apart as far as it can be, and what
a step leaves as it was, or mends in part, is no new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace as replace_situation

from msgspec.structs import replace

from controlplane.contract.ids import Member, NodeId
from controlplane.contract.topology import Mode, MovePhase, Pipeline, Topology
from controlplane.core.policy import Situation
from controlplane.core.reconfigure import carried


class InvariantViolation(AssertionError):
    """Ours: a planned step would break a rule, and is not taken."""


def check(s: Situation, after: Topology) -> None:
    """Raise InvariantViolation naming the first invariant that the step from `s.topology` to `after` breaks."""
    for problem in broken(s, after):
        raise InvariantViolation(problem)


def broken(s: Situation, after: Topology) -> list[str]:
    """What the step from `s.topology` to `after` breaks that was not broken before: "invariant: where, and what"."""
    before = s.topology
    moves = [f"moves_are_sane: {p}" for p in moves_are_sane(s, after)]
    if _alike(before, after):  # then only what became of pipelines that did change can be wrong
        pairs = [(old, new) for old, new in _pairs(s, after) if old is not new]
        s = replace_situation(s, topology=replace(before, pipelines=tuple(old for old, _ in pairs)))
        after = replace(after, pipelines=tuple(new for _, new in pairs))
    problems = [*moves, *(p for p in _problems(s, after) if not p.startswith("moves_are_sane"))]
    if not problems:
        return []
    known = frozenset(_problems(s, replace(s.topology, counter=s.topology.counter + 1)))
    return [p for p in problems if p not in known]


def _alike(before: Topology, after: Topology) -> bool:
    """Whether nothing differs but pipelines, one by one."""
    if [p.id for p in before.pipelines] != [p.id for p in after.pipelines]:
        return False
    rest = replace(after, counter=before.counter, pipelines=())
    return rest == replace(before, pipelines=())


def blemishes(s: Situation) -> list[str]:
    """What is broken in the topology as it stands, or in those of its pipelines that are to be looked at."""
    now = replace(s.topology, counter=s.topology.counter + 1, pipelines=tuple(s.pipelines))
    if s.only is not None:
        s = replace_situation(s, topology=replace(s.topology, pipelines=now.pipelines))
    return _problems(s, now)


def _problems(s: Situation, after: Topology) -> list[str]:
    return [f"{name}: {p}" for name, invariant in INVARIANTS.items() for p in invariant(s, after)]


def counter_grows_by_one(s: Situation, after: Topology) -> Iterator[str]:
    if after.counter != s.topology.counter + 1:
        yield f"from {s.topology.counter} to {after.counter}"


def pipelines_stay(s: Situation, after: Topology) -> Iterator[str]:
    """Same group, same pipelines, same number of stages and ranks. One that is closing may go; one that comes is the
    last, and nobody serves it yet."""
    if after.group != s.topology.group:
        yield "another group"
    old = {p.id: p for p in s.topology.pipelines}
    new = {p.id: p for p in after.pipelines}
    yield from (
        f"{p.id}: it is gone, and was not closing" for p in old.values() if p.id not in new and not p.closing
    )
    stay = [name for name in old if name in new]
    if [p.id for p in after.pipelines] != [*stay, *(name for name in new if name not in old)]:
        yield "pipelines in another order, or twice"
    first = next(iter(s.topology.pipelines), None)
    for pipeline in new.values():
        before = old.get(pipeline.id) or first or pipeline
        if not pipeline.stages or len(pipeline.stages) != len(before.stages):
            yield f"{pipeline.id}: {len(pipeline.stages)} stages"
    for pipeline in (p for p in new.values() if p.id not in old):
        if (
            pipeline.epoch
            or pipeline.move is not None
            or any(st.ranks or st.replicas for st in pipeline.stages)
        ):
            yield f"{pipeline.id}: it is new, and somebody serves it"
    for pipeline in after.pipelines:
        for index, stage in enumerate(pipeline.stages):
            if stage.ranks and len(stage.ranks) != len(stage.homes):
                yield f"{pipeline.id}/{index}: {len(stage.ranks)} ranks of {len(stage.homes)}"


def the_closed_are_idle(s: Situation, after: Topology) -> Iterator[str]:
    """A pipeline goes when it serves nobody: no stream has to move because of it."""
    left = {p.id for p in after.pipelines}
    for pipeline in s.topology.pipelines:
        if pipeline.id not in left and pipeline.up and not s.idle(pipeline):
            yield f"{pipeline.id}: it goes, and may have requests"


def epoch_follows_ranks(s: Situation, after: Topology) -> Iterator[str]:
    for old, new in _pairs(s, after):
        changed = [st.ranks for st in old.stages] != [st.ranks for st in new.stages]
        if new.epoch != (after.counter if changed else old.epoch):
            yield f"{new.id}: epoch {new.epoch}, ranks {'changed' if changed else 'unchanged'}"


def no_node_twice_in_a_pipeline(s: Situation, after: Topology) -> Iterator[str]:
    for pipeline in after.pipelines:
        for node, count in _counted(pipeline.members()):
            yield from (f"{pipeline.id}: {node} serves {k} places" for k in range(2, count + 1))


def copies_are_elsewhere(s: Situation, after: Topology) -> Iterator[str]:
    """A copy is never on a node that serves the same pipeline, never twice, and on two nodes at most."""
    for pipeline in after.pipelines:
        serving = {m.node for m in pipeline.members()}
        for index, stage in enumerate(pipeline.stages):
            where = f"{pipeline.id}/{index}"
            for node, count in _counted(stage.replicas):
                yield from (f"{where}: {k} copies on {node}" for k in range(2, count + 1))
                if node in serving:
                    yield f"{where}: a copy on {node}, which serves the pipeline"
            yield from (f"{where}: {k} copies" for k in range(3, len(stage.replicas) + 1))


def new_duty_only_for_the_able(s: Situation, after: Topology) -> Iterator[str]:
    """Who gets a duty that it did not have is green, its node's newest process, not avoided and not retired."""
    for old, new in _pairs(s, after):
        for member, stage in _duties(new) - _duties(old):
            if s.nodes.usable(member.node) != member:
                yield f"{new.id}/{stage}: {member} is not usable"
            elif member in after.retired or (member.node in s.avoid and member.node not in s.nodes.demoted):
                yield f"{new.id}/{stage}: {member} is cordoned or retired"
            elif s.nodes.views[member.node].record.stage != stage:
                yield f"{new.id}/{stage}: {member} holds another stage's weights"


def the_living_are_not_displaced(s: Situation, after: Topology) -> Iterator[str]:
    """Who lives and serves gives way only to a move's destination that has a copy of nearly all, or to stop-restart."""
    for old, new in _pairs(s, after):
        stopped = after.mode is Mode.STOP_RESTART and any(s.nodes.is_dead(m) for m in old.members())
        for index, (before, now) in enumerate(zip(old.stages, new.stages, strict=True)):
            lost = [m for m in before.ranks if m not in now.ranks and not s.nodes.is_dead(m)]
            # With a rank that died and nobody to replace it the whole stage is emptied.
            if not lost or stopped or (not now.ranks and any(s.nodes.is_dead(m) for m in before.ranks)):
                continue
            move = old.move
            if move is None or move.stage != index or now.ranks != (move.to,):
                yield f"{new.id}/{index}: {lost[0]} is alive and lost its stage"
            elif not carried(s, old, move):
                yield f"{new.id}/{index}: {lost[0]} is alive and lost its stage to {move.to}, whose copy is behind"


def increase_before_decrease(s: Situation, after: Topology) -> Iterator[str]:
    """A stage that goes on serving keeps a living copy that it had, or gets another, unless copies are avoided."""
    if after.mode is not Mode.REPLICATE:
        return
    for old, new in _pairs(s, after):
        for index, (before, now) in enumerate(zip(old.stages, new.stages, strict=True)):
            if now.replicas or not before.ranks:
                continue
            promoted = {m.node for m in now.ranks}
            had = [
                m
                for m in before.replicas
                if not s.nodes.is_dead(m)
                and m.node not in promoted
                and all(s.nodes.exchange(rank, m) for rank in now.ranks)
            ]
            if any(m.node not in s.avoid for m in had):
                yield f"{new.id}/{index}: its last copy is dropped"


def moves_are_sane(s: Situation, after: Topology) -> Iterator[str]:
    moving = [p for p in after.pipelines if p.move is not None]
    before = sum(p.move is not None for p in s.topology.pipelines)
    if len(moving) > max(before, s.policy.limits.moves_max):
        yield f"{len(moving)} moves at once"
    for pipeline in moving:
        move = pipeline.move
        if move is None or after.mode is Mode.STOP_RESTART:
            yield f"{pipeline.id}: mode stop-restart moves nothing"
        elif not pipeline.up or not 0 <= move.stage < len(pipeline.stages):
            yield f"{pipeline.id}: a move of what does not serve"
        elif move.to.node in {m.node for m in pipeline.members()}:
            yield f"{pipeline.id}: {move.to} serves it already"


def moves_stay_what_they_are(s: Situation, after: Topology) -> Iterator[str]:
    """A move copies from beginning to end, to the same place; one that older code has quiesced copies again."""
    for old, new in _pairs(s, after):
        was, now = old.move, new.move
        if now is None or now == was:
            continue
        if now.phase is not MovePhase.COPY or (was is not None and now != replace(was, phase=now.phase)):
            yield f"{new.id}: from {was} to {now}"


def moves_are_told(s: Situation, after: Topology) -> Iterator[str]:
    """`moved` names the epochs that a living member's stage began at the destination of its move, and no other."""
    for old, new in _pairs(s, after):
        move = old.move
        stages = zip(old.stages, new.stages, strict=True)
        by_move = move is not None and any(
            index == move.stage and now.ranks == (move.to,) and not any(map(s.nodes.is_dead, before.ranks))
            for index, (before, now) in enumerate(stages)
        )
        if new.moved != (after.counter if by_move else old.moved):
            yield f"{new.id}: moved in {new.moved}, {'by' if by_move else 'without'} a move in {after.counter}"


def retired_serve_nothing(s: Situation, after: Topology) -> Iterator[str]:
    retired = set(after.retired)
    for pipeline in after.pipelines:
        for member in pipeline.members():
            if member in retired and not s.nodes.is_dead(member):
                yield f"{member} is retired and serves {pipeline.id}"


def one_process_a_node(s: Situation, after: Topology) -> Iterator[str]:
    """No node is named as two living processes."""
    seen: dict[NodeId, Member] = {}
    for pipeline in after.pipelines:
        for member, _ in sorted(_duties(pipeline)):
            if not s.nodes.is_dead(member) and seen.setdefault(member.node, member) != member:
                yield f"{member} and {seen[member.node]}"


def _counted(members: Iterable[Member]) -> Iterable[tuple[NodeId, int]]:
    """The nodes, and how many of the members are theirs."""
    nodes = [member.node for member in members]
    single = len(set(nodes)) == len(nodes)  # nearly always, and told in a fraction of the time
    return [(node, 1) for node in nodes] if single else Counter(nodes).items()


def _pairs(s: Situation, after: Topology) -> Iterator[tuple[Pipeline, Pipeline]]:
    """The pipelines that are in both."""
    known = {p.id: p for p in s.topology.pipelines}
    return ((known[p.id], p) for p in after.pipelines if p.id in known)


def _duties(pipeline: Pipeline) -> set[tuple[Member, int]]:
    duties = {(m, i) for i, stage in enumerate(pipeline.stages) for m in (*stage.ranks, *stage.replicas)}
    if pipeline.move is not None:
        duties.add((pipeline.move.to, pipeline.move.stage))
    return duties


INVARIANTS: dict[str, Callable[[Situation, Topology], Iterator[str]]] = {
    function.__name__: function
    for function in (
        counter_grows_by_one,
        pipelines_stay,
        the_closed_are_idle,
        epoch_follows_ranks,
        no_node_twice_in_a_pipeline,
        copies_are_elsewhere,
        new_duty_only_for_the_able,
        the_living_are_not_displaced,
        increase_before_decrease,
        moves_are_sane,
        moves_stay_what_they_are,
        moves_are_told,
        retired_serve_nothing,
        one_process_a_node,
    )
}
