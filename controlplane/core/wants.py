"""Every (pipeline, stage) that should be served by somebody else than now, by whatever wants it."""

from __future__ import annotations

from controlplane.contract.topology import Mode
from controlplane.core import kinds
from controlplane.core.closing import departures
from controlplane.core.demote import relief
from controlplane.core.gather import gather
from controlplane.core.policy import HAND_BACK, Situation, Want


def wants(s: Situation) -> list[Want]:
    """What is first wins where two want the same place."""
    if s.topology.mode is Mode.STOP_RESTART:
        return []
    found: dict[tuple[str, int], Want] = {}
    for op in s.operations:
        for want in kinds.of(op).wants(s):
            found.setdefault((want.pipeline, want.stage), want)
    for want in departures(s):
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
