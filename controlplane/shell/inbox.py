"""The ordered, bounded queue of events in front of the controller."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from controlplane.core.events import CoreEvent

INBOX_LEN_MAX = 4096
# What is no news may wait so long for more of its kind: hundreds of hosts beat at a time of their own each, and to wake
# the controller costs as much as to take a beat in. It adds to a silence, and is short beside all limits of one.
CALM_S = 0.01


class _Source:
    """What waits in the inbox of one kind of sender: its bound is its own, so that no kind takes another's room."""

    __slots__ = ("_len_max", "_room", "waiting")

    def __init__(self, len_max: int) -> None:
        self.waiting = 0
        self._len_max = len_max
        self._room = asyncio.Event()

    async def admit(self, events: int) -> None:
        """All of them at once, as soon as there is room for one: the bound is exceeded by a message of each sender."""
        while self.waiting >= self._len_max:
            self._room.clear()
            await self._room.wait()
        self.waiting += events

    def taken(self) -> None:
        self.waiting -= 1
        if self.waiting == self._len_max - 1:
            self._room.set()


class Inbox:
    """Outside sources wait when there is too much of them (gRPC and the watch then slow their senders down): reports
    for reports, and the watch on etcd for itself alone. Hundreds of streams compete for the room that reports have, and
    a watch among them would get one event in each time: nodes that have registered would be known minutes later.

    Our own answers and news (`put_own`) never wait: there are at most as many as effects, streams and terms
    of leadership under way, and waiting for ourselves would be a deadlock.
    """

    def __init__(self, len_max: int = INBOX_LEN_MAX) -> None:
        self._reports = _Source(len_max)
        self._watched = _Source(len_max)
        self._events: deque[tuple[CoreEvent, _Source | None]] = deque()
        self._filled = asyncio.Event()
        self._waking = False  # for what is no news

    def __len__(self) -> int:
        return len(self._events)

    async def put(self, *events: CoreEvent, calm: bool = False) -> None:
        """What one message of a node or relay brings. `calm`: nothing in it is news."""
        await self._reports.admit(len(events))
        if calm and not self._filled.is_set():
            self._events.extend([(event, self._reports) for event in events])
            if not self._waking:
                self._waking = True
                asyncio.get_running_loop().call_later(CALM_S, self._wake)
        else:
            self._append(events, self._reports)

    async def put_watched(self, event: CoreEvent) -> None:
        """What etcd's watch tells."""
        await self._watched.admit(1)
        self._append((event,), self._watched)

    def put_own(self, event: CoreEvent) -> None:
        self._append((event,), None)

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
        event, source = self._events.popleft()
        if source is not None:
            source.taken()
        return event

    def _wake(self) -> None:
        self._waking = False
        if self._events:
            self._filled.set()

    def _append(self, events: Sequence[CoreEvent], source: _Source | None) -> None:
        self._events.extend((event, source) for event in events)
        self._filled.set()
