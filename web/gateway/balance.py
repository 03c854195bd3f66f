"""Which pipeline a new request goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from controlplane.contract.ids import PipelineId
from controlplane.contract.topology import Pipeline
from web.gateway.live import Live


def least_loaded(pipelines: Sequence[Pipeline], others: Iterable[Live], places: int) -> Pipeline:
    """Of `pipelines` (at least one), one with a free place; of these the one with the fewest prompt tokens to compute,
    as far as this gateway knows; among equals with the fewest streams, then the fewest tokens that these may still
    bring.

    A pipeline runs `places` streams at a time: beyond them a new one waits for another to end, which takes longer than
    any prompt. Prompts that wait are what it waits for where there is room. By outstanding tokens, which clients
    overstate anyway, one pipeline queued while the other had room."""
    prompts: Counter[PipelineId] = Counter()
    streams: Counter[PipelineId] = Counter()
    outstanding: Counter[PipelineId] = Counter()
    for other in others:
        if other.pipeline is None:
            continue
        streams[other.pipeline] += 1
        outstanding[other.pipeline] += other.log.outstanding
        if not other.log.emitted:
            prompts[other.pipeline] += len(other.log.prompt)

    def load(pipeline: Pipeline) -> tuple[int, int, int, int, PipelineId]:
        name = pipeline.id
        queued = max(0, streams[name] + 1 - places)
        return queued, prompts[name], streams[name], outstanding[name], name

    return min(pipelines, key=load)
