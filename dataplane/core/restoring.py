"""How fast blocks are restored from parity, as a stage that lacked some has seen it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from controlplane.contract.repair import Restoring, middle

KEPT = 8  # restorations that are looked back at


@dataclass(slots=True)
class Pace:
    """One restoration: when it began, and when its blocks came."""

    began: float
    first_at: float = 0.0  # the first blocks, which came together
    last_at: float = 0.0
    blocks: int = 0
    first_blocks: int = 0  # of these, those that came with the first one

    def came(self, now: float) -> None:
        """One more block is here."""
        if not self.blocks:
            self.first_at = now
        self.first_blocks += now == self.first_at
        self.blocks += 1
        self.last_at = now


class RestoreSpeed:
    """The wait for the first blocks, and what each one behind them takes: the first is the way there and back, the
    second what links, stages and encoders get done."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=KEPT)
        self._spans: deque[tuple[int, float]] = deque(maxlen=KEPT)  # blocks, seconds

    def ran(self, pace: Pace) -> None:
        """A restoration is over."""
        if not pace.blocks:
            return
        self._waits.append(pace.first_at - pace.began)
        if pace.blocks > pace.first_blocks:
            self._spans.append((pace.blocks - pace.first_blocks, pace.last_at - pace.first_at))

    @property
    def restoring(self) -> Restoring:
        """The more blocks a restoration had the more it counts."""
        blocks = sum(count for count, _ in self._spans)
        if not blocks:
            return Restoring()
        return Restoring(
            median(self._waits), middle((took_s / count, count) for count, took_s in self._spans), blocks
        )
