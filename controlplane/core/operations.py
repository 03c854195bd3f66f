"""Operators' wishes: which are under way, how far each is, and what those change that are not moves.

An operation is a value in etcd that says what should be; its progress is read off the topology and the
registrations alone. That makes every operation idempotent, resumable by the next leader, and cancellable: once it is
no longer open nobody wants its moves any more and plan() calls them off.

What each kind is, from its checks to its last words, is one module in kinds/; here nothing depends on the kind.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationState
from controlplane.contract.topology import Mode, Topology
from controlplane.core import kinds
from controlplane.core.membership import Nodes
from controlplane.core.policy import Policy, Situation


def survey(topology: Topology, nodes: Nodes, policy: Policy, now: float) -> Situation:
    """The situation: who is to be avoided follows from the topology, the demotions and the operations under way."""
    operations = tuple(active(policy.operations))
    emptying = frozenset(op.node for op in operations if kinds.of(op).empties(nodes))
    emptying |= set(topology.leaving)
    avoid = emptying | set(topology.cordoned) | nodes.demoted
    return Situation(topology, nodes, policy, now, avoid, emptying, operations=operations)


def active(operations: Mapping[str, Operation]) -> list[Operation]:
    """Open operations, oldest first; later ones that claim the same wait for their turn."""
    busy: set[NodeId] = set()
    first: list[Operation] = []
    for op in sorted(operations.values(), key=lambda o: (o.created_unix_s, o.id)):
        if not op.open:
            continue
        kind = kinds.of(op)
        claims = kind.claims()
        if not claims & busy:
            first.append(kind.stands_as())
        busy |= claims
    return first


# -- what the topology is told ------------------------------------------------------------------------------


def pause(s: Situation) -> Topology | None:
    """What operations ask for before anything else."""
    return next((after for op in s.operations if (after := kinds.of(op).edit_first(s)) is not None), None)


def resume(s: Situation) -> Topology | None:
    """What operations ask for while automation is paused."""
    return next((after for op in s.operations if (after := kinds.of(op).edit_paused(s)) is not None), None)


def operate(s: Situation) -> Topology | None:
    """Cordons, retirements and new homes that operations ask for."""
    return next((after for op in s.operations if (after := kinds.of(op).edit(s)) is not None), None)


def should_resign(s: Situation) -> str:
    """Why this controller, which leads, should hand leadership over now; "" if it should not."""
    return next((why for op in s.operations if (why := kinds.of(op).should_resign(s))), "")


# -- how far they are ---------------------------------------------------------------------------------------


def progress(s: Situation, op: Operation, unix_now: float) -> Operation:
    """The operation as it should stand in etcd now; the same object while nothing changed."""
    kind = kinds.of(op)
    if kind.moves_nodes and s.topology.mode is Mode.STOP_RESTART:
        return _closed(op, OperationState.FAILED, "mode stop-restart moves nothing", unix_now)
    under_way = any(now.id == op.id for now in s.operations)
    if under_way:
        op = kind.advanced(s)
        kind = kinds.of(op)
        if why := kind.amiss(s):
            return _closed(op, OperationState.FAILED, why, unix_now)
        if kind.is_done(s):
            return _closed(op, OperationState.DONE, kind.last_words(), unix_now)
    if op.deadline_unix_s and unix_now >= op.deadline_unix_s:
        return _closed(op, OperationState.FAILED, f"deadline reached: {op.message or 'not begun'}", unix_now)
    if under_way:
        message = kind.counted(_doing(s, kind.stands_as()))
    else:
        message = f"waits for an older operation on {op.node}"
    return op if message == op.message else replace(op, message=message)


def _closed(op: Operation, state: OperationState, message: str, unix_now: float) -> Operation:
    return replace(op, state=state, message=message, finished_unix_s=unix_now)


def _doing(s: Situation, op: Operation) -> str:
    kind = kinds.of(op)
    return "automation is paused" if s.topology.paused and kind.needs_automation else kind.doing(s)
