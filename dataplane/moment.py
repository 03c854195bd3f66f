"""What time it is for code that handles what an emulated device or network has brought.

Emulated time may run N times faster than the clock, so that one machine does in an hour what N-fold as many would, each
busy with its own. What is real would then count N-fold, and so would the wait for a processor that other nodes use. So
whoever handles an emulated event lives in a time that goes on from when the event was due, by the processor time that
it takes itself, which counts once. At time scale 1, and where nothing is emulated, it is the clock's time.
"""

from __future__ import annotations

import time


class Moment:
    """One for a process, like its clock; `begin` and `end` within one turn of the loop."""

    def __init__(self) -> None:
        self.time_scale = 1.0
        self._due: float | None = None
        self._spent = 0.0

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        real = time.monotonic()
        if self._due is None:
            return real
        return self._due + self.counted(real - self._due, time.thread_time() - self._spent)

    def begin(self, due: float) -> None:
        """What is handled from here on was due at that time."""
        self._due, self._spent = due, time.thread_time()

    def end(self) -> None:
        self._due = None

    def counted(self, late_s: float, spent_s: float) -> float:
        """What is to be counted of a delay in which this thread had so much of a processor."""
        return late_s if self.time_scale == 1.0 else min(late_s, spent_s) / self.time_scale


MOMENT = Moment()
