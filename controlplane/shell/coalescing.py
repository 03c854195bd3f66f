"""How long news waits for more of its kind before it is decided upon: as a network card coalesces interrupts."""

from __future__ import annotations

from dataclasses import dataclass

# Of what a decision takes: it is made earlier by so much at most, and without what comes meanwhile.
SHARE = 0.5
WAIT_S_MAX = 0.05
FORGET = 0.9  # a decision that had effects replaces the longest one so far, less a tenth for each since


@dataclass(slots=True)
class Coalescing:
    """Deaths come in company: ends of streams first, then what neighbours say of them, from hundreds of hosts. The
    first of it alone costs a large group a plan, and what that plan lacks waits for the next one and another write.

    Seconds of a monotonic clock.
    """

    _since: float | None = None  # there has been news
    _decision_s: float = 0.0  # what a decision with effects takes

    def due_at(self, now: float, writing: bool) -> float:
        """When what is news at `now` is to be decided upon. `writing`: a decision could write nothing before the
        answer to another write has come."""
        if self._since is None:
            self._since = now
        return self._since + (WAIT_S_MAX if writing else min(WAIT_S_MAX, SHARE * self._decision_s))

    def decided(self, began: float, ended: float, effects: bool) -> None:
        self._since = None
        if effects:
            self._decision_s = max(ended - began, FORGET * self._decision_s)
