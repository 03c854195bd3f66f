"""The dashboard's live stream: one producer for all clients, and nothing that can pile up.

A client gets the whole status once ("status", with its version) and from then on what changed ("difference", from one
version to the next), which is made once for all. One that reads slowly gets the differences that it missed, or the
whole again, and the events it has not seen, out of one shared ring; the incidents whenever they have changed, and the
figures for charts as they are measured. While nobody watches, nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controlplane.contract.errors import Unavailable
from controlplane.contract.events import Event
from controlplane.contract.figures import Figures
from controlplane.contract.incidents import TOLD_BY
from controlplane.contract.status import ClusterStatus
from web.admin.auth import error
from web.admin.difference import changed, difference, shown
from web.admin.service import AdminService

PERIOD_S = 0.25
FIGURES_S = 2.0  # figures that always change are told so often
# Times as long as a status took to make, until the next: watching costs a tenth of a core at most.
REST = 10.0
DIFFERENCES_KEPT = 16
RING_LEN_MAX = 500
INCIDENTS_MAX = 50
INCIDENTS_REST_S = 1.0  # between two readings of them
CLIENTS_MAX = 32
SEND_LIMIT_S = 10.0  # a client that takes nothing for so long is let go
IDLE_LIMIT_S = 10.0


def event_rows(rows: Sequence[tuple[int, Event]]) -> list[dict[str, object]]:
    """Events as the admin API shows them: the event's fields and its id."""
    return [{"id": number, **msgspec.structs.asdict(event)} for number, event in rows]


def figure_rows(rows: Sequence[Figures]) -> dict[str, object]:
    """Figures as the admin API tells them: their names once, and a list of values for each row."""
    names = Figures.__struct_fields__
    return {"columns": names, "rows": [[getattr(row, name) for name in names] for row in rows]}


