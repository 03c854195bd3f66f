"""What controllers compare between nodes: how long steps take, by their size, and how long timers are overdue."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.reports import StepTimes

PAUSE_MAX_S = 0.25  # one long pause is silence, which is judged for itself: it counts for no more than this


@dataclass(slots=True)
class Timeliness:
    """Totals since start of a timer that is set again and again."""

    timed_s: float = 0.0
    overdue_s: float = 0.0  # of that, past its time and its loop not computing: it did not get to run

    def rang(self, set_for_s: float, took_s: float, computed_s: float) -> None:
        """`took_s`: by the clock; `computed_s`: processor time of the loop's thread meanwhile. What the loop itself
        does is no sign of a processor that it does not get."""
        self.timed_s += took_s
        self.overdue_s += min(max(took_s - set_for_s - computed_s, 0.0), PAUSE_MAX_S)


@dataclass(slots=True)
class _Total:
    steps: int = 0
    busy_s: float = 0.0
    tokens: int = 0


class Pace:
    """Totals since start. Steps of one class differ little: tokens within a factor of two, attended keys of four."""

    def __init__(self) -> None:
        self._totals: dict[int, _Total] = {}

    def ran(self, tokens: int, keys: int, took_s: float) -> None:
        """A computation of `tokens` rows that attended to `keys` positions in all has ended."""
        size = tokens.bit_length() << 8 | (keys.bit_length() + 1) // 2
        total = self._totals.get(size)
        if total is None:
            total = self._totals[size] = _Total()
        total.steps += 1
        total.busy_s += took_s
        total.tokens += tokens

    def usual_s(self, tokens: int) -> float:
        """How long a step of so many tokens takes here, scaled up from the nearest size that ran; 0: nothing ran."""
        nearest = min(
            self._totals,
            key=lambda size: (abs((size >> 8) - tokens.bit_length()), -size),
            default=None,
        )
        if nearest is None:
            return 0.0
        total = self._totals[nearest]
        return total.busy_s / total.steps * max(1.0, tokens * total.steps / total.tokens)

    def report(self) -> tuple[StepTimes, ...]:
        return tuple(
            StepTimes(size, total.steps, int(total.busy_s * 1e6)) for size, total in self._totals.items()
        )
