"""Where the requests of an instance that failed go on, where each has a holder of its KV (LUMEN; pure).

A request goes to its holder unless that is overloaded: unless it has so much more to do than the least loaded instance
that computing the request again there costs less. What overflows goes to the least loaded, greedily, one after the
other. What is computed again enters an instance little by little (`Wave`), so that its own requests keep their pace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from controlplane.contract.ids import PipelineId
from controlplane.contract.loads import work
from controlplane.contract.topology import Pipeline
from web.gateway.routing.balance import Loads
from web.gateway.routing.live_request import LiveRequest

# Tokens of moved requests that an instance has yet to compute, unless it is one request's. What holders have is not
# among them.
WAVE_TOKENS = 2048
WAVE_LIMIT_S = 1.0  # nobody is held back for longer
LOOKED_AT = 16  # instances that are compared for one request, besides its holder: hundreds are placed at once
TAIL_TOKENS = 32  # of a request, that its holder may lack: about two blocks


@dataclass(frozen=True, slots=True)
class Option:
    """An instance that could take a request: what it has to do, and how many requests it runs at a time."""

    pipeline: PipelineId
    requests: int
    prompt_tokens: int  # not computed yet
    places: int

    def cost(self, missing: int) -> tuple[int, int]:
        """Of a request of which `missing` tokens are not there: first that it has to wait for another to end."""
        queued = max(0, self.requests + 1 - self.places)
        return queued, work(self.requests, self.prompt_tokens) + missing


def looked_at(rid: int, count: int) -> Iterator[int]:
    """Which of `count` instances are compared for a request: all, or LOOKED_AT from a place on that its id decides."""
    return iter(range(count)) if count <= LOOKED_AT else ((rid + step) % count for step in range(LOOKED_AT))


def destination(
    options: Iterable[Option], holder: PipelineId | None, tokens: int, *, fixed: bool = False
) -> PipelineId | None:
    """Where a request of `tokens` tokens goes on; None: there are no options. `fixed`: at its holder if that is there,
    whatever it has to do."""
    ranked = [
        (option.cost(min(TAIL_TOKENS, tokens) if option.pipeline == holder else tokens), option.pipeline)
        for option in options
    ]
    if fixed and any(pipeline == holder for _, pipeline in ranked):
        return holder
    return min(ranked, key=lambda each: (each[0], each[1] != holder, each[1]))[1] if ranked else None


@dataclass(slots=True)
class Wave:
    """Moved requests that have been sent to an instance and have no token from there yet."""

    _sent: dict[int, tuple[PipelineId, int]] = field(default_factory=dict)  # by request: where, and tokens
    _tokens: dict[PipelineId, int] = field(default_factory=dict)

    def tokens(self, pipeline: PipelineId) -> int:
        """That it has yet to compute."""
        return self._tokens.get(pipeline, 0)

    def admits(self, pipeline: PipelineId, missing: int, held_s: float) -> bool:
        """Whether so many tokens more may be computed there now, of a request that has been held for so long."""
        waits = self._tokens.get(pipeline, 0)
        return waits == 0 or waits + missing <= WAVE_TOKENS or held_s >= WAVE_LIMIT_S

    def sent(self, rid: int, pipeline: PipelineId, missing: int) -> None:
        self.ended(rid)
        self._sent[rid] = pipeline, missing
        self._tokens[pipeline] = self._tokens.get(pipeline, 0) + missing

    def ended(self, rid: int) -> bool:
        """It has a token, or is not there any more. True: others may come in its place."""
        found = self._sent.pop(rid, None)
        if found is None:
            return False
        pipeline, missing = found
        left = self._tokens[pipeline] - missing
        if left:
            self._tokens[pipeline] = left
        else:
            del self._tokens[pipeline]
        return True


class Recoveries:
    """Brings the requests of instances that failed to where they go on. `fixed`: see `destination`."""

    def __init__(self, wave: Wave, fixed: bool) -> None:
        self.fixed = fixed
        self._wave = wave

    def choose(
        self,
        live: LiveRequest,
        pipelines: Sequence[Pipeline],
        fits: Callable[[Pipeline], bool],
        loads: Loads,
        places: int,
        held_s: float,
    ) -> Pipeline | None:
        """Where an interrupted request, which `loads` does not count, is sent now; None: nowhere yet. `pipelines`:
        those that can be reached."""
        rid, tokens = live.log.rid, len(live.log.prompt) + len(live.log.emitted)
        able = {pipelines[at].id: pipelines[at] for at in looked_at(rid, len(pipelines))}
        able |= {p.id: p for p in pipelines if p.id == live.holder}
        if not any(map(fits, able.values())):  # they have refused it, or spoil its numbers
            able = {p.id: p for p in islice(filter(fits, pipelines), LOOKED_AT)}
        options = []
        for pipeline in filter(fits, able.values()):
            load = loads.of(pipeline.id)
            prompt_tokens = load.prompt_tokens + self._wave.tokens(pipeline.id)
            options.append(Option(pipeline.id, load.streams, prompt_tokens, places))
        chosen = destination(options, live.holder, tokens, fixed=self.fixed)
        if chosen is None:
            return None
        missing = TAIL_TOKENS if chosen == live.holder else tokens
        if not self.fixed and not self._wave.admits(chosen, missing, held_s):
            return None
        self._wave.sent(rid, chosen, missing)
        return able[chosen]