class Feed:
    """What the clients share. `version` grows whenever there is something new."""

    def __init__(self, service: AdminService) -> None:
        self._service = service
        self._changed = asyncio.Event()  # set, and replaced by a fresh one, with each new version
        self._version = 0
        self._closed = False
        self._status: ClusterStatus | None = None  # as of `_version`
        # The newest one, and what is shown of it.
        self._seen: tuple[ClusterStatus, ClusterStatus] | None = None
        self._whole = b""  # `_status` in JSON, made when somebody needs it
        # The newest ones, by version.
        self._differences: deque[tuple[int, bytes]] = deque(maxlen=DIFFERENCES_KEPT)
        self._history_error = ""
        self._incidents = b""  # the message
        self._incidents_version = 0
        self._ring: deque[tuple[int, Event]] = deque(maxlen=RING_LEN_MAX)
        self._clients = 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def full(self) -> bool:
        return self._clients >= CLIENTS_MAX

    @contextlib.asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """Keeps the producers running while anybody is inside."""
        self._clients += 1
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._watch_status()),
                asyncio.create_task(self._watch_events()),
            ]
        try:
            yield
        finally:
            self._clients -= 1
            if self._clients == 0:
                tasks, self._tasks = self._tasks, []
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        """End every stream, now: the process is about to exit."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def messages(self, after: int) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one client, who has seen the history up to id `after`.

        Ends when a producer failed: the client connects again.
        """
        seen, told_error, told_incidents, told_figures = 0, "", 0, 0.0
        while not any(task.done() for task in self._tasks):
            try:
                async with asyncio.timeout(IDLE_LIMIT_S):
                    while self._version == seen and not self._closed:
                        await self._changed.wait()
            except TimeoutError:
                continue
            if self._closed:
                return
            missed = [text for version, text in self._differences if version > seen]
            if seen == 0 or len(missed) < self._version - seen:
                missed = [b"event: status\ndata: " + self._snapshot() + b"\n\n"]
            seen = self._version
            for message in missed:
                yield message
            fresh = [row for row in self._ring if row[0] > after]
            if fresh:
                after = fresh[-1][0]
                yield b"event: events\nid: %d\ndata: %s\n\n" % (after, msgspec.json.encode(event_rows(fresh)))
            if self._incidents_version != told_incidents:
                told_incidents = self._incidents_version
                yield self._incidents
            if figures := self._service.figures_now(told_figures):
                told_figures = figures[-1].unix_s
                yield b"event: figures\ndata: " + msgspec.json.encode(figure_rows(figures)) + b"\n\n"
            if self._history_error != told_error:
                told_error = self._history_error
                yield b"event: history\ndata: " + msgspec.json.encode({"error": told_error}) + b"\n\n"

    async def _watch_status(self) -> None:
        figures_at = 0.0
        while True:
            began = time.monotonic()
            figures = began >= figures_at
            if figures:
                figures_at = began + FIGURES_S
            made = await self._service.status()
            self._seen = made, shown(made, self._seen)
            self._advance(self._seen[1], figures)
            self._wake()
            await asyncio.sleep(max(PERIOD_S, REST * (time.monotonic() - began)))

    def _advance(self, status: ClusterStatus, figures: bool) -> None:
        before = self._status
        after = None if before is None else difference(before, status, figures)
        self._version += 1
        self._whole = b""
        if before is None or after is None:
            self._status = status
            self._differences.clear()
        else:
            self._status = after
            text = b"event: difference\ndata: " + changed(before, after, self._version) + b"\n\n"
            self._differences.append((self._version, text))

    def _snapshot(self) -> bytes:
        """The whole status as JSON, with its version."""
        if not self._whole:
            self._whole = b'{"version":%d,' % self._version + msgspec.json.encode(self._status)[1:]
        return self._whole

    async def _watch_events(self) -> None:
        # On its own, because a slow database must not hold the status back.
        last = self._ring[-1][0] if self._ring else 0
        stale, read_at = True, 0.0  # the incidents
        while True:
            try:
                rows = await self._service.events(RING_LEN_MAX, last)
                self._ring.extend(rows)
                last = self._ring[-1][0] if self._ring else 0
                stale = stale or any(event.kind in TOLD_BY for _, event in rows)
                if stale and time.monotonic() - read_at >= INCIDENTS_REST_S:
                    read_at = time.monotonic()
                    await self._read_incidents()
                    stale = False
                self._history_error = ""
            except Unavailable as problem:
                self._history_error = str(problem)
            await asyncio.sleep(PERIOD_S)

    async def _read_incidents(self) -> None:
        text = msgspec.json.encode(await self._service.incidents(INCIDENTS_MAX))
        message = b"event: incidents\ndata: " + text + b"\n\n"
        if message != self._incidents:
            self._incidents = message
            self._incidents_version += 1


class FeedResponse(Response):
    """One client's stream. It ends when the client goes, stops reading, or may no longer read.

    `left_s`: how long it may; None: for ever. `ended`: whether it may no longer, asked before each message.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        feed: Feed,
        after: int,
        left_s: float | None = None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed
        self._after = after
        self._left_s = left_s
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._feed.full:  # looked at here, where nothing comes between it and joining
            text = "too many dashboards are open on this controller"
            await error(503, text, {"retry-after": "5"})(scope, receive, send)
            return
        async with self._feed.joined():
            sender = asyncio.create_task(self._send_all(send))
            watcher = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sender, watcher):
                    task.cancel()
                await asyncio.gather(sender, watcher, return_exceptions=True)
        if not sender.cancelled() and (cause := sender.exception()) and not isinstance(cause, TimeoutError):
            raise cause

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with asyncio.timeout(SEND_LIMIT_S):
            await send(start)
        session = asyncio.timeout(self._left_s)
        try:
            async with session, contextlib.aclosing(self._feed.messages(self._after)) as messages:
                async for message in messages:
                    if self._ended():
                        break
                    async with asyncio.timeout(SEND_LIMIT_S):
                        await send({"type": "http.response.body", "body": message, "more_body": True})
        except TimeoutError:
            if not session.expired():
                raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
