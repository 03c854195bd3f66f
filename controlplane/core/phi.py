"""Phi-accrual: how surprising a silence is, given how a member used to speak.

Hayashibara et al., "The phi accrual failure detector" (SRDS 2004), with the logistic approximation of the normal
tail that Akka uses. phi = -log10(P(a heartbeat is later than this)): 1 is wrong once in ten silences, 8 once in 1e8.
On a loaded machine intervals spread, and so the same silence is worth less.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_LEN = 64
PHI_MAX = 100.0


class Arrivals:
    """The last intervals between one member's heartbeats."""

    __slots__ = ("_cap_s", "_expected_s", "_intervals", "_last")

    def __init__(self, expected_s: float, cap_s: float) -> None:
        """`expected_s`: the interval that is agreed; `cap_s`: longer ones are outages and count as this."""
        self._expected_s = expected_s
        self._cap_s = cap_s
        self._intervals: deque[float] = deque([expected_s] * 4, maxlen=WINDOW_LEN)
        self._last: float | None = None

    def heard(self, now: float) -> None:
        """This runs for every heartbeat of everybody: `phi`, for which few are ever asked, does the sums."""
        last, self._last = self._last, now
        if last is None:
            return
        interval = now - last  # without min and max, which are calls
        if interval < 0.0:
            interval = 0.0
        elif interval > self._cap_s:
            interval = self._cap_s
        self._intervals.append(interval)  # the oldest one leaves

    def restart(self) -> None:
        """The next interval says nothing about the member (this process slept, or the stream was reopened)."""
        self._last = None

    def phi(self, silent_s: float) -> float:
        intervals = self._intervals
        usual_s = sum(intervals) / len(intervals)
        variance = sum([(interval - usual_s) ** 2 for interval in intervals]) / len(intervals)
        # Reports sent at once on news make short intervals: they must not make the next full one suspect.
        mean = max(usual_s, self._expected_s)
        deviation = max(math.sqrt(variance), self._expected_s / 2)
        y = (silent_s - mean) / deviation
        exponent = y * (1.5976 + 0.070566 * y * y)
        if exponent > 200.0:
            return PHI_MAX
        tail = 1.0 / (1.0 + math.exp(max(exponent, -200.0)))
        return min(-math.log10(tail), PHI_MAX)
