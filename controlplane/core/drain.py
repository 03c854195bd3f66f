"""Operators' wishes as desired moves and small edits; an operation's progress is read off the topology alone.

That makes every operation idempotent, resumable by the next leader from etcd, and cancellable: once it is no longer
open, nobody wants its move any more and plan() calls it off.

drain     avoid the node, move what it serves away, keep it cordoned.
undrain   lift the cordon; hand-back does the rest.
replace   avoid this process of the node, move its duties away, retire it; a fresh process gets them handed back.
          --with X: move its home stages to X, then make X their home and cordon the node. Homes change last, so
          that a cancelled replace goes back to what was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.core.demote import relief
from controlplane.core.edit import successor, with_stage
from controlplane.core.membership import Nodes
from controlplane.core.placement import takers
from controlplane.core.policy import HAND_BACK, Situation, Want


def active(operations: Mapping[str, Operation]) -> list[Operation]:
    """Open operations, oldest first, one a node: later ones on the same node wait for their turn."""
    busy: set[NodeId] = set()
    first: list[Operation] = []
    for op in sorted(operations.values(), key=lambda o: (o.created_unix_s, o.id)):
        if not op.open:
            continue
        names = {op.node} if op.substitute is None else {op.node, op.substitute}
        if not names & busy:
            first.append(op)
        busy |= names
    return first


def makes_way(op: Operation, nodes: Nodes) -> bool:
    """Whether the process that `op` wants to be rid of is still the node's newest."""
    view = nodes.views.get(op.node)
    return view is not None and view.member.incarnation == op.incarnation


def avoided(topology: Topology, nodes: Nodes, operations: Mapping[str, Operation]) -> frozenset[NodeId]:
    """Nodes that get no new duty: cordoned ones, those on probation, and those that an open operation is emptying."""
    avoid = set(topology.cordoned) | nodes.demoted
    for op in active(operations):
        emptying = (
            op.kind is OperationKind.DRAIN
            or op.substitute is not None
            or (op.kind is OperationKind.REPLACE and makes_way(op, nodes))
        )
        if emptying:
            avoid.add(op.node)
    return frozenset(avoid)


def wants(s: Situation) -> list[Want]:
    """Every (pipeline, stage) that should be served by somebody else than now; operations before hand-backs."""
    if s.topology.mode is Mode.STOP_RESTART:
        return []
    found: dict[tuple[str, int], Want] = {}
    for op in active(s.policy.operations):
        for want in _wants_of(s, op):
            found.setdefault((want.pipeline, want.stage), want)
    for want in relief(s):
        found.setdefault((want.pipeline, want.stage), want)
    for pipeline in s.topology.pipelines:
        for index, stage in enumerate(pipeline.stages):
            if stage.leader is None or len(stage.homes) != 1 or stage.leader.node in stage.homes:
                continue
            home = stage.homes[0]
            if s.nodes.usable(home) is not None and home not in s.avoid:
                found.setdefault((pipeline.id, index), Want(pipeline.id, index, (home,), HAND_BACK))
    return list(found.values())


def _wants_of(s: Situation, op: Operation) -> Iterable[Want]:
    if op.kind is OperationKind.UNDRAIN or op.node not in s.avoid:
        return
    for pipeline in s.topology.pipelines:
        for index, stage in enumerate(pipeline.stages):
            leader = stage.leader
            if leader is None:
                continue
            if op.substitute is not None and op.node in stage.homes:
                if leader.node != op.substitute:
                    yield Want(pipeline.id, index, (op.substitute,), op.id)
            elif leader.node == op.node:
                able = tuple(m.node for m in takers(s, pipeline, index, keep_kv=False))
                yield Want(pipeline.id, index, able, op.id)


def progress(s: Situation, op: Operation, unix_now: float) -> Operation:
    """The operation as it should stand in etcd now; the same object while nothing changed."""
    if op.kind is not OperationKind.UNDRAIN and s.topology.mode is Mode.STOP_RESTART:
        return _closed(op, OperationState.FAILED, "mode stop-restart moves nothing", unix_now)
    first = op in active(s.policy.operations)
    if first and is_done(op, s.topology, s.nodes):
        return _closed(op, OperationState.DONE, _DONE[op.kind].format(node=op.node), unix_now)
    if op.deadline_unix_s and unix_now >= op.deadline_unix_s:
        return _closed(op, OperationState.FAILED, f"deadline reached: {op.message or 'not begun'}", unix_now)
    message = _doing(s, op) if first else f"waits for an older operation on {op.node}"
    return op if message == op.message else replace(op, message=message)


