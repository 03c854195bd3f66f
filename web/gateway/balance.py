"""Which pipeline a new request goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from controlplane.contract.ids import PipelineId
from controlplane.contract.topology import Pipeline
from web.gateway.live import Live

LONG = 2  # times the mean length of prompts


def least_loaded(
    pipelines: Sequence[Pipeline], others: Iterable[Live], places: int, prompt_tokens: int
) -> Pipeline:
    """For a prompt of so many tokens: of `pipelines` (at least one), one with a free place; of these the one with the
    fewest prompt tokens to compute, as far as this gateway knows; among equals with the fewest streams, then the fewest
    tokens that these may still bring. Among equals a long prompt goes where the fewest stages are borrowed: it has the
    latest first token as it is, and a borrowed node is far away and has two pipelines to serve.

    A pipeline runs `places` streams at a time: beyond them a new one waits for another to end, which takes longer than
    any prompt. Prompts that wait are what it waits for where there is room. By outstanding tokens, which clients
    overstate anyway, one pipeline queued while the other had room."""
    prompts: Counter[PipelineId] = Counter()
    streams: Counter[PipelineId] = Counter()
    outstanding: Counter[PipelineId] = Counter()
    tokens = count = 0
    for other in others:
        tokens += len(other.log.prompt)
        count += 1
        if other.pipeline is None:
            continue
        streams[other.pipeline] += 1
        outstanding[other.pipeline] += other.log.outstanding
        if not other.log.emitted:
            prompts[other.pipeline] += len(other.log.prompt)

    long = prompt_tokens * count > LONG * tokens

    def load(pipeline: Pipeline) -> tuple[int, int, int, int, int, PipelineId]:
        name = pipeline.id
        queued = max(0, streams[name] + 1 - places)
        detours = borrowed(pipeline) if long else 0
        return queued, prompts[name], detours, streams[name], outstanding[name], name

    return min(pipelines, key=load)


def borrowed(pipeline: Pipeline) -> int:
    """Its stages that somebody else's node serves."""
    return sum(any(m.node not in stage.homes for m in stage.ranks) for stage in pipeline.stages)
