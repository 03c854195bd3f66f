"""Operators' wishes: which are under way, how far each is, and what those change that are not about one node.

An operation is a value in etcd that says what should be; its progress is read off the topology and the
registrations alone. That makes every operation idempotent, resumable by the next leader, and cancellable: once it is
no longer open nobody wants its moves any more and plan() calls them off.

drain, cordon, undrain, replace   drain.py
restart                           restart.py; during a node's turn it is that node's replacement
transfer-leader                   whoever leads and is not meant resigns, until the one that is meant leads
pause, resume                     automation off (moves under way are called off) and on
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.topology import Mode, Topology
from controlplane.core import drain, restart
from controlplane.core.drain import empties, makes_way, wants_of
from controlplane.core.edit import successor
from controlplane.core.membership import Nodes
from controlplane.core.policy import Policy, Situation

LEADER, AUTOMATION = (
    "the leader",
    "automation",
)  # what operations claim beside processes; no process has such a name


def survey(topology: Topology, nodes: Nodes, policy: Policy, now: float) -> Situation:
    """The situation: who is to be avoided follows from the cordons, the demotions and the operations under way."""
    operations = tuple(active(policy.operations))
    emptying = frozenset(op.node for op in operations if empties(op, nodes))
    avoid = emptying | set(topology.cordoned) | nodes.demoted
    return Situation(topology, nodes, policy, now, avoid, emptying, operations=operations)


def claims(op: Operation) -> frozenset[str]:
    """What an operation needs to itself."""
    match op.kind:
        case OperationKind.PAUSE | OperationKind.RESUME:
            return frozenset({AUTOMATION})
        case OperationKind.TRANSFER:
            return frozenset({LEADER})
        case OperationKind.RESTART:
            return frozenset({LEADER, *(target.member.node for target in op.targets)})
        case _:
            return frozenset({op.node, op.substitute or op.node})


def active(operations: Mapping[str, Operation]) -> list[Operation]:
    """Open operations, oldest first; later ones that claim the same wait for their turn."""
    busy: set[NodeId] = set()
    first: list[Operation] = []
    for op in sorted(operations.values(), key=lambda o: (o.created_unix_s, o.id)):
        if not op.open:
            continue
        if not claims(op) & busy:
            first.append(restart.as_replacement(op))
        busy |= claims(op)
    return first


# -- what the topology is told ------------------------------------------------------------------------------


def pause(s: Situation) -> Topology | None:
    """Stop planning. A pipeline must not stay quiesced meanwhile, so every move is called off."""
    if s.topology.paused or not _asked(s, OperationKind.PAUSE):
        return None
    return successor(s.topology, *[replace(p, move=None) for p in s.topology.pipelines], paused=True)


def resume(s: Situation) -> Topology | None:
    return successor(s.topology, paused=False) if _asked(s, OperationKind.RESUME) else None


def operate(s: Situation) -> Topology | None:
    """Cordons, retirements and new homes that operations ask for."""
    for op in s.operations:
        after = restart.edit(s, op) if op.kind is OperationKind.RESTART else drain.edit(s, op)
        if after is not None:
            return after
    return None


def _asked(s: Situation, kind: OperationKind) -> bool:
    return any(op.kind is kind for op in s.operations)


def should_resign(s: Situation) -> str:
    """Why this controller, which leads, should hand leadership over now; "" if it should not."""
    for op in s.operations:
        if (
            op.kind is OperationKind.TRANSFER
            and op.node != s.policy.me
            and op.node in s.policy.peers.candidates
        ):
            return f"{op.node} is to lead ({op.id})"
        if op.kind is OperationKind.RESTART and not s.topology.paused and restart.leader_is_next(s, op):
            return f"it is to be restarted ({op.id})"
    return ""


# -- how far they are ---------------------------------------------------------------------------------------


def progress(s: Situation, op: Operation, unix_now: float) -> Operation:
    """The operation as it should stand in etcd now; the same object while nothing changed."""
    moves = op.kind in {OperationKind.DRAIN, OperationKind.REPLACE} or restart.moves(op)
    if moves and s.topology.mode is Mode.STOP_RESTART:
        return _closed(op, OperationState.FAILED, "mode stop-restart moves nothing", unix_now)
    present = next((now for now in s.operations if now.id == op.id), None)
    if present is not None and op.kind is OperationKind.RESTART:
        op = restart.next_turn(s, op)
        if why := restart.amiss(s, op):
            return _closed(op, OperationState.FAILED, why, unix_now)
    if present is not None and is_done(s, op):
        return _closed(op, OperationState.DONE, _DONE[op.kind].format(node=op.node), unix_now)
    if op.deadline_unix_s and unix_now >= op.deadline_unix_s:
        return _closed(op, OperationState.FAILED, f"deadline reached: {op.message or 'not begun'}", unix_now)
    if present is None:
        message = f"waits for an older operation on {op.node}"
    else:
        message = restart.counted(op, _doing(s, restart.as_replacement(op)))
    return op if message == op.message else replace(op, message=message)


def is_done(s: Situation, op: Operation) -> bool:
    """Whether what the operator asked for is so."""
    match op.kind:
        case OperationKind.PAUSE:
            return s.topology.paused
        case OperationKind.RESUME:
            return not s.topology.paused
        case OperationKind.TRANSFER:
            return op.node == s.policy.me  # only the leader asks
        case OperationKind.RESTART:
            return op.turn >= len(op.targets)
        case _:
            return drain.is_done(op, s.topology, s.nodes)


_DONE = {
    OperationKind.DRAIN: "{node} serves nothing, holds no copy and stays cordoned",
    OperationKind.CORDON: "{node} gets no new duty; what it serves stays",
    OperationKind.UNDRAIN: "{node} takes part again",
    OperationKind.REPLACE: "{node} is replaced",
    OperationKind.TRANSFER: "{node} leads",
    OperationKind.PAUSE: "nothing is repaired or moved until it is resumed",
    OperationKind.RESUME: "failures are repaired again",
    OperationKind.RESTART: "{node}: every process is a fresh one, of the same code and settings",
}


def _closed(op: Operation, state: OperationState, message: str, unix_now: float) -> Operation:
    return replace(op, state=state, message=message, finished_unix_s=unix_now)


def _doing(s: Situation, op: Operation) -> str:
    """One line for people; it changes with each phase and not more often."""
    if op.kind is OperationKind.TRANSFER:
        there = op.node in s.policy.peers.candidates
        return f"handing over to {op.node}" if there else f"{op.node} is no candidate just now"
    if s.topology.paused and op.kind is not OperationKind.RESUME:
        return "automation is paused"
    if op.kind is OperationKind.RESTART:
        return restart.doing(s, op)
    places = {(w.pipeline, w.stage): w for w in wants_of(s, op)}
    for p in s.topology.pipelines:
        if p.move is not None and (p.id, p.move.stage) in places:
            return f"moving {p.id}/{p.move.stage} to {p.move.to.node}"
    for (pipeline, stage), want in places.items():
        return f"{pipeline}/{stage} is next" if want.to else f"nobody is free to take {pipeline}/{stage} over"
    if op.node in s.emptying and drain.holds_copies(s.topology, op.node):
        return f"moving the copies on {op.node} elsewhere"
    if op.kind is OperationKind.REPLACE and op.substitute is None:
        if s.nodes.usable(op.node) is None or makes_way(op, s.nodes):
            view = s.nodes.views.get(op.node)
            unfit = (
                f": {view.why_not}" if view is not None and view.unfit and not makes_way(op, s.nodes) else ""
            )
            return f"waiting for a fresh process of {op.node}{unfit}"
        if not drain.is_done(op, s.topology, s.nodes):
            return f"handing back to {op.node}"
        return f"waiting for the copies of what {op.node} serves"
    return "nearly done"
