"""Emptying a node: what drain, cordon, undrain and replace want moved, and what they edit in the topology.

drain     avoid the node, move what it serves and the copies it holds away, keep it cordoned.
cordon    no new duty; what it serves stays, and its copies do until there is another place for them.
undrain   lift the cordon; hand-back does the rest.
replace   avoid this process of the node, move its duties away, retire it; a fresh process gets them handed back.
          --with X: move its home stages to X, then make X their home and cordon the node. Homes change last, so
          that a cancelled replace goes back to what was.
"""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.core.demote import relief
from controlplane.core.edit import successor, with_stage
from controlplane.core.gather import gather
from controlplane.core.membership import Nodes
from controlplane.core.placement import takers
from controlplane.core.policy import HAND_BACK, Situation, Want


def makes_way(op: Operation, nodes: Nodes) -> bool:
    """Whether the process that `op` wants to be rid of is still the node's newest."""
    view = nodes.views.get(op.node)
    return view is not None and view.member.incarnation == op.incarnation


def empties(op: Operation, nodes: Nodes) -> bool:
    """Whether `op` wants its node to hold nothing."""
    match op.kind:
        case OperationKind.DRAIN:
            return True
        case OperationKind.REPLACE:
            return op.substitute is not None or makes_way(op, nodes)
        case _:
            return False


def wants(s: Situation) -> list[Want]:
    """Every (pipeline, stage) that should be served by somebody else than now; what is first wins."""
    if s.topology.mode is Mode.STOP_RESTART:
        return []
    found: dict[tuple[str, int], Want] = {}
    for op in s.operations:
        for want in wants_of(s, op):
            found.setdefault((want.pipeline, want.stage), want)
    for want in relief(s):
        found.setdefault((want.pipeline, want.stage), want)
    for pipeline in s.pipelines:
        for index, stage in enumerate(pipeline.stages):
            if stage.leader is None or len(stage.homes) != 1 or stage.leader.node in stage.homes:
                continue
            home = stage.homes[0]
            if s.nodes.usable(home) is not None and home not in s.avoid:
                found.setdefault((pipeline.id, index), Want(pipeline.id, index, (home,), HAND_BACK))
    for want in gather(s):
        found.setdefault((want.pipeline, want.stage), want)
    return list(found.values())


def wants_of(s: Situation, op: Operation) -> Iterable[Want]:
    """What one operation wants moved."""
    if op.node not in s.emptying:
        return
    for pipeline in s.pipelines:
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


def edit(s: Situation, op: Operation) -> Topology | None:
    """What an operation on a node changes in the topology itself, beside moves; None: nothing (yet)."""
    t = s.topology
    match op.kind:
        case OperationKind.DRAIN | OperationKind.CORDON:
            return successor(t, cordoned=(*t.cordoned, op.node)) if op.node not in t.cordoned else None
        case OperationKind.UNDRAIN:
            return successor(t, cordoned=set(t.cordoned) - {op.node}) if op.node in t.cordoned else None
        case OperationKind.REPLACE:
            return _retire(s, op) if op.substitute is None else _new_home(s, op, op.substitute)
        case _:
            return None


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
    """Whether what the operator asked for a node is so, by the topology and the registrations."""
    match op.kind:
        case OperationKind.DRAIN:
            bare = not topology.serving(op.node) and not holds_copies(topology, op.node)
            return op.node in topology.cordoned and bare
        case OperationKind.CORDON:
            return op.node in topology.cordoned
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
        case _:
            return False
