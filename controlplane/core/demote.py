"""What follows from a fault that is no death: traffic leaves who is on probation, and faulty processes start afresh."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.topology import Mode, Topology
from controlplane.core.edit import successor
from controlplane.core.placement import Layout, Takers
from controlplane.core.policy import PROBATION, Situation, Want


def relief(s: Situation, layout: Layout) -> Iterator[Want]:
    """Stages served by members on probation, if there is anybody better: nothing is lost in a planned move."""
    for pipeline in s.pipelines:
        for index, stage in enumerate(pipeline.stages):
            if stage.leader is None or stage.leader.node not in s.nodes.demoted:
                continue
            if better := Takers(s, layout, pipeline, index, keep_kv=True, sound=True):
                yield Want(pipeline.id, index, better, PROBATION)


def restart_faulty(s: Situation) -> Topology | None:
    """Processes that answer and do not work: they are named as retired, and their launcher starts fresh ones.

    Not before everybody else has taken over what they served: until then they are dead like others."""
    if s.topology.mode is Mode.STOP_RESTART:
        return None
    newest = {view.member for view in s.nodes.views.values()}
    gone = (s.nodes.faulty & newest) - set(s.topology.retired)
    return successor(s.topology, retired=(*s.topology.retired, *gone)) if gone else None
