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
from controlplane.core.placement import served_counts, takers
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
    now = slowed(s.topology)
    for place in _borrowed(s, begun or s.pipelines):
        able = [
            member.node
            for member in takers(s, place.pipeline, place.stage, keep_kv=True)
            if member.node not in s.nodes.demoted and len(s.topology.serving(member.node)) <= 1
        ]
        best = min((slowed(s.topology, place, node) for node in able), default=now)
        if best < now:
            to = [node for node in able if slowed(s.topology, place, node) == best]
            yield Want(place.pipeline.id, place.stage, tuple(to), GATHER)
            return


def slowed(topology: Topology, place: _Place | None = None, to: NodeId = "") -> int:
    """How many pipelines have a stage on a node that serves more than one; if `to` served that place."""
    counts = served_counts(topology)
    if place is not None:
        counts[place.node] -= 1
        counts[to] += 1

    def shares(pipeline: Pipeline) -> bool:
        nodes = [m.node for m in pipeline.members()]
        if place is not None and pipeline.id == place.pipeline.id:
            nodes = [to if node == place.node else node for node in nodes]
        return any(counts[node] > 1 for node in nodes)

    return sum(map(shares, topology.pipelines))


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
