"""What is wrong with the service as this gateway sees it, in words (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from controlplane.contract.ids import PipelineId
from controlplane.contract.topology import Pipeline
from web.gateway.routing.live_request import LiveRequest

SILENT_S = 2.0  # a pipeline that has requests and brings no token


def troubles(
    pipelines: Iterable[Pipeline],
    reachable: Callable[[Pipeline], bool],
    live: Iterable[LiveRequest],
    now: float,
) -> Iterator[str]:
    """One line for each pipeline that is down, or each thing in which one that serves is not as it should be."""
    newest: dict[PipelineId, float] = {}
    for request in live:
        if request.pipeline is not None and request.sent_to is not None:
            at = max(request.last_token_at, request.sent_at, newest.get(request.pipeline, 0.0))
            newest[request.pipeline] = at
    for pipeline in pipelines:
        if not pipeline.up:
            empty = ", ".join(str(i) for i, stage in enumerate(pipeline.stages) if not stage.ranks)
            yield f"{pipeline.id} is down: {f'nobody serves stage {empty}' if empty else 'it has no stages'}"
            continue
        if not reachable(pipeline):
            yield f"{pipeline.id}: its scheduler on {pipeline.scheduler} cannot be reached"
        for index, stage in enumerate(pipeline.stages):
            if borrowed := [m.node for m in stage.ranks if m.node not in stage.homes]:
                yield f"{pipeline.id}: stage {index} is served by {', '.join(borrowed)} for {', '.join(stage.homes)}"
        if pipeline.id in newest and now - newest[pipeline.id] >= SILENT_S:
            yield f"{pipeline.id} has brought no token for {now - newest[pipeline.id]:.1f} s"
