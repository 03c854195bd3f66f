"""What drain and replace have in common: the duties of a node move away, KV included."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

from controlplane.contract.ids import NodeId
from controlplane.contract.status import Check
from controlplane.contract.topology import Mode, Topology
from controlplane.core.kinds.nodes import OfNode, peers_left
from controlplane.core.placement import Layout, Takers, takers
from controlplane.core.policy import Situation, Want

CAPACITY_WARN = 0.85
Place = tuple[str, int]  # pipeline, stage


class Emptying(OfNode):
    """An operation that wants `op.node` to serve nothing, at least for a while."""

    __slots__ = ()

    @property
    def moves_nodes(self) -> bool:
        return True

    def wants(self, s: Situation, layout: Layout) -> Iterable[Want]:
        op = self.op
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
                    to = Takers(s, layout, pipeline, index, keep_kv=False)
                    yield Want(pipeline.id, index, to, op.id)

    def doing(self, s: Situation) -> str:
        op = self.op
        places = {(w.pipeline, w.stage): w for w in self.wants(s, Layout(s.topology))}
        for p in s.topology.pipelines:
            if p.move is not None and (p.id, p.move.stage) in places:
                return f"moving {p.id}/{p.move.stage} to {p.move.to.node}"
        for (pipeline, stage), want in places.items():
            return (
                f"{pipeline}/{stage} is next"
                if want.to
                else f"nobody is free to take {pipeline}/{stage} over"
            )
        if op.node in s.emptying and holds_copies(s.topology, op.node):
            return f"moving the copies on {op.node} elsewhere"
        return self.doing_when_empty(s)

    def doing_when_empty(self, s: Situation) -> str:
        """As `doing`, once the node holds nothing."""
        return "nearly done"

    def node_checks(self, s: Situation) -> Iterator[Check]:
        if s.topology.mode is Mode.STOP_RESTART:
            yield Check("fail", "mode", "mode stop-restart moves nothing")
            return
        if self.op.substitute is not None:
            yield from self.substitute_checks(self.op.substitute, s)
        for place in s.topology.serving(self.op.node):
            yield from self._takeover(place, s)
        yield from peers_left(s, self.op.node)

    @abstractmethod
    def substitute_checks(self, substitute: NodeId, s: Situation) -> Iterator[Check]:
        """Whether the node that is named can take the other one's place."""

    def switches(self, s: Situation) -> Iterator[str]:
        """Steps of the plan: where each duty goes."""
        for place in s.topology.serving(self.op.node):
            pipeline = s.topology.pipeline(place[0])
            streams = 0 if pipeline is None else s.nodes.load(pipeline)
            copied = s.topology.mode is Mode.REPLICATE
            copy = f"copy {streams} streams of {place[0]}/{place[1]}, " if copied else ""
            to = self._taker(place, s) or "nobody"
            yield f"{copy}switch {place[0]}/{place[1]} to {to} (a new epoch)"

    def _taker(self, place: Place, s: Situation) -> NodeId | None:
        op, pipeline = self.op, s.topology.pipeline(place[0])
        if pipeline is None:
            return None
        able = [m.node for m in takers(s, pipeline, place[1], keep_kv=False)]
        if op.substitute is not None and op.node in pipeline.stages[place[1]].homes:
            able = [node for node in able if node == op.substitute]
        return able[0] if able else None

    def _takeover(self, place: Place, s: Situation) -> Iterator[Check]:
        name, index = place
        node, pipeline, to = self.op.node, s.topology.pipeline(name), self._taker(place, s)
        if pipeline is None:
            return
        if to is None:
            yield Check("fail", "stage", f"{node} serves {name}/{index} and no other node can take it over")
            return
        level = "ok" if to == self.op.substitute else "warn"
        of = len(pipeline.stages)
        yield Check(level, "stage", f"{node} holds stage {index} of {of} for {name}; {to} takes over")
        yield _capacity(node, to, s)
        member = s.nodes.usable(to)
        lag = None if member is None else s.nodes.lag(pipeline, index, member)
        streams = f"{s.nodes.load(pipeline)} streams of {name}"
        if s.topology.mode is Mode.NONE:
            yield Check("warn", "replicas", f"mode none: {streams} are computed again")
        elif not s.nodes.exchange(pipeline.leader_at(index), member):
            yield Check("warn", "replicas", f"{to} has other numerics: {streams} are computed again")
        elif lag is None:
            yield Check("ok", "replicas", f"{to} has no copy yet: {streams} are copied first")
        else:
            yield Check("ok", "replicas", f"{to} is {lag} tokens behind on {streams}")


def holds_copies(topology: Topology, node: NodeId) -> bool:
    return any(m.node == node for p in topology.pipelines for stage in p.stages for m in stage.replicas)


def _capacity(node: NodeId, to: NodeId, s: Situation) -> Check:
    """The taker's own blocks and those of the node, replicas aside: these make room when it is needed."""
    views = s.nodes.views
    here = s.nodes.reports.get(views[node].member) if node in views else None
    there = s.nodes.reports.get(views[to].member)
    if here is None or there is None or there.blocks_total <= 0:
        return Check("warn", "capacity", f"how full {node} and {to} are is not known")
    used = here.blocks_used + there.blocks_used
    share = used / there.blocks_total
    level = "ok" if share <= CAPACITY_WARN else "warn" if share <= 1.0 else "fail"
    return Check(level, "capacity", f"KV on {to} after it {share:.0%} (limit {CAPACITY_WARN:.0%})")
