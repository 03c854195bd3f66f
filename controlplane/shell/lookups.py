"""Asking gateways for the lives of requests: each answers with a report of its figures, so that nobody calls it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from controlplane.contract.errors import Unavailable
from controlplane.contract.figures import WANTED_MAX
from controlplane.contract.lives import Life, Lives

ANSWER_LIMIT_S = 4.0  # gateways report every 2 s
LIVES_MAX = 64  # of one request, over all gateways


@dataclass(slots=True)
class _Lookup:
    waiting: set[str]  # gateways that have not answered
    lives: list[Life] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    askers: int = 0


class Lookups:
    """Of one controller."""

    def __init__(self) -> None:
        self._open: dict[str, _Lookup] = {}

    async def find(self, request: str, gateways: Collection[str], limit_s: float = ANSWER_LIMIT_S) -> Lives:
        """What `gateways` know of a request; those that have not answered within `limit_s` are named.

        Raises Unavailable while too many others are looked for."""
        lookup = self._open.get(request)
        if lookup is None:
            if len(self._open) >= WANTED_MAX:
                raise Unavailable(f"{WANTED_MAX} requests are being looked for, as many as may be: try again")
            lookup = self._open[request] = _Lookup(set(gateways))
            if not lookup.waiting:
                lookup.done.set()
        lookup.askers += 1
        try:
            async with asyncio.timeout(limit_s):
                await lookup.done.wait()
        except TimeoutError:
            pass  # who is silent is named
        finally:
            lookup.askers -= 1
            if not lookup.askers:
                del self._open[request]
        lives = sorted(lookup.lives, key=lambda life: life.began_unix_s)
        return Lives(request, tuple(lives), tuple(sorted(lookup.waiting)))

    def wanted(self, gateway: str) -> tuple[str, ...]:
        """Requests that this gateway has not been heard about."""
        return tuple(request for request, lookup in self._open.items() if gateway in lookup.waiting)

    def heard(self, gateway: str, answers: Iterable[Lives]) -> None:
        """A gateway has answered."""
        for answer in answers:
            lookup = self._open.get(answer.request)
            if lookup is None or gateway not in lookup.waiting:
                continue  # too late, or not asked for
            lookup.waiting.discard(gateway)
            lookup.lives += answer.lives[: LIVES_MAX - len(lookup.lives)]
            if not lookup.waiting:
                lookup.done.set()
