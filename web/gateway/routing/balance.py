"""Which pipeline a new request goes to (pure)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from controlplane.contract.ids import PipelineId
from controlplane.contract.topology import Pipeline
from web.gateway.routing.live_request import LiveRequest
from web.gateway.routing.prefixes import Prefixes, places

LONG = 2  # times the mean length of prompts
LOOKED_AT = 16  # pipelines at a time ...
CACHED_WEIGHT = 2  # of a token that need not be computed, against one that waits before it
LOOKS = 4  # ... so often while all their places are taken


@dataclass(slots=True)
class Load:
    """What one pipeline has to do."""

    streams: int = 0
    prompt_tokens: int = 0  # of streams that have no token yet
    outstanding: int = 0  # tokens that its streams may still bring


class Loads:
    """What all pipelines have to do, as far as this gateway knows: kept as requests come, move, go on and end, so that
    to place one costs the same however many there are."""

    def __init__(self) -> None:
        self._loads: dict[PipelineId, Load] = {}
        self._counted: dict[int, tuple[PipelineId | None, int, int]] = {}  # by request: what it added
        self._prompt_tokens = 0  # of all requests
        self._prefixes = Prefixes()

    def count(self, live: LiveRequest) -> None:
        """Account for `live` as it is now."""
        log = live.log
        now = live.pipeline, 0 if log.emitted else len(log.prompt), log.outstanding
        before = self._counted.get(log.rid)
        if before is None:
            self._prompt_tokens += len(log.prompt)
        elif now == before:
            return
        else:
            self._add(before, -1)
        self._counted[log.rid] = now
        self._add(now, 1)
        if live.pipeline is not None and (before is None or before[0] != live.pipeline):
            self._prefixes.sent(self._prefix(live), live.pipeline)

    def drop(self, live: LiveRequest) -> None:
        """`live` is no more, or is about to be placed."""
        before = self._counted.pop(live.log.rid, None)
        if before is not None:
            self._prompt_tokens -= len(live.log.prompt)
            self._add(before, -1)

    def of(self, pipeline: PipelineId) -> Load:
        """What a pipeline has to do."""
        return self._loads.get(pipeline) or Load()

    def choose(
        self,
        pipelines: Sequence[Pipeline],
        fits: Callable[[Pipeline], bool],
        live: LiveRequest,
        places: int,
    ) -> Pipeline | None:
        """The `least` of those that fit; None: none does. Of many a few are looked at, those that have the beginning of
        its prompt and others from a place on that the request's id decides, and more while none of them has room: the
        best of a few is hardly worse than the best of all, and when a pipeline goes down hundreds of requests are
        placed at once."""
        rid, prompt_tokens = live.log.rid, len(live.log.prompt)
        cached = self._prefixes.cached(self._prefix(live))
        count = len(pipelines)
        found = [p for p in pipelines if p.id in cached and fits(p)] if cached else []
        chosen = None
        for start in range(0, count, LOOKED_AT):
            around = range(rid + start, rid + min(start + LOOKED_AT, count))
            found += [pipelines[at % count] for at in around if fits(pipelines[at % count])]
            if not found:
                continue
            chosen = self.least(found, places, prompt_tokens, cached)
            load = self._loads.get(chosen.id)
            if load is None or load.streams < places or start >= LOOKED_AT * (LOOKS - 1):
                break
        return chosen

    def least(
        self, pipelines: Sequence[Pipeline], places: int, prompt_tokens: int, cached: Mapping[PipelineId, int]
    ) -> Pipeline:
        """For a prompt of so many tokens, of which pipelines have `cached`: of `pipelines` (at least one), one with a
        free place; of these the one with the fewest prompt tokens that wait, less CACHED_WEIGHT times what it need not
        compute; among equals with the fewest streams, then the fewest tokens that these may still bring, then the least
        that is known to be cached there. Among equals a long prompt goes where the fewest stages are borrowed: it has
        the latest first token as it is, and a borrowed node is far away and has two pipelines to serve.

        A pipeline runs `places` streams at a time: beyond them a new one waits for another to end, which takes longer
        than any prompt. Prompts that wait are what it waits for where there is room. By outstanding tokens, which
        clients overstate anyway, one pipeline queued while the other had room. What is cached counts more than the wait
        that it saves, since those who come later wait for what is computed again, too."""
        long = prompt_tokens * len(self._counted) > LONG * self._prompt_tokens

        def rank(pipeline: Pipeline) -> tuple[int, int, int, int, int, int, PipelineId]:
            load = self._loads.get(pipeline.id) or Load()
            queued = max(0, load.streams + 1 - places)
            detours = borrowed(pipeline) if long else 0
            waits = load.prompt_tokens - CACHED_WEIGHT * cached.get(pipeline.id, 0)
            share = self._prefixes.share(pipeline.id)
            return queued, waits, detours, load.streams, load.outstanding, share, pipeline.id

        return min(pipelines, key=rank)

    @staticmethod
    def _prefix(live: LiveRequest) -> tuple[bytes, ...]:
        if live.prefix is None:
            live.prefix = places(live.log.prompt, live.log.sampling.cache_salt)
        return live.prefix

    def _add(self, counted: tuple[PipelineId | None, int, int], sign: int) -> None:
        pipeline, prompt_tokens, outstanding = counted
        if pipeline is None:
            return
        load = self._loads.setdefault(pipeline, Load())
        load.streams += sign
        load.prompt_tokens += sign * prompt_tokens
        load.outstanding += sign * outstanding
        if load.streams == 0:  # pipelines come and go, and leave nothing behind
            del self._loads[pipeline]


def borrowed(pipeline: Pipeline) -> int:
    """Its stages that somebody else's node serves."""
    return sum(any(m.node not in stage.homes for m in stage.ranks) for stage in pipeline.stages)
