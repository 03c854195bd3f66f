"""Instances that go: their stages move off the nodes that are to end, and once their streams have ended they are gone.

A stream stays with its pipeline to its end, wherever the pipeline's stages are: they move to nodes of instances that
stay, KV included, as in a drain. So nothing is computed again, and the nodes may end long before the last stream does.
"""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.topology import Mode, Topology
from controlplane.core.edit import successor
from controlplane.core.placement import Layout, Takers
from controlplane.core.policy import LEAVING, Situation, Want


def departures(s: Situation, layout: Layout) -> Iterator[Want]:
    """Stages on nodes that are to end."""
    leaving = set(s.topology.leaving)
    for pipeline in s.pipelines if leaving else ():
        for index, stage in enumerate(pipeline.stages):
            if stage.leader is not None and stage.leader.node in leaving:
                to = Takers(s, layout, pipeline, index, keep_kv=False)
                yield Want(pipeline.id, index, to, LEAVING)


def remove_closed(s: Situation) -> Topology | None:
    """Pipelines that are closing and have no request left, or that nobody can serve: gateways then bring what they have
    of its streams to others."""
    over = [p.id for p in s.pipelines if p.closing and p.move is None and (not p.up or s.idle(p))]
    return successor(s.topology, removed=over) if over else None


def may_end(topology: Topology) -> bool:
    """Whether those that are to end have nothing left to do."""
    leaving = set(topology.leaving)
    return not any(
        member.node in leaving
        for pipeline in topology.pipelines
        for stage in pipeline.stages
        for member in (*stage.ranks, *stage.replicas)
    )


def moved_away(topology: Topology) -> str:
    """Which stage of a node that is to end moves now, in words; "": none."""
    leaving = set(topology.leaving) if topology.mode is not Mode.STOP_RESTART else set()
    for p in topology.pipelines:
        leader = p.leader_at(p.move.stage) if p.move is not None else None
        if p.move is not None and leader is not None and leader.node in leaving:
            return f"moving {p.id}/{p.move.stage} from {leader.node} to {p.move.to.node}"
    return ""