_DONE = {
    OperationKind.DRAIN: "{node} serves nothing and stays cordoned",
    OperationKind.UNDRAIN: "{node} takes part again",
    OperationKind.REPLACE: "{node} is replaced",
}


def _closed(op: Operation, state: OperationState, message: str, unix_now: float) -> Operation:
    return replace(op, state=state, message=message, finished_unix_s=unix_now)


def _doing(s: Situation, op: Operation) -> str:
    """One line for people; it changes with each phase and not more often."""
    if s.topology.paused:
        return "automation is paused"
    places = {(w.pipeline, w.stage): w for w in _wants_of(s, op)}
    for p in s.topology.pipelines:
        if p.move is not None and (p.id, p.move.stage) in places:
            return f"moving {p.id}/{p.move.stage} to {p.move.to.node}"
    for (pipeline, stage), want in places.items():
        return f"{pipeline}/{stage} is next" if want.to else f"nobody is free to take {pipeline}/{stage} over"
    if op.kind is OperationKind.REPLACE and op.substitute is None:
        if s.nodes.usable(op.node) is None or makes_way(op, s.nodes):
            return f"waiting for a fresh process of {op.node}"
        return f"handing back to {op.node}"
    return "nearly done"


def edit(s: Situation, op: Operation) -> Topology | None:
    """What an operation changes in the topology itself, beside moves; None: nothing (yet)."""
    t = s.topology
    match op.kind:
        case OperationKind.DRAIN:
            return successor(t, cordoned=(*t.cordoned, op.node)) if op.node not in t.cordoned else None
        case OperationKind.UNDRAIN:
            return successor(t, cordoned=set(t.cordoned) - {op.node}) if op.node in t.cordoned else None
        case OperationKind.REPLACE:
            return _retire(s, op) if op.substitute is None else _new_home(s, op, op.substitute)


def _retire(s: Situation, op: Operation) -> Topology | None:
    view = s.nodes.views.get(op.node)
    if view is None or not makes_way(op, s.nodes) or view.member in s.topology.retired:
        return None
    if s.topology.serving(op.node) or holds_copies(s.topology, op.node):
        return None
    return successor(s.topology, retired=(*s.topology.retired, view.member))


def _new_home(s: Situation, op: Operation, substitute: NodeId) -> Topology | None:
    if s.topology.serving(op.node) or not all(
        stage.leader is not None and stage.leader.node == substitute
        for _, _, stage in home_stages(s.topology, op.node)
    ):
        return None
    changed: dict[str, Pipeline] = {}
    for pipeline, index, stage in home_stages(s.topology, op.node):
        homes = tuple(substitute if home == op.node else home for home in stage.homes)
        changed[pipeline.id] = with_stage(changed.get(pipeline.id, pipeline), index, homes=homes)
    if not changed and op.node in s.topology.cordoned:
        return None
    return successor(s.topology, *changed.values(), cordoned=(*s.topology.cordoned, op.node))


def home_stages(topology: Topology, node: NodeId) -> list[tuple[Pipeline, int, Stage]]:
    return [
        (p, i, stage) for p in topology.pipelines for i, stage in enumerate(p.stages) if node in stage.homes
    ]


def holds_copies(topology: Topology, node: NodeId) -> bool:
    return any(m.node == node for p in topology.pipelines for stage in p.stages for m in stage.replicas)


def is_done(op: Operation, topology: Topology, nodes: Nodes) -> bool:
    """Whether what the operator asked for is so, by the topology and the registrations."""
    match op.kind:
        case OperationKind.DRAIN:
            return op.node in topology.cordoned and not topology.serving(op.node)
        case OperationKind.UNDRAIN:
            return op.node not in topology.cordoned
        case OperationKind.REPLACE if op.substitute is not None:
            gone = op.node in topology.cordoned and not topology.serving(op.node)
            return gone and not home_stages(topology, op.node)
        case OperationKind.REPLACE:
            fresh = nodes.usable(op.node)
            if fresh is None or fresh.incarnation == op.incarnation:
                return False
            return op.node in topology.cordoned or all(
                fresh in stage.ranks for _, _, stage in home_stages(topology, op.node)
            )
