"""All choices of one HTTP request while they are generated, and how they end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.contract.requests import Sampling
from web.gateway.channel import Channel, Gone
from web.gateway.choice import Choice, Piece, TextRules
from web.gateway.errors import ApiError, of_fail
from web.gateway.events import Deliver, Fail
from web.gateway.service import Service


class ClientGone(Exception):
    """The client disconnected: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice that is to be generated."""

    prompt: tuple[int, ...]
    sampling: Sampling


class Generation:
    """Submits every choice, turns what comes back into pieces, and frees everything on `close`."""

    def __init__(self, service: Service, plans: Sequence[Plan], rules: TextRules, priority: int) -> None:
        self.channel = Channel()
        self.plans = plans
        self._service = service
        self._priority = priority
        self.choices = [Choice(service.model.tokenizer, plan.prompt, rules) for plan in plans]
        self._rids: list[int] = []
        self._started = time.perf_counter()
        self._last_at = [0.0] * len(plans)

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    def start(self) -> None:
        """Hand all choices to the router. Raises ApiError when one is refused at once (after `close`)."""
        for index, plan in enumerate(self.plans):
            self._rids.append(
                self._service.dispatcher.submit(
                    self.channel, index, plan.prompt, plan.sampling, self._priority
                )
            )

    async def take(self, timeout_s: float) -> list[tuple[int, Piece]]:
        """What has come since; empty when nothing came in time. Raises ApiError and ClientGone."""
        pieces = []
        for item in await self.channel.take(timeout_s):
            if isinstance(item, Gone):
                self._service.metrics.disconnects.inc()
                raise ClientGone
            index, effect = item
            if isinstance(effect, Fail):
                raise of_fail(effect.code, effect.message, effect.retry_after_s)
            if not self.choices[index].finished:
                pieces.append((index, self._push(index, effect)))
        return pieces

    def close(self) -> None:
        """Free what is still running: on a disconnect, an error, or a stop string in another choice."""
        for rid in self._rids:
            self._service.dispatcher.cancel(rid)

    def _push(self, index: int, effect: Deliver) -> Piece:
        choice, metrics = self.choices[index], self._service.metrics
        first = choice.tokens == 0
        piece = choice.push(effect.tokens)
        now = time.perf_counter()
        if first:
            metrics.ttft.observe(now - self._started)
            metrics.prompt_tokens.inc(len(self.plans[index].prompt))
        else:
            metrics.itl.observe(now - self._last_at[index])
        self._last_at[index] = now
        metrics.generation_tokens.inc(len(piece.tokens))
        if piece.finish is not None:
            metrics.success.labels(piece.finish).inc()
            metrics.e2e.observe(now - self._started)
            self._service.dispatcher.cancel(self._rids[index])  # a stop string ends it here, not there
        return piece


def count_error(service: Service, error: ApiError) -> None:
    """Every error answer passes here once."""
    service.metrics.errors.labels(str(error.status)).inc()
    if error.status in (429, 503):
        service.metrics.rejections.labels("overloaded" if error.status == 429 else "unavailable").inc()
