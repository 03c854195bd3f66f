"""The one way to try again: pauses that double, are jittered, bounded and counted. It imports nothing of ours."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Pauses between attempts: `first_s`, then twice as long each time, never above `max_s`.

    Each pause is drawn from its upper half, so that processes that failed together do not come back together.
    """

    __slots__ = ("_delay_s", "attempts", "first_s", "max_s", "total")

    def __init__(self, first_s: float, max_s: float) -> None:
        if not 0 < first_s <= max_s:
            raise ValueError(f"a back-off needs 0 < first_s <= max_s, not {first_s:g} and {max_s:g}")
        self.first_s = first_s
        self.max_s = max_s
        self.attempts = 0  # pauses since the last success
        self.total = 0  # pauses in all, for a counter
        self._delay_s = first_s

    def next_s(self) -> float:
        """How long to pause before the next attempt, in seconds."""
        delay_s = self._delay_s * random.uniform(0.5, 1.0)
        self._delay_s = min(2 * self._delay_s, self.max_s)
        self.attempts += 1
        self.total += 1
        return delay_s

    def succeeded(self) -> None:
        """The next pause is the first one again."""
        self.attempts = 0
        self._delay_s = self.first_s

    async def pause(self, limit_s: float | None = None) -> None:
        """Sleep until the next attempt is due, at most `limit_s` (what is left of a deadline)."""
        delay_s = self.next_s()
        await asyncio.sleep(delay_s if limit_s is None else max(0.0, min(delay_s, limit_s)))
