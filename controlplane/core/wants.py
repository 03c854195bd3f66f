"""Every (pipeline, stage) that should be served by somebody else than now, by whatever wants it."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.contract.ids import PipelineId
from controlplane.contract.topology import Mode
from controlplane.core import kinds
from controlplane.core.closing import departures
from controlplane.core.demote import relief
from controlplane.core.gather import gather
from controlplane.core.placement import Layout
from controlplane.core.policy import HAND_BACK, Situation, Want


def wants(s: Situation) -> Iterator[Want]:
    """One for each place: what is first wins where two want the same. They are found out one after the other, and so is
    where each could go: thousands may want to move at once, and only a few begin."""
    if s.topology.mode is Mode.STOP_RESTART:
        return
    found: set[tuple[PipelineId, int]] = set()
    for want in _every(s):
        if (want.pipeline, want.stage) not in found:
            found.add((want.pipeline, want.stage))
            yield want


def _every(s: Situation) -> Iterator[Want]:
    layout = Layout(s.topology)
    for op in s.operations:
        yield from kinds.of(op).wants(s, layout)
    yield from departures(s, layout)
    yield from relief(s, layout)
    yield from _hand_backs(s)
    yield from gather(s)


def _hand_backs(s: Situation) -> Iterator[Want]:
    """Homes that are back."""
    for pipeline in s.pipelines:
        for index, stage in enumerate(pipeline.stages):
            if stage.leader is None or len(stage.homes) != 1 or stage.leader.node in stage.homes:
                continue
            home = stage.homes[0]
            if s.nodes.usable(home) is not None and home not in s.avoid:
                yield Want(pipeline.id, index, (home,), HAND_BACK)
