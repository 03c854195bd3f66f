"""replace: another node, or a fresh process of the same one, in a node's place.

Without a substitute: avoid this process of the node, move its duties away, retire it; a fresh process gets them handed
back. With one: move the node's home stages to the substitute, then make it their home and cordon the node. Homes change
last, so that a cancelled replace goes back to what was.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from controlplane.contract.events import EventKind
from controlplane.contract.ids import NodeId
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.status import Check, OperationRequest
from controlplane.contract.topology import Pipeline, Topology
from controlplane.core.edit import successor, with_stage
from controlplane.core.kinds.emptying import Emptying, holds_copies
from controlplane.core.kinds.nodes import hand_backs, home_stages
from controlplane.core.membership import Nodes
from controlplane.core.policy import Situation


class Replace(Emptying):
    __slots__ = ()
    kind = OperationKind.REPLACE
    done_words = "{node} is replaced"
    done_event = EventKind.REPLACED

    @classmethod
    def declared(cls, op: Operation, request: OperationRequest, s: Situation) -> Operation:
        view = s.nodes.views.get(op.node)
        if op.substitute is not None or view is None:
            return op
        return replace(op, incarnation=view.member.incarnation)

    def substitute_checks(self, substitute: NodeId, s: Situation) -> Iterator[Check]:
        node = self.op.node
        view, old = s.nodes.views.get(substitute), s.nodes.views.get(node)
        stages = {i for _, i, _ in home_stages(s.topology, node)} or {old.record.stage if old else -1}
        if view is None or not view.usable:
            why = "it never registered" if view is None else view.why_not
            yield Check("fail", "substitute", f"{substitute} cannot serve: {why}")
        elif substitute in s.avoid or view.member in s.topology.retired:
            yield Check("fail", "substitute", f"{substitute} is cordoned, or is {node} itself")
        elif home_stages(s.topology, substitute):
            yield Check("fail", "substitute", f"{substitute} has a home of its own")
        elif stages != {view.record.stage}:
            what = f"{substitute} holds stage {view.record.stage}, not {sorted(stages)}"
            yield Check("fail", "substitute", what)
        else:
            yield Check("ok", "substitute", f"{substitute} is ready and holds the same weights")

    def plan(self, s: Situation) -> Iterator[str]:
        node, substitute = self.op.node, self.op.substitute
        yield from self.switches(s)
        if substitute is not None:
            yield f"{substitute} becomes the home of what was {node}'s; {node} stays cordoned"
        else:
            yield f"retire the process of {node}; its launcher starts a fresh one"
            yield from hand_backs(s.topology, node)

    def makes_way(self, nodes: Nodes) -> bool:
        """Whether the process that is to be got rid of is still the node's newest."""
        view = nodes.views.get(self.op.node)
        return view is not None and view.member.incarnation == self.op.incarnation

    def empties(self, nodes: Nodes) -> bool:
        return self.op.substitute is not None or self.makes_way(nodes)

    def edit(self, s: Situation) -> Topology | None:
        return self._retire(s) if self.op.substitute is None else self._new_home(s, self.op.substitute)

    def _retire(self, s: Situation) -> Topology | None:
        node = self.op.node
        view = s.nodes.views.get(node)
        if view is None or not self.makes_way(s.nodes) or view.member in s.topology.retired:
            return None
        if s.topology.serving(node) or holds_copies(s.topology, node):
            return None
        return successor(s.topology, retired=(*s.topology.retired, view.member))

    def _new_home(self, s: Situation, substitute: NodeId) -> Topology | None:
        node = self.op.node
        if s.topology.serving(node) or not all(
            stage.leader is not None and stage.leader.node == substitute
            for _, _, stage in home_stages(s.topology, node)
        ):
            return None
        changed: dict[str, Pipeline] = {}
        for pipeline, index, stage in home_stages(s.topology, node):
            homes = tuple(substitute if home == node else home for home in stage.homes)
            changed[pipeline.id] = with_stage(changed.get(pipeline.id, pipeline), index, homes=homes)
        if not changed and node in s.topology.cordoned:
            return None
        return successor(s.topology, *changed.values(), cordoned=(*s.topology.cordoned, node))

    def is_done(self, s: Situation) -> bool:
        node, t = self.op.node, s.topology
        if self.op.substitute is not None:
            return node in t.cordoned and not t.serving(node) and not home_stages(t, node)
        fresh = s.nodes.usable(node)
        if fresh is None or fresh.incarnation == self.op.incarnation:
            return False
        return node in t.cordoned or all(fresh in stage.ranks for _, _, stage in home_stages(t, node))

    def doing_when_empty(self, s: Situation) -> str:
        node = self.op.node
        if self.op.substitute is not None:
            return "nearly done"
        makes_way = self.makes_way(s.nodes)
        if s.nodes.usable(node) is None or makes_way:
            view = s.nodes.views.get(node)
            unfit = f": {view.why_not}" if view is not None and view.unfit and not makes_way else ""
            return f"waiting for a fresh process of {node}{unfit}"
        if not self.is_done(s):
            return f"handing back to {node}"
        return f"waiting for the copies of what {node} serves"
