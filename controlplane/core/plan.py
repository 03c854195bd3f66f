"""plan(): the next small step from this topology towards the one that should be.

A step is the whole next topology, one counter further. RULES are tried in order and the first that has something to do
wins, so what is urgent (a dead member) never waits for what is tidy (a copy in the wrong place). No rule remembers
anything that is not in etcd, apart from timers: whoever leads next goes on from wherever this one stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replace_situation

from msgspec.structs import replace

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.topology import Mode, Move, Pipeline, Topology
from controlplane.core.closing import remove_closed
from controlplane.core.demote import restart_faulty
from controlplane.core.edit import successor
from controlplane.core.invariants import broken
from controlplane.core.membership import Nodes
from controlplane.core.operations import operate, pause, resume, survey
from controlplane.core.policy import Policy, Situation
from controlplane.core.reconfigure import advance
from controlplane.core.repair import drop_dead, fill, release, repair, retarget
from controlplane.core.wants import wants

Rule = Callable[[Situation], Topology | None]


@dataclass(frozen=True, slots=True)
class Transition:
    topology: Topology
    rule: str  # which rule made it


@dataclass(frozen=True, slots=True)
class Proposal:
    transition: Transition | None  # None when all is as it should be, or has to wait
    refused: tuple[str, ...] = ()  # what was not done: it would break something, or could not be worked out


def plan(topology: Topology, nodes: Nodes, policy: Policy, now: float) -> Transition | None:
    """The next step, which breaks nothing; None when all is as it should be, or has to wait."""
    return propose(survey(topology, nodes, policy, now)).transition


def propose(s: Situation, urgent: bool = False) -> Proposal:
    """The same, with what was refused. Of a situation with `only`, nothing has happened but reports of these pipelines.
    `urgent`: what only tidies up waits.

    A pipeline for which a rule wants what would break something, or with which it cannot cope at all, is set aside for
    that rule, and the others are planned for: one that is beyond help costs the others nothing."""
    refused: list[str] = []
    rules = REPORTED if s.only is not None else URGENT if urgent else RULES
    for rule in (resume,) if s.topology.paused else rules:
        left: Situation | None = s
        while left is not None:
            attempt = _try(rule, left)
            if attempt.after is not None and not attempt.problem:
                return Proposal(Transition(attempt.after, rule.__name__), tuple(refused))
            if attempt.problem:
                refused.append(f"{rule.__name__}: {attempt.problem}")
            rest = {p.id for p in left.pipelines} - attempt.blamed
            left = replace_situation(left, only=rest) if attempt.blamed and rest else None
    return Proposal(None, tuple(refused))


@dataclass(frozen=True, slots=True)
class _Attempt:
    after: Topology | None
    problem: str = ""
    blamed: frozenset[PipelineId] = frozenset()  # pipelines, of those looked at


def _try(rule: Rule, s: Situation) -> _Attempt:
    after, problem = _outcome(rule, s)
    if not problem:
        return _Attempt(after)
    looked_at = {p.id for p in s.pipelines}
    if after is not None:
        known = {p.id: p for p in after.pipelines}
        if blamed := frozenset(p.id for p in s.topology.pipelines if known.get(p.id) != p) & looked_at:
            if len(blamed) > 1:  # most of them may be beyond reproach
                alone = {p: _outcome(rule, replace_situation(s, only={p}))[1] for p in blamed}
                blamed = frozenset(p for p, failed in alone.items() if failed) or blamed
            return _Attempt(None, problem, blamed)
    alone = {pipeline: _outcome(rule, replace_situation(s, only={pipeline}))[1] for pipeline in looked_at}
    blamed = frozenset(pipeline for pipeline, failed in alone.items() if failed)
    return _Attempt(None, f"{', '.join(sorted(blamed)) or 'the group'}: {problem}", blamed)


def _outcome(rule: Rule, s: Situation) -> tuple[Topology | None, str]:
    """What the rule wants, and what is wrong with that."""
    try:
        after = rule(s)
        if after is None:
            return None, ""
        if replace(after, counter=s.topology.counter) == s.topology:
            return None, "a step that changes nothing"
        return after, next(iter(broken(s, after)), "")
    except Exception as error:  # a value that nobody foresaw
        return None, f"{type(error).__name__}: {error}"


def adopt_mode(s: Situation) -> Topology | None:
    """The settings are the operator's; a cluster may be started again in another mode."""
    mode = s.policy.config.mode
    if s.topology.mode is mode:
        return None
    calm = [replace(p, move=None) for p in s.topology.pipelines]
    if mode is Mode.REPLICATE:
        return successor(s.topology, *calm, mode=mode)
    bare = [replace(p, stages=tuple(replace(st, replicas=()) for st in p.stages)) for p in calm]
    return successor(s.topology, *bare, mode=mode)


