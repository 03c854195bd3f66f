"""All choices of one HTTP request while they are generated, and how they end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from controlplane.contract.requests import Log, Sampling, Token
from web.gateway.errors import ApiError, of_fail
from web.gateway.lives import LEFT, SLOW_S, OpenLife
from web.gateway.request_memory import Hold
from web.gateway.routing.delivery_queue import DeliveryQueue, Gone, Leaving
from web.gateway.routing.events import Fail, SubmitAsked
from web.gateway.service import Service
from web.gateway.text.choice_decoder import ChoiceDecoder, Piece, TextRules

TRACE_CHARS_MAX = 128
REPLAY_TOKENS = 256  # detokenized in one go, a few milliseconds


class ClientGone(Exception):
    """The client disconnected: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice that is to be generated."""

    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Start:
    """Where the generation of one choice begins."""

    rid: int
    context: bytes | None = None  # see Submit
    resumed: bool = False
    log: Log | None = None  # as its scheduler has it
    have: int = 0  # tokens that the client has
    finished: bool = False  # it has all of them
    reasoning_tokens: int = 0  # of these, if it is finished
    reader: int = 0  # see Submit


class Generation:
    """Submits every choice, turns what comes back into pieces, and frees everything on `close`."""

    def __init__(
        self,
        service: Service,
        plans: Sequence[Plan],
        rules: TextRules,
        priority: int,
        starts: Sequence[Start],
        hold: Hold,
        life: OpenLife,
        told_again: bool = False,
    ) -> None:
        """`told_again`: the last event tells the whole answer with its log probabilities. A log has none, so that a
        stream that goes on here is brought again from its first token; and each token is a piece, so that what is told
        does not depend on how many come together."""
        self.queue = DeliveryQueue(service.dispatcher.readers, hold)
        self.plans = plans
        self.tells_cached = service.prompt_tokens_details
        self.leaving = False  # the gateway was told to stop
        self._service = service
        self._priority = priority
        self._starts = starts
        self._told_again = told_again
        self._left = [0] * len(plans)  # tokens of each choice that have left, of what is told again
        self._charged: set[int] = set()  # prompts, which their choices share
        self._rules = rules
        self._hold = hold
        self._life = life
        self._example: dict[str, str] | None = None
        self._started = time.perf_counter()
        self._last_at = [self._started] * len(plans)

    @cached_property
    def choices(self) -> list[ChoiceDecoder]:
        """Made when they are first asked for: of a new request that is while its scheduler has it already."""
        tokenizer = self._service.model.tokenizer
        choices = [ChoiceDecoder(tokenizer, plan.prompt, self._rules) for plan in self.plans]
        for choice, start in zip(choices, self._starts, strict=True):
            if start.finished:
                choice.restore_end(start.have, start.reasoning_tokens)
        return choices

    @property
    def finished(self) -> bool:
        for choice in self.choices:  # noqa: SIM110 - asked for each token, and `all` costs three times as much
            if not choice.finished:
                return False
        return True

    def known(self) -> Iterator[tuple[int, Piece]]:
        """What the client has and we know: text and format go on from there. Before `start`."""
        for index, start in enumerate(self._starts):
            for first in range(0, len(known := self._known(start)), REPLAY_TOKENS):
                tokens = [Token(start.rid, first + k, t) for k, t in enumerate(known[first:][:REPLAY_TOKENS])]
                yield index, self._push_silent(index, tokens)

    def start(self) -> None:
        """Hand all choices to the router. Raises ApiError when one is refused at once (after `close`)."""
        self._life.open()
        for index, (plan, start) in enumerate(zip(self.plans, self._starts, strict=True)):
            if start.finished or (start.have and self.choices[index].finished):
                continue
            asked = SubmitAsked(
                start.rid,
                plan.prompt,
                plan.sampling,
                self._priority,
                start.context,
                resumed=start.resumed,
                emitted=self._known(start),
                home=start.log.pipeline if start.log else None,
                reader=start.reader,
                reader_age_s=max(0.0, time.time() - start.reader / 1e6),
            )
            self._service.dispatcher.submit(self.queue, index, asked)

    def _known(self, start: Start) -> tuple[int, ...]:
        known = start.log is not None and not (start.finished or self._told_again)
        return start.log.emitted[: start.have] if start.log and known else ()

    def take(self) -> list[tuple[int, Piece]]:
        """What has come since. Raises ApiError and ClientGone."""
        pieces = []
        for item in self.queue.take():
            if isinstance(item, Gone):
                self._service.metrics.disconnects.inc()
                self._life.fail(LEFT, "its client left")
                raise ClientGone
            if isinstance(item, ApiError):
                raise item
            if isinstance(item, Leaving):
                self.leaving = True
                continue
            index, effect = item
            if isinstance(effect, Fail):
                raise of_fail(effect.code, effect.message, effect.retry_after_s)
            tokens = effect.tokens
            if self._told_again:
                pieces += [(index, piece) for piece in self._one_by_one(index, tokens)]
                continue
            if (silent := self._starts[index].have - self.choices[index].tokens) > 0:
                pieces.append((index, self._push_silent(index, tokens[:silent])))
                tokens = tokens[silent:]
            if tokens and not self.choices[index].finished:
                pieces.append((index, self._push(index, tokens)))
        return pieces

    def keep(self, size: int) -> None:
        """So many bytes of the answer stay until it is over. Raises ApiError."""
        self._hold.grow(size)

    def close(self) -> None:
        """Free what is still running, and what waits: on a disconnect, an error, or a stop string in another choice."""
        self._life.end(sum(choice.tokens for choice in self.choices), time.time())
        for start in self._starts:
            self._service.dispatcher.cancel(start.rid, self.queue)
        self.queue.close()

    def traced(self, parent: str) -> None:
        """`parent`: the client's `traceparent`."""
        self._life.trace = parent[:TRACE_CHARS_MAX]
        self._example = self._life.example

    def failed(self, status: int, message: str) -> None:
        """Its client is told so."""
        self._life.fail(status, message)

    def leave(self) -> None:
        """What is still running goes on for the client's next gateway."""
        self._life.fail(200, "sent to another gateway: this one was told to stop")
        for start in self._starts:
            self._service.dispatcher.leave(start.rid, self.queue)

    def _one_by_one(self, index: int, tokens: Sequence[Token]) -> Iterator[Piece]:
        """Silent as far as the client has them: those have left together with their text, as they do here."""
        have = self._starts[index].have
        for token in tokens:
            if self.choices[index].finished:
                return
            had = self._left[index] < have
            piece = self.choices[index].push((token,)) if had else self._push(index, (token,))
            self._left[index] += len(piece.tokens)
            piece.silent = had and self._left[index] <= have
            yield piece

    def _uncharged(self, index: int) -> int:
        """Tokens of a prompt with its first choice, and none with the others: as usage has it."""
        prompt = self.plans[index].prompt
        if id(prompt) in self._charged:
            return 0
        self._charged.add(id(prompt))
        return len(prompt)

    def _push_silent(self, index: int, tokens: Sequence[Token]) -> Piece:
        return self.choices[index].restore(tokens)

    def _push(self, index: int, tokens: Sequence[Token]) -> Piece:
        choice, metrics = self.choices[index], self._service.metrics
        first = choice.tokens == 0
        if (
            first
            and self.plans[index].sampling.prompt_logprobs is not None
            and tokens[0].prompt_scores is None
        ):
            raise ApiError(
                503, "a node of an older release has no log probabilities of prompts", retry_after_s=5
            )
        piece = choice.push(tokens)
        now = time.perf_counter()
        if first:
            metrics.ttft.observe(now - self._started, self._example)
            self._life.first_token(now - self._started)
            metrics.prompt_tokens.inc(len(self.plans[index].prompt))
            self._hold.charge(self._uncharged(index), len(piece.tokens))
        else:
            waited_s = now - self._last_at[index]
            metrics.tokens.waited(waited_s, self._example)
            if waited_s >= SLOW_S:
                self._life.waited(index, waited_s, time.time())
            self._hold.charge(0, len(piece.tokens))
        self._last_at[index] = now
        metrics.tokens.given += len(piece.tokens)
        if piece.finish is not None:
            metrics.success.labels(piece.finish).inc()
            self._life.finishes[index] = piece.finish
            metrics.e2e.observe(now - self._started, self._example)
            # A stop string ends it here, not there.
            self._service.dispatcher.cancel(self._starts[index].rid, self.queue)
        return piece


def count_error(service: Service, error: ApiError) -> None:
    """Every error answer passes here once."""
    service.metrics.errors.labels(str(error.status)).inc()
    if error.status in (429, 503):
        service.metrics.rejections.labels("overloaded" if error.status == 429 else "unavailable").inc()
