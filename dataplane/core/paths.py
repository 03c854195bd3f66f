"""How a node's reports reach each controller: through the relay of its host, or on a stream of its own.

The relay is trusted while it answers, and for the controllers that it names in its answers. Where it fails, the node
reports by itself at once; it returns after a quiet while, which doubles each time, so that a relay that comes and goes
costs a few streams and no flapping. Each controller has a while of its own, since a relay may be cut off from one. For
that while it hears the node on both ways. No clock and no socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

ANSWER_BEATS = 2  # an answer that is due for so many heartbeats will not come
NEW_BEATS = 5  # a relay finds a controller as soon as its nodes do; it gets so long to be heard by it
QUIET_FIRST_S = 1.0
QUIET_MAX_S = 60.0
# A relay that was stopped answers before the controllers hear it. They are to have heard it when the node's own stream
# ends: that takes one of its beats.
QUIET_BEATS = 3


@dataclass(slots=True)
class _Way:
    """To one controller."""

    since: float  # it may be waited for
    beat_s: float  # how often it wants to hear a sender
    carried: float | None = None  # since when the relay is heard there without a break
    alone: float | None = None  # since when the relay does it alone
    failures: int = 0  # of that

    def lose(self, now: float) -> bool:
        """The relay is not heard there. Returns whether it was."""
        if self.alone is not None:
            self.failures = 1 if now - self.alone >= QUIET_MAX_S else self.failures + 1
        lost = self.carried is not None
        self.carried = self.alone = None
        return lost

    @property
    def quiet_s(self) -> float:
        doubled_s = QUIET_FIRST_S * 2.0 ** min(max(self.failures - 1, 0), 30)
        return max(min(doubled_s, QUIET_MAX_S), QUIET_BEATS * self.beat_s)


class Paths:
    """`own` are the addresses that need a stream of the node's own. Call `look` at each heartbeat."""

    def __init__(self, heartbeat_s: float, now: float, relay: bool = True) -> None:
        self.own: set[str] = set()
        self._heartbeat_s = heartbeat_s
        self._ways: dict[str, _Way] = {}  # by address
        self._heard_by: frozenset[str] = frozenset()
        self._relay = relay  # its stream stands, or is just being opened
        self._owed: deque[float] = deque()  # when each batch that it has not answered was sent
        self._answered = 0
        self._looked = now

    def overdue(self, now: float) -> bool:
        """Whether the relay owes an answer for too long. Until it comes, nothing more is sent to it."""
        return bool(self._owed) and now - self._owed[0] >= ANSWER_BEATS * self._heartbeat_s

    def set_controllers(self, addresses: Iterable[str], now: float) -> None:
        ways = self._ways
        self._ways = {address: ways.get(address) or _Way(now, self._heartbeat_s) for address in addresses}
        self._settle(now)

    def paced(self, address: str, beat_s: float) -> None:
        """This controller wants to hear each of its senders so often."""
        if address in self._ways:
            self._ways[address].beat_s = beat_s

    def opening(self) -> None:
        """A stream to the relay is being opened."""
        self._owed.clear()
        self._answered = 0

    def sent(self, now: float) -> None:
        self._owed.append(now)

    def answered(self, count: int, heard_by: Iterable[str], now: float) -> bool:
        """The relay has taken `count` batches of this stream. True if a controller is new to it."""
        if not self._relay:
            self._relay = True
            for way in self._ways.values():
                way.since = now
        for _ in range(min(count - self._answered, len(self._owed))):
            self._owed.popleft()
        self._answered = max(count, self._answered)
        before, self._heard_by = self._heard_by, frozenset(heard_by)
        self._settle(now)
        return not self._heard_by <= before

    def broken(self, now: float) -> None:
        """The stream to the relay ended, or could not be opened."""
        self._relay, self._heard_by = False, frozenset()
        self._owed.clear()
        self._settle(now)

    def look(self, now: float) -> None:
        away_s = now - self._looked - self._heartbeat_s
        self._looked = now
        if away_s > self._heartbeat_s / 2:
            # This process did not get to run: answers may have come that it has not read yet.
            self._owed = deque(sent + away_s for sent in self._owed)
        self._settle(now)

    def _settle(self, now: float) -> None:
        answers = self._relay and not self.overdue(now)
        for address, way in self._ways.items():
            if not answers or address not in self._heard_by:
                lost = way.lose(now)
                if lost or not answers or now - way.since >= NEW_BEATS * self._heartbeat_s:
                    self.own.add(address)
                continue
            if way.carried is None:
                way.carried = now
            if address in self.own and now - way.carried >= way.quiet_s:
                self.own.remove(address)
            if address not in self.own and way.alone is None:
                way.alone = now
        self.own.intersection_update(self._ways)
