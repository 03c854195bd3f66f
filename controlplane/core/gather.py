"""Borrowed stages go where they slow the fewest pipelines down.

A node that serves two pipelines slows both. Who takes a dead node's place is decided at once, by who has the copy: with
failures in two instances the ring then makes three or four pipelines share nodes, where these two could share with each
other, each with a node of the other one's. A planned move mends that, once everything has been calm for a while: until
then the node that died may be back, and what it served is handed back to it. A spare is better still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from controlplane.contract.ids import NodeId
from controlplane.contract.topology import Mode, Pipeline, Topology
from controlplane.core.membership import NodeView
from controlplane.core.placement import free_members, served_counts, takers
from controlplane.core.policy import GATHER, Situation, Want


@dataclass(frozen=True, slots=True)
class _Place:
    pipeline: Pipeline
    stage: int
    node: NodeId  # that serves it


def gather(s: Situation) -> Iterator[Want]:
    """One want at most: two such moves at once could each undo what the other is for. None where nothing is copied:
    whoever runs would be computed again."""
    if s.topology.mode is not Mode.REPLICATE:
        return
    if s.now - s.policy.timers.calm_since < s.policy.limits.gather_s:
        return
    begun = [p for p in s.pipelines if p.move is not None and p.move.reason == GATHER]
    sharing = _Sharing(s.topology)
    helpers: dict[int, list[NodeView]] = {}
    idle: dict[int, bool] = {}
    for place in _borrowed(s, begun or s.pipelines):
        if place.stage not in helpers:
            free = (s.nodes.views[m.node] for m in free_members(s, place.stage))
            helpers[place.stage] = [v for v in free if not v.demoted and sharing.may_help(v.member.node)]
            idle[place.stage] = any(sharing.counts[v.member.node] == 0 for v in helpers[place.stage])
        if not sharing.may_gain(place, idle[place.stage]):
            continue
        able = [
            member.node
            for member in takers(
                s,
                place.pipeline,
                place.stage,
                keep_kv=True,
                counts=sharing.counts,
                among=helpers[place.stage],
            )
        ]
        gains = {node: sharing.gain(place, node) for node in able}
        best = max(gains.values(), default=0)
        if best > 0:
            to = [node for node in able if gains[node] == best]
            yield Want(place.pipeline.id, place.stage, tuple(to), GATHER)
            return


def slowed(topology: Topology) -> int:
    """How many pipelines have a stage on a node that serves more than one."""
    return len(_Sharing(topology).slowed)


class _Sharing:
    """How many pipelines have a stage on a node that serves more than one, and what a move would change of it."""

    def __init__(self, topology: Topology) -> None:
        self.counts = served_counts(topology)
        self._on: dict[NodeId, list[Pipeline]] = {}
        for pipeline in topology.pipelines:
            for member in pipeline.members():
                self._on.setdefault(member.node, []).append(pipeline)
        # Where each pipeline that is slowed shares a node.
        self._shared = {
            p.id: shared
            for p in topology.pipelines
            if (shared := {m.node for m in p.members() if self.counts[m.node] > 1})
        }
        self.slowed = self._shared.keys()

    def may_gain(self, place: _Place, idle: bool) -> bool:
        """False where no move away from that place's node helps anybody. Only who is slowed by that node alone can be
        helped: its own pipeline by who is `idle`, if anybody, and another one where these two share the node."""
        alone = {place.node}
        if idle and self._shared.get(place.pipeline.id) == alone:
            return True
        others = (p for p in self._on.get(place.node, ()) if p.id != place.pipeline.id)
        return self.counts[place.node] == 2 and any(self._shared.get(p.id) == alone for p in others)

    def may_help(self, node: NodeId) -> bool:
        """False for those on which a stage would slow one more pipeline down: at best another one less is slowed."""
        if self.counts[node] == 0:
            return True
        return self.counts[node] == 1 and self._on[node][0].id in self.slowed

    def gain(self, place: _Place, to: NodeId) -> int:
        """How many pipelines fewer would be slowed if `to` served that place."""
        near = {p.id: p for p in (*self._on.get(place.node, ()), *self._on.get(to, ()), place.pipeline)}
        before = sum(p in self.slowed for p in near)
        self.counts[place.node] -= 1
        self.counts[to] += 1
        after = 0
        for pipeline in near.values():
            nodes = [m.node for m in pipeline.members()]
            if pipeline.id == place.pipeline.id:
                nodes = [to if node == place.node else node for node in nodes]
            after += self._shares(nodes)
        self.counts[place.node] += 1
        self.counts[to] -= 1
        return before - after

    def _shares(self, nodes: list[NodeId]) -> bool:
        return any(self.counts[node] > 1 for node in nodes)


def _borrowed(s: Situation, pipelines: Sequence[Pipeline]) -> Iterator[_Place]:
    """Stages that their homes cannot serve for now. A move that has begun is the only one of its pipeline."""
    for pipeline in pipelines:
        for index, stage in enumerate(pipeline.stages):
            if len(stage.ranks) != 1 or len(stage.homes) != 1 or not pipeline.up:
                continue
            if pipeline.move is not None and (pipeline.move.reason, pipeline.move.stage) != (GATHER, index):
                continue
            home, node = stage.homes[0], stage.ranks[0].node
            back = s.nodes.usable(home) is not None and home not in s.avoid
            if node != home and not back:
                yield _Place(pipeline, index, node)
