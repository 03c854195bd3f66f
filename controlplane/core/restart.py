"""Rolling restart: one process after the other, each by means that exist for a single one.

A node is replaced by a fresh process of itself (drain.py). Controllers and gateways hold nothing that others need:
they are retired, and whoever supervises them starts a fresh one; the leader hands leadership over before. The next
turn begins when the fresh process is back in place and, for a node, every copy of its stage has caught up: so no stage
ever has two nodes missing. `Operation.turn` is in etcd, so that a new leader goes on where the old one was.

Fresh is not enough: each has to be made of the code and the settings that were asked for, else of the same as the
others. A restart that finds another one fails there, before more of the cluster has become a mixture.
"""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationKind, ProcessKind, RestartScope, Target
from controlplane.contract.topology import Mode, Topology
from controlplane.core import drain
from controlplane.core.edit import successor
from controlplane.core.placement import takers
from controlplane.core.policy import Situation


def targets(s: Situation, scope: RestartScope) -> tuple[Target, ...]:
    """Who runs now: controllers (the leader last), then nodes, then gateways: nodes refuse gateways of newer code."""
    peers = s.policy.peers
    leader = peers.candidates[:1]
    found: list[Target] = []
    if scope in (RestartScope.CONTROLLERS, RestartScope.ALL):
        last = sorted(peers.controllers, key=lambda m: (m.node in leader, m))
        found += [Target(ProcessKind.CONTROLLER, m) for m in last]
    if scope in (RestartScope.NODES, RestartScope.ALL):
        live = sorted(s.nodes.views.items(), key=lambda item: (len(item[0]), item[0]))
        found += [Target(ProcessKind.NODE, view.member) for _, view in live if view.registered]
    if scope in (RestartScope.GATEWAYS, RestartScope.ALL):
        found += [Target(ProcessKind.GATEWAY, m) for m in sorted(peers.gateways)]
    return tuple(found)


def present(op: Operation) -> Target | None:
    """Whose turn it is."""
    return op.targets[op.turn] if 0 <= op.turn < len(op.targets) else None


def as_replacement(op: Operation) -> Operation:
    """What a restart amounts to during a node's turn; any other operation as it is."""
    target = present(op)
    if op.kind is not OperationKind.RESTART or target is None or target.kind is not ProcessKind.NODE:
        return op
    member = target.member
    return replace(op, kind=OperationKind.REPLACE, node=member.node, incarnation=member.incarnation)


def moves(op: Operation) -> bool:
    """Whether nodes have to be emptied for it."""
    return any(target.kind is ProcessKind.NODE for target in op.targets)


def next_turn(s: Situation, op: Operation) -> Operation:
    """The operation one turn further, if the present one is over."""
    target = present(op)
    over = target is not None and not s.topology.paused and _over(s, op, target)
    return replace(op, turn=op.turn + 1) if over else op


def _over(s: Situation, op: Operation, target: Target) -> bool:
    name = target.member.node
    match target.kind:
        case ProcessKind.NODE:
            view = s.nodes.views.get(name)
            fresh = drain.is_done(as_replacement(op), s.topology, s.nodes)
            return fresh and view is not None and _protected(s, view.record.stage)
        case ProcessKind.CONTROLLER:  # it stands for election once it knows the cluster
            return _fresh(s, target) and name in s.policy.peers.candidates
        case ProcessKind.GATEWAY:
            return _fresh(s, target)


def _fresh(s: Situation, target: Target) -> bool:
    name = target.member.node
    if target.kind is ProcessKind.NODE:
        newest = s.nodes.views[name].member if name in s.nodes.views else None
    else:
        newest = s.policy.peers.find(name)
    return newest is not None and newest != target.member


def _protected(s: Situation, stage: int) -> bool:
    """Every pipeline's stage is served, rests, and has a copy that has caught up where anybody could hold one."""
    for pipeline in s.topology.pipelines:
        place, move = pipeline.stages[stage], pipeline.move
        if not place.ranks or (move is not None and move.stage == stage):
            return False
        able = takers(s, pipeline, stage, keep_kv=False)
        if s.topology.mode is not Mode.REPLICATE or not any(s.nodes.exchange(place.leader, m) for m in able):
            continue
        live = [m for m in place.replicas if not s.nodes.is_dead(m)]
        if not any(s.near(pipeline, stage, copy) for copy in live):
            return False
    return True


def amiss(s: Situation, op: Operation) -> str:
    """What the fresh processes are made of that they should not be, in words. The one whose turn it is counts from its
    registration on: it may never be fit to end its turn."""
    made = {name: (version, settings) for name, version, settings in s.policy.peers.made_of}
    fresh = [target for target in op.targets[: op.turn + 1] if _fresh(s, target)]
    views = {t.member.node: s.nodes.views[t.member.node] for t in fresh if t.kind is ProcessKind.NODE}
    made |= {name: (view.record.version, view.record.settings) for name, view in views.items()}
    restarted = [target.member.node for target in fresh if target.member.node in made]
    told = [f"{name} cannot serve: {view.why_not}" for name, view in views.items() if view.unfit]
    for column, (what, wanted) in enumerate((("code", op.version), ("settings", op.settings))):
        having: dict[str, list[str]] = {}
        for name in restarted:
            having.setdefault(made[name][column] or "unknown", []).append(name)
        if wanted:
            wrong = {found: who for found, who in having.items() if found != wanted}
            told += [
                f"{', '.join(who)} came back with {what} {it}, not {wanted}" for it, who in wrong.items()
            ]
        elif len(having) > 1:
            told.append(
                f"mixed {what}: " + ", ".join(f"{it} in {', '.join(who)}" for it, who in having.items())
            )
    if not told:
        return ""
    return f"{'; '.join(told)}: install the same on every host, restart its launcher, and restart again"


def edit(s: Situation, op: Operation) -> Topology | None:
    """Retire the controller or gateway whose turn it is."""
    target = present(op)
    if target is None or target.member in s.topology.retired or leader_is_next(s, op):
        return None
    if target.kind is ProcessKind.NODE or s.policy.peers.find(target.member.node) != target.member:
        return None
    return successor(s.topology, retired=(*s.topology.retired, target.member))


def leader_is_next(s: Situation, op: Operation) -> bool:
    """Whether it is the turn of the very controller that leads, and somebody else could."""
    target = present(op)
    if op.kind is not OperationKind.RESTART or target is None or target.member.node != s.policy.me:
        return False
    others = any(name != s.policy.me for name in s.policy.peers.candidates)
    return others and s.policy.peers.find(s.policy.me) == target.member


def doing(s: Situation, op: Operation) -> str:
    """The turn of a controller or gateway, for people."""
    target = present(op)
    if target is None:
        return "nearly done"
    if leader_is_next(s, op):
        return f"{target.member.node} hands leadership over first"
    return f"waiting for a fresh process of {target.member.node}"


def counted(op: Operation, message: str) -> str:
    """How far a restart is, before what it is doing."""
    target = present(op)
    if op.kind is not OperationKind.RESTART or target is None:
        return message
    return f"{op.turn + 1} of {len(op.targets)}, {target.member.node}: {message}"


def peer_is_newest(s: Situation, member: Member) -> bool:
    """Whether a retired controller or gateway may still be there."""
    newest = s.policy.peers.find(member.node)
    return newest is None or newest == member
