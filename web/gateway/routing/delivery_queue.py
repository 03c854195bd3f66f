"""How an HTTP request hears what happens to its choices.

What a client does not read waits here. It counts as memory of that client, and where there is no room for it, the
answer ends with an error: a scheduler cannot be held back for one of its streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import structlog

from web.gateway.errors import ApiError
from web.gateway.request_memory import Hold
from web.gateway.routing.events import Deliver, Fail

log = structlog.get_logger()


class Gone:
    """The client disconnected."""


class Leaving:
    """The gateway was told to stop: streams go on at another one."""


Item = tuple[int, Deliver] | tuple[int, Fail] | Gone | Leaving | ApiError

WAITING_FREE = 64 << 10  # bytes that are not counted, and that leave in one go
TOKEN_BYTES = 330  # a token that waits, alone in its message
TOP_BYTES = 120  # each of the most likely ones beside it


class Readers:
    """Calls the readers of queues that have something new: all in one go, after the event that brought it.

    A scheduler's message has tokens for many streams. Readers are never called from within `put`, since what they do (a
    stop string cancels a request) may lead back to the dispatcher.
    """

    def __init__(self) -> None:
        self._queues: list[DeliveryQueue] = []
        self._gathering = False

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """What comes within the block is read at its end; without one, in the next turn of the loop."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False
            self._run()

    def call(self, queue: DeliveryQueue) -> None:
        if not (self._queues or self._gathering):
            asyncio.get_running_loop().call_soon(self._run)
        self._queues.append(queue)

    def _run(self) -> None:
        queues, self._queues = self._queues, []
        for queue in queues:
            try:
                queue.read()
            except Exception:  # of one stream: the others go on
                log.exception("the reader of a queue failed")


class DeliveryQueue:
    """Items of one HTTP request, in order, until its reader takes them. `hold` grows with what waits."""

    __slots__ = ("_called", "_held", "_hold", "_items", "_reader", "_readers", "_waiting", "full")

    def __init__(self, readers: Readers, hold: Hold) -> None:
        self._items: deque[Item] = deque()
        self._readers = readers
        self._reader: Callable[[], None] | None = None
        self._called = False
        self._hold = hold
        self._waiting = 0  # bytes, about
        self._held = 0  # of these
        # What waited has been given up, and nothing more is taken in: there is only the error.
        self.full = False

    def put(self, item: Item) -> None:
        if isinstance(item, tuple):
            if self.full:
                return
            self._waiting += _size(item)
            self._items.append(item)
            if self._waiting > WAITING_FREE:
                self._weigh()
        elif isinstance(item, Gone):
            self._give_up(item)
        else:
            self._items.append(item)
        self._call()

    def take(self) -> Iterable[Item]:
        """What is there, or as much of it as may leave in one go: for the rest the reader is called again."""
        if self._waiting <= WAITING_FREE:
            items, self._items, self._waiting = self._items, deque(), 0
            return items
        taken: list[Item] = []
        size = 0
        while self._items and size < WAITING_FREE:
            taken.append(item := self._items.popleft())
            size += _size(item)
        self._waiting -= size
        self._weigh()
        if self._items:
            self._call()
        return taken

    def close(self) -> None:
        """Nobody reads it any more."""
        self._reader = None
        self._give_up(Gone())

    def attach(self, reader: Callable[[], None] | None) -> None:
        """From now on `reader` is called for new items, and not for those that are there; None: nobody is."""
        self._reader = reader

    def read(self) -> None:
        self._called = False
        if self._reader is not None:
            self._reader()

    def _call(self) -> None:
        if not self._called and self._reader is not None:
            self._called = True
            self._readers.call(self)

    def _give_up(self, item: Item) -> None:
        """Nothing but `item` is left to be said."""
        self.full, self._items, self._waiting = True, deque([item]), 0
        self._weigh()

    def _weigh(self) -> None:
        """Hold what waits now; where there is no room for it, give it up."""
        held = max(0, self._waiting - WAITING_FREE)
        try:
            if held > self._held:
                self._hold.grow(held - self._held)
            elif held < self._held:
                self._hold.shrink(self._held - held)
            self._held = held
        except ApiError as error:
            text = f"the answer has to wait for its client, and there is no room for it: {error.message}"
            self._give_up(ApiError(error.status, text, retry_after_s=error.retry_after_s))


def _size(item: Item) -> int:
    """Bytes, about."""
    if isinstance(item, tuple) and isinstance(item[1], Deliver) and (tokens := item[1].tokens):
        return len(tokens) * (TOKEN_BYTES + TOP_BYTES * len(tokens[0].top))
    return 0
