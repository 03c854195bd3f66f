"""When a leader gives way because another candidate hears clearly more nodes than it does.

A leader that hears few condemns nobody for it (evidence.py), and so it mends little. All candidates tell each other
through etcd how many of the registered nodes they hear: it is the one place that whoever may lead can reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MORE_MIN = 2  # nodes, for a leader that hears anybody ...
MORE_SHARE = (
    1 / 8
)  # ... and of what it hears itself: counts are told with a sixteenth of slack (`worth_telling`)
AGAIN_S = 10.0  # who gave way and leads again does not give way sooner than that, doubled each time ...
AGAIN_MAX_S = 300.0
SETTLED = 3  # ... until it has led undisputed for so many times what it waits before it gives way


def clearly_more(theirs: int, mine: int) -> bool:
    return theirs - mine >= (max(MORE_MIN, mine * MORE_SHARE) if mine else 1)


def worth_telling(count: int, told: int) -> bool:
    """Whether a candidate's count has changed enough to be written: storms must not fill etcd's log."""
    return abs(count - told) >= max(1, told // 16)


@dataclass(slots=True)
class Handover:
    """One controller's memory of it. `after_s`: how long another one has to hear clearly more."""

    after_s: float
    _better_since: float | None = None
    _undisputed_since: float | None = None
    _began_at: float = 0.0  # of this leadership
    _times: int = 0  # given way, of late

    def began(self, now: float) -> None:
        self._better_since, self._undisputed_since, self._began_at = None, None, now

    def weigh(self, mine: int, others: Mapping[str, int], now: float) -> str:
        """Why this leader should give way now, or nothing. `others`: what the other candidates hear. Ask each tick."""
        best = max(others, key=lambda name: (others[name], name), default="")
        if not best or not clearly_more(others[best], mine):
            self._better_since = None
            if self._undisputed_since is None:
                self._undisputed_since = now
            if now - self._undisputed_since >= SETTLED * self.after_s:
                self._times = 0
            return ""
        self._undisputed_since = None
        if self._better_since is None:
            self._better_since = now
        pause_s = min(AGAIN_S * 2 ** (self._times - 1), AGAIN_MAX_S) if self._times else 0.0
        if now - self._better_since < self.after_s or now - self._began_at < pause_s:
            return ""
        self._times += 1
        return f"{best} hears {others[best]} nodes, this one {mine}"
