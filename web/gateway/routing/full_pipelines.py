"""Which pipelines have refused requests for load of late (pure).

In a full group a request need not go round all of them to be refused. A refusal counts for requests of as many tokens
or more, since one for its size says nothing of smaller ones, and for a short while: room comes with any stream that
ends, also with those of other gateways. It does not decide where a request goes first, only when it was tried enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from controlplane.contract.ids import PipelineId
from controlplane.contract.requests import Sampling
from controlplane.contract.topology import Pipeline

TRIES_MAX = 16  # so many pipelines are asked whatever is known; after that only those that may have room
FULL_S = 0.5  # half of what clients are told to wait at least: who comes again then is tried everywhere


class FullPipelines:
    def __init__(self) -> None:
        self._reached: dict[PipelineId, Pipeline] = {}
        self._others: dict[PipelineId, Pipeline] = {}  # ... of which no refusal is known
        # When, and the fewest tokens that were refused then; the oldest first.
        self._refusals: dict[PipelineId, tuple[float, int]] = {}

    def among(self, reached: Iterable[Pipeline]) -> None:
        """Those that can be reached are others now."""
        self._reached = {pipeline.id: pipeline for pipeline in reached}
        self._refusals = {name: one for name, one in self._refusals.items() if name in self._reached}
        self._others = {name: p for name, p in self._reached.items() if name not in self._refusals}

    def refused(self, name: PipelineId, tokens: int, sampling: Sampling, now: float) -> None:
        """A request of so many tokens was refused there. One that takes much room beside its tokens says nothing of
        others."""
        self._expire(now)
        heavy = sampling.logit_bias or sampling.bad_words or sampling.grammar
        if name not in self._reached or heavy or sampling.prompt_logprobs is not None:
            return
        before = self._refusals.get(name)
        if before is None or tokens <= before[1]:
            self._refusals.pop(name, None)
            self._refusals[name] = now, tokens
            self._others.pop(name, None)

    def has_room(self, name: PipelineId) -> None:
        """A stream ended there, or it has begun anew."""
        if self._refusals.pop(name, None) is not None:
            self._others[name] = self._reached[name]

    def maybe_open(self, tokens: int, now: float) -> Iterator[Pipeline]:
        """Those that are not known to be full for a request of so many tokens."""
        self._expire(now)
        yield from self._others.values()
        for name, (_, fewest) in self._refusals.items():
            if tokens < fewest:
                yield self._reached[name]

    def _expire(self, now: float) -> None:
        while self._refusals:
            name, (at, _) = next(iter(self._refusals.items()))
            if at + FULL_S > now:
                return
            self.has_room(name)