def call_off_unwanted(s: Situation) -> Topology | None:
    """A move whose operation was cancelled, failed or deleted, or whose home is taken already."""
    places = {(p.id, p.move.stage) for p in s.pipelines if p.move is not None}
    if not places:
        return None
    wanted = {place: w.to for w in wants(s) if (place := (w.pipeline, w.stage)) in places}
    for pipeline in s.pipelines:
        move = pipeline.move
        # A destination that is only under suspicion is not wanted for anything new, yet nothing speaks against it.
        if move is None or s.nodes.usable(move.to.node) is None:
            continue
        if move.reason in s.policy.unknown:
            continue  # newer code may have begun it: that it cannot be read does not say that it is over
        if move.to.node not in wanted.get((pipeline.id, move.stage), ()):
            return successor(s.topology, replace(pipeline, move=None))
    return None


def advance_moves(s: Situation) -> Topology | None:
    for pipeline in s.pipelines:
        after = advance(s, pipeline)
        if after is not None:
            return after
    return None


def start_move(s: Situation) -> Topology | None:
    """One more planned move: one a pipeline at most, and few in all."""
    if sum(p.move is not None for p in s.topology.pipelines) >= s.policy.limits.moves_max:
        return None
    pipelines = {p.id: p for p in s.topology.pipelines}
    for want in wants(s):
        pipeline = pipelines[want.pipeline]
        if not pipeline.up or pipeline.move is not None or len(pipeline.stages[want.stage].ranks) != 1:
            continue
        to = next((m for node in want.to if (m := _open(s, pipeline, want.stage, node)) is not None), None)
        if to is not None:
            move = Move(stage=want.stage, to=to, reason=want.reason)
            return successor(s.topology, replace(pipeline, move=move))
    return None


def _open(s: Situation, pipeline: Pipeline, stage: int, node: str) -> Member | None:
    """The node's process, if a move there may begin now."""
    member = s.nodes.usable(node)
    if member is None or member in s.topology.retired or node in s.avoid:
        return None
    if any(m.node == node for m in pipeline.members()):
        return None
    return None if s.policy.timers.barred.get((pipeline.id, stage, node), s.now) > s.now else member


def tidy(s: Situation) -> Topology | None:
    """Retired processes that have made way for fresh ones, or have ended and leave the cluster, are no longer named."""
    left = [m for m in s.topology.retired if _newest(s, m) and not _left(s, m)]
    return successor(s.topology, retired=left) if len(left) < len(s.topology.retired) else None


def _newest(s: Situation, member: Member) -> bool:
    view = s.nodes.views.get(member.node)
    if view is not None:
        return view.member == member
    newest = s.policy.peers.find(member.node)  # a controller or a gateway
    return newest is None or newest == member


def _left(s: Situation, member: Member) -> bool:
    """Whether it has ended, and its node leaves the cluster: no launcher starts another."""
    view = s.nodes.views.get(member.node)
    registered = view is not None and view.registered
    return member.node in s.topology.leaving and not registered and member not in s.nodes.faulty


URGENT: tuple[Rule, ...] = (
    pause,
    repair,
    adopt_mode,
    drop_dead,
    fill,
    restart_faulty,
    call_off_unwanted,
    advance_moves,
)
RULES: tuple[Rule, ...] = (*URGENT, operate, remove_closed, start_move, retarget, tidy)
REPORTED: tuple[Rule, ...] = (advance_moves, remove_closed, release)  # what depends on reports
