"""What traced requests go through at their schedulers, as spans (pure): queue, prefill, decode, and every pause.

One span a phase, never one a token. Times are monotonic seconds. It is told what schedulers are told and what they want
done, and decides nothing; requests that are not traced cost a look in a dictionary, and none where none is traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controlplane.contract.ids import PipelineId
from controlplane.contract.requests import Submit, Token

TRACED_MAX = 4096  # requests at a time; more are not traced
STEPS_MAX = 32  # of a request's prompt that stages make spans of

Told = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    parent: str  # `Submit.trace`
    began: float
    ended: float
    told: Told = field(default_factory=dict)
    error: str = ""  # how it went wrong


@dataclass(slots=True)
class _Traced:
    parent: str
    pipeline: PipelineId
    session: int
    prompt: int  # tokens
    emitted: int  # before it came here
    since: float  # when its present phase began
    phase: str = "queue"
    last: float = 0.0  # its last token
    tokens: int = 0
    cached: int = 0
    steps: int = 0  # with rows of its prompt
    stopped: float | None = None  # when something befell it: until its next token it pauses
    cause: str = ""


class Spans:
    """Of the schedulers of one node. Every method returns the spans that have ended by it."""

    def __init__(self) -> None:
        self.left_out = 0
        self._traced: dict[int, _Traced] = {}

    def __bool__(self) -> bool:
        return bool(self._traced)

    def submitted(self, message: Submit, session: int, now: float) -> None:
        """A scheduler has it. Said again of one that it had already, nothing begins anew."""
        if not message.trace:
            return
        if (known := self._traced.get(message.rid)) is not None and known.pipeline == message.pipeline:
            known.session = session
            return
        if len(self._traced) >= TRACED_MAX:
            self.left_out += 1
            return
        prompt, emitted = len(message.prompt), len(message.emitted)
        self._traced[message.rid] = _Traced(message.trace, message.pipeline, session, prompt, emitted, now)

    def issued(self, rids: Iterable[int], now: float) -> tuple[list[Span], tuple[str, ...]]:
        """A step has rows of these. Also the parents of those whose prompts are in it: stages make spans of it."""
        spans, parents = [], []
        for rid in rids:
            if (one := self._traced.get(rid)) is None:
                continue
            if one.phase == "queue":
                spans.append(self._end(one, now))
                one.phase, one.since = "prefill", now
            if one.phase == "prefill" and one.steps < STEPS_MAX:
                one.steps += 1
                parents.append(one.parent)
        return spans, tuple(dict.fromkeys(parents))

    def delivered(self, tokens: Iterable[Token], now: float) -> list[Span]:
        """Tokens go to gateways."""
        spans: list[Span] = []
        for token in tokens:
            if (one := self._traced.get(token.rid)) is None or token.position < one.emitted + one.tokens:
                continue  # not traced, or told again
            if one.stopped is not None:
                began = one.last or one.stopped
                told = {"kevlarflow.cause": one.cause, "kevlarflow.pipeline": one.pipeline}
                spans.append(Span("pause", one.parent, began, now, told))
                one.stopped = None
            if one.phase != "decode":
                one.cached = token.cached
                spans.append(self._end(one, now))
                one.phase, one.since = "decode", now
            one.tokens += 1
            one.last = now
            if token.finish is not None:
                del self._traced[token.rid]
                spans.append(self._end(one, now, finish=token.finish.value))
        return spans

    def stopped(self, pipeline: PipelineId, cause: str, now: float, rid: int | None = None) -> None:
        """Something befell a pipeline, or one request of it."""
        for each, one in self._traced.items():
            if one.pipeline == pipeline and (rid is None or each == rid) and one.phase != "queue":
                if one.stopped is None:
                    one.stopped, one.cause = now, cause
                elif cause not in one.cause and len(one.cause) < 300:
                    one.cause += f"; {cause}"

    def gone(
        self, rid: int, why: str, now: float, session: int | None = None, *, error: bool = False
    ) -> list[Span]:
        """Refused, cancelled or given up. `session`: whose it is to be, if another reader's does not count."""
        one = self._traced.get(rid)
        if one is None or session not in (None, one.session):
            return []
        del self._traced[rid]
        return [self._end(one, now, why=why, error=error)]

    def ended(self, pipeline: PipelineId, why: str, now: float) -> list[Span]:
        """Its scheduler is here no more."""
        rids = [rid for rid, one in self._traced.items() if one.pipeline == pipeline]
        return [span for rid in rids for span in self.gone(rid, why, now)]

    def running(self, pipeline: PipelineId) -> list[int]:
        """Those that have had a row and wait for nothing that is known."""
        return [
            rid
            for rid, one in self._traced.items()
            if one.pipeline == pipeline and one.phase != "queue" and one.stopped is None
        ]

    def _end(self, one: _Traced, now: float, finish: str = "", why: str = "", error: bool = False) -> Span:
        """Of the phase that it is in."""
        told: dict[str, str | int] = {"kevlarflow.pipeline": one.pipeline}
        match one.phase:
            case "queue" if one.emitted:
                told["kevlarflow.emitted_tokens"] = one.emitted
            case "prefill":
                told["gen_ai.usage.input_tokens"] = one.prompt
                told["gen_ai.usage.cache_read.input_tokens"] = one.cached
            case "decode":
                told["gen_ai.usage.output_tokens"] = one.tokens
        if finish:
            told["gen_ai.response.finish_reasons"] = finish
        if why:
            told["kevlarflow.end"] = why
        return Span(one.phase, one.parent, one.since, now, told, why if error else "")
