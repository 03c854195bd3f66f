"""How much of the event loop's time decisions may take."""

from __future__ import annotations

from dataclasses import dataclass

BURST_S = 0.25  # of decisions without a pause: the deaths of a storm do not wait
PAUSE_S_MAX = 0.5  # a process that was stopped in the middle of a decision has not spent that time


@dataclass(slots=True)
class Allowance:
    """Half of the time, after a burst: a leaky bucket. Seconds of a monotonic clock.

    A decision of a large group that forms takes as long as the next reason for one needs to come. Were it made at once,
    again and again, whatever else shares the loop would get a turn only between two of them: a lease needs several
    turns to be renewed, and its loss makes the group start from the beginning.
    """

    _spent_s: float = 0.0  # by decisions, as of `_at`; each second without one makes up for a second of them
    _at: float = 0.0

    @property
    def free_at(self) -> float:
        """When the next decision may begin."""
        return self._at + max(0.0, self._spent_s - BURST_S)

    def spend(self, began: float, ended: float) -> None:
        """A decision was made."""
        spent_s = max(0.0, self._spent_s - (began - self._at)) + ended - began
        self._spent_s = min(spent_s, BURST_S + PAUSE_S_MAX)
        self._at = ended
