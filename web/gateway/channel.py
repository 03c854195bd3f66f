"""How an HTTP request hears what happens to its choices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from web.gateway.events import Deliver, Fail

log = structlog.get_logger()


class Gone:
    """The client disconnected."""


class Leaving:
    """The gateway was told to stop: streams go on at another one."""


Item = tuple[int, Deliver] | tuple[int, Fail] | Gone | Leaving


class Readers:
    """Calls the readers of channels that have something new: all in one go, once in a turn of the loop.

    A scheduler's message has tokens for many streams. Readers are never called from within `put`, since what they do (a
    stop string cancels a request) may lead back to the dispatcher.
    """

    def __init__(self) -> None:
        self._channels: list[Channel] = []

    def call(self, channel: Channel) -> None:
        if not self._channels:
            asyncio.get_running_loop().call_soon(self._run)
        self._channels.append(channel)

    def _run(self) -> None:
        channels, self._channels = self._channels, []
        for channel in channels:
            try:
                channel.read()
            except Exception:  # of one stream: the others go on
                log.exception("the reader of a channel failed")


class Channel:
    """Items of one HTTP request, in order, until its reader takes them; bounded by the tokens it may have."""

    __slots__ = ("_called", "_items", "_reader", "_readers")

    def __init__(self, readers: Readers) -> None:
        self._items: list[Item] = []
        self._readers = readers
        self._reader: Callable[[], None] | None = None
        self._called = False

    def put(self, item: Item) -> None:
        self._items.append(item)
        if not self._called and self._reader is not None:
            self._called = True
            self._readers.call(self)

    def take(self) -> list[Item]:
        """Everything that is there."""
        items, self._items = self._items, []
        return items

    def attach(self, reader: Callable[[], None] | None) -> None:
        """From now on `reader` is called for new items, and not for those that are there; None: nobody is."""
        self._reader = reader

    def read(self) -> None:
        self._called = False
        if self._reader is not None:
            self._reader()
