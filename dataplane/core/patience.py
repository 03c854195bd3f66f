"""How long a scheduler waits for a step or an answer, and how much it has in flight meanwhile.

What is given up is computed again, so slowness must not be taken for a lost message: the limit follows what steps take.
Before that is known, each step given up doubles the limit and halves the next ones, one at a time, until one comes
back: what it computed counts, however slow the stages are.
"""

from __future__ import annotations

# An unanswered step or question is given up after this; doubled each time in a row. Deaths are the controllers'
# to notice: this is for messages that were lost between the living, and must not be taken for slowness.
STALL_LIMIT_S = 3.0
STALL_LIMIT_MAX_S = 60.0
PATIENCE = 3.0  # times as long as steps take of late: one of twice as many rows comes back in time, too
ROWS_MIN = 16  # of a step: fewer cost as much, and where the message was lost decodes go on together
UNBOUNDED = 1 << 30


class Patience:
    def __init__(self, rows_most: int) -> None:
        self.rows_max = rows_most  # of a step
        self.in_flight_max = UNBOUNDED  # steps
        self._rows_most = rows_most
        self._grown_s = 0.0  # the limit since the last step or question that was given up; 0: as usual

    def limit_s(self, usual_s: float) -> float:
        """After which a step or question is given up, where steps take `usual_s`."""
        return min(max(STALL_LIMIT_S, PATIENCE * usual_s, self._grown_s), STALL_LIMIT_MAX_S)

    def gave_up(self, limit_s: float, rows: int) -> None:
        """Something was not answered within the limit: a step, of which the largest in flight had so many rows, or
        only a question (0)."""
        self._grown_s = 2 * limit_s
        if rows:
            self.rows_max = max(min(ROWS_MIN, self._rows_most), min(rows, self.rows_max) // 2)
            self.in_flight_max = 1

    def came_back(self, rows: int, took_s: float, limit_s: float, microbatches: int) -> None:
        """A step has come back, and so soon that a larger one, or one more beside it, will, too."""
        if not rows or 2 * took_s > limit_s:
            return
        if self.in_flight_max < microbatches:
            self.in_flight_max *= 2
        elif PATIENCE * took_s <= limit_s:
            self._grown_s = 0.0
            if 2 * rows >= self.rows_max:
                self.rows_max = min(2 * self.rows_max, self._rows_most)

    def reset(self) -> None:
        """Other nodes compute from here on."""
        self.rows_max, self.in_flight_max, self._grown_s = self._rows_most, UNBOUNDED, 0.0
