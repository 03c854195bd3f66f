"""How a node's reports reach each controller: through the relay of its host, or on a stream of its own.

The relay is trusted while it answers, and for the controllers that it names in its answers. Where it fails, the node
reports by itself at once; it returns after a quiet while, which doubles each time, so that a relay that comes and goes
costs a few streams and no flapping. For that while a controller hears the node on both ways. No clock and no socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

ANSWER_BEATS = 2  # an answer that is due for so many heartbeats will not come
NEW_BEATS = 5  # a relay finds a controller as soon as its nodes do; it gets so long to be heard by it
QUIET_FIRST_S = 1.0
QUIET_MAX_S = 60.0


class Paths:
    """`own` are the addresses that need a stream of the node's own. Call `look` at each heartbeat."""

    def __init__(self, heartbeat_s: float, now: float, relay: bool = True) -> None:
        self.own: set[str] = set()
        self._heartbeat_s = heartbeat_s
        self._controllers: dict[str, float] = {}  # address -> since when it may be waited for
        self._heard_by: frozenset[str] = frozenset()
        self._carried: dict[str, float] = {}  # since when the relay is heard there without a break
        self._relay = relay  # its stream stands, or is just being opened
        self._owed: deque[float] = deque()  # when each batch that it has not answered was sent
        self._answered = 0
        self._looked = now
        self._failures = 0
        self._alone_since: float | None = None  # the relay does it all

    def overdue(self, now: float) -> bool:
        """Whether the relay owes an answer for too long. Until it comes, nothing more is sent to it."""
        return bool(self._owed) and now - self._owed[0] >= ANSWER_BEATS * self._heartbeat_s

    def set_controllers(self, addresses: Iterable[str], now: float) -> None:
        self._controllers = {address: self._controllers.get(address, now) for address in addresses}
        self._settle(now)

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
            self._controllers = dict.fromkeys(self._controllers, now)
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
        for address, since in self._controllers.items():
            if answers and address in self._heard_by:
                carried_s = now - self._carried.setdefault(address, now)
                if address in self.own and carried_s >= self._quiet_s():
                    self.own.remove(address)
                continue
            lost = self._carried.pop(address, None) is not None
            if lost or not answers or now - since >= NEW_BEATS * self._heartbeat_s:
                self._fall_back(address, lost, now)
        self.own.intersection_update(self._controllers)
        self._carried = {a: since for a, since in self._carried.items() if a in self._controllers}
        if self.own:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now

    def _fall_back(self, address: str, lost: bool, now: float) -> None:
        if lost and not self.own:
            long = self._alone_since is not None and now - self._alone_since >= QUIET_MAX_S
            self._failures = 1 if long else self._failures + 1
        self.own.add(address)

    def _quiet_s(self) -> float:
        return min(QUIET_FIRST_S * 2.0 ** min(max(self._failures - 1, 0), 30), QUIET_MAX_S)
