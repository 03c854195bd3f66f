"""Requests that are with no scheduler, and when to look at each of them again (pure).

Hundreds wait while a loaded pipeline is down, and tokens of the others' streams go on coming: an event costs nothing
for a request that it cannot concern. Each is looked at when its own time has come, and all when the world has changed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from web.gateway.routing.live_request import LiveRequest


class Held:
    def __init__(self) -> None:
        self._lives: dict[int, LiveRequest] = {}
        self._at: dict[int, float] = {}  # when to look at a request again
        self._due: list[tuple[float, int]] = []  # heap; an entry that `_at` does not have is void
        self._woken = False

    def __len__(self) -> int:
        return len(self._lives)

    def put(self, live: LiveRequest) -> None:
        """It is with no scheduler: look at it at once."""
        self._lives[live.log.rid] = live
        self.look(live, 0.0)

    def pop(self, rid: int) -> None:
        self._lives.pop(rid, None)
        self._at.pop(rid, None)

    def look(self, live: LiveRequest, at: float) -> None:
        """Look at it again at `at` (seconds, monotonic), unless the world changes before."""
        rid = live.log.rid
        if self._at.get(rid) != at:
            self._at[rid] = at
            heapq.heappush(self._due, (at, rid))

    def wake(self) -> None:
        """What every one of them waits for may have come: a topology, or a stream to a scheduler."""
        self._woken = True

    def due(self, now: float) -> Iterator[LiveRequest]:
        """Those to look at. Each is popped, put or told to `look` before the next one is asked for."""
        if self._woken:
            self._woken = False
            yield from list(self._lives.values())
        while self._due and self._due[0][0] <= now:
            at, rid = heapq.heappop(self._due)
            if self._at.get(rid) == at:
                del self._at[rid]
                yield self._lives[rid]
