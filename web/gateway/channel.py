"""How an HTTP handler waits for what happens to its choices."""

from __future__ import annotations

import asyncio
from collections import deque

from web.gateway.events import Deliver, Fail


class Gone:
    """The client disconnected."""


class Leaving:
    """The gateway was told to stop: streams go on at another one."""


Item = tuple[int, Deliver] | tuple[int, Fail] | Gone | Leaving


class Channel:
    """Items of one HTTP request, in order. One reader; bounded by the tokens that its choices may have."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self, timeout_s: float) -> list[Item]:
        """Everything that is there, at least one item; empty when `timeout_s` passed without any."""
        if not self._items:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _expire, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        items = list(self._items)
        self._items.clear()
        return items


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
