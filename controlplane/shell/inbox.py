"""The ordered, bounded queue of events in front of the controller."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from controlplane.core.events import CoreEvent

INBOX_LEN_MAX = 4096


class Inbox:
    """Outside sources wait when it is full (gRPC and the watch then slow their senders down).

    Our own answers and news (`put_own`) never wait: there are at most as many as effects, streams and terms
    of leadership under way, and waiting for ourselves would be a deadlock.
    """

    def __init__(self, len_max: int = INBOX_LEN_MAX) -> None:
        self._len_max = len_max
        self._outside = 0  # events of outside sources
        self._events: deque[tuple[CoreEvent, bool]] = deque()
        self._room = asyncio.Event()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    async def put(self, *events: CoreEvent) -> None:
        """All of them at once, as soon as there is room for one: the bound is exceeded by a message of each source."""
        while self._outside >= self._len_max:
            self._room.clear()
            await self._room.wait()
        self._outside += len(events)
        self._append(events, outside=True)

    def put_own(self, event: CoreEvent) -> None:
        self._append((event,), outside=False)

    async def wait(self, limit_s: float) -> None:
        """Until there is an event, `limit_s` at most."""
        if not self._events:
            self._filled.clear()
            # A timer that sets the event costs a fraction of asyncio.timeout, and this runs for every wake-up.
            timer = asyncio.get_running_loop().call_later(max(0.0, limit_s), self._filled.set)
            await self._filled.wait()
            timer.cancel()

    async def get(self, limit_s: float) -> CoreEvent | None:
        """The oldest event, or None when none came within `limit_s`."""
        await self.wait(limit_s)
        return self.pop()

    def pop(self) -> CoreEvent | None:
        """The oldest event, or None when there is none."""
        if not self._events:
            return None
        event, outside = self._events.popleft()
        if outside:
            self._outside -= 1
            if self._outside == self._len_max - 1:
                self._room.set()
        return event

    def _append(self, events: Sequence[CoreEvent], *, outside: bool) -> None:
        self._events.extend((event, outside) for event in events)
        self._filled.set()
