"""What controllers compare between nodes: how long steps take, by their size, and how long timers are overdue; and for
how long a computation has stood still."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.reports import StepTimes

LOOK_MAX_S = 0.25  # what the time between two looks at a computation counts for at most
SPENT_MAX_S = 20.0  # processor time alone is taken for progress for so long
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


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a computation was found by one look at it."""

    number: int  # which computation it is
    beats: int  # pieces of work that the kernels have done; -1: it is not in the kernels
    spent_s: float  # processor time of its thread, which counts where it is not in the kernels


@dataclass(slots=True)
class Standstill:
    """For how long a computation has not advanced, however long it takes: a hung one is told from a slow one.

    In the kernels only pieces of work count, since a loop without end also uses the processor. Outside (sampling,
    copies) there is nothing else to go by, so processor time counts there, for `SPENT_MAX_S`. Time in which nobody
    looked does not count: then this process did not run, and the computation did not either."""

    still_s: float = 0.0
    _was: Progress | None = None
    _at: float = 0.0
    _spending_s: float = 0.0  # with nothing but processor time as a sign of life

    def look(self, now: float, progress: Progress | None) -> None:
        """`progress` None: nothing computes."""
        passed_s, self._at = min(now - self._at, LOOK_MAX_S), now
        was, self._was = self._was, progress
        if progress is None or was is None or (was.number, was.beats) != (progress.number, progress.beats):
            self.still_s = self._spending_s = 0.0
        elif progress.beats < 0 and progress.spent_s > was.spent_s and self._spending_s < SPENT_MAX_S:
            self.still_s = 0.0
            self._spending_s += passed_s
        else:
            self.still_s += passed_s


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
