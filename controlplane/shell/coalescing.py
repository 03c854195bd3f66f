"""How long news waits for more of its kind before it is decided upon: as a network card coalesces interrupts."""

from __future__ import annotations

from dataclasses import dataclass

# Of what a decision takes: news waits so long ...
SHARE = 0.5
WAIT_S_MAX = 0.05
# ... and on, while more comes within so long after what came last ...
GAP_SHARE = 0.25
# ... but not longer than two decisions would take, one without what is still to come and one with it.
SHARE_MAX = 2.0
COMING_S_MAX = 0.15
FORGET = 0.9  # a decision that had effects replaces the longest one so far, less a tenth for each since


@dataclass(slots=True)
class Coalescing:
    """Deaths come in company: ends of streams first, then what neighbours say of them, from hundreds of hosts. The
    first of it alone costs a large group a plan, and what that plan lacks waits for the next one and another write.

    Seconds of a monotonic clock.
    """

    _since: float | None = None  # there has been news
    _news: int = 0
    _last: float = 0.0  # when the newest came
    _decision_s: float = 0.0  # what a decision with effects takes

    def due_at(self, now: float, news: int, writing: bool) -> float:
        """When what is news at `now` is to be decided upon. `news`: how much it is by now; `writing`: a decision could
        write nothing before the answer to another write has come."""
        if self._since is None:
            self._since = now
        if news != self._news:
            self._news, self._last = news, now
        if writing:
            return self._since + WAIT_S_MAX
        alone = self._since + min(WAIT_S_MAX, SHARE * self._decision_s)
        coming = self._last + min(WAIT_S_MAX, GAP_SHARE * self._decision_s)
        return min(max(alone, coming), self._since + min(COMING_S_MAX, SHARE_MAX * self._decision_s))

    def decided(self, began: float, ended: float, effects: bool) -> None:
        self._since, self._news = None, 0
        if effects:
            self._decision_s = max(ended - began, FORGET * self._decision_s)
