"""HTTP/1.1 connections with the bounds that uvicorn and its parser do not have.

Neither limits how long a request's head may be, how long it may take, or how many connections there are. Without
that anybody who can connect, with a key or not, could fill the memory with one endless header, or use up the
descriptors with heads that never end.
"""

from __future__ import annotations

import asyncio
import heapq
import resource
from collections import Counter
from typing import ClassVar
from weakref import WeakKeyDictionary

import msgspec
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from controlplane.contract.address import network_of
from web.http1 import Http1Protocol
from web.manners import request_id_of

log = structlog.get_logger()

HEAD_BYTES_MAX = 64 * 1024  # request line and headers; also trailers, and what stands between chunks
TOO_LONG = f"the head of a request exceeds {HEAD_BYTES_MAX} bytes"
HEAD_S = 20.0  # from the first byte of a connection, or of what follows an answer, to the end of a head
ERRORS = {
    408: "TimeoutError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    505: "NotImplementedError",
}
UNREAD_S = 60.0  # a client that takes nothing for so long of what waits for it is gone
DESCRIPTORS_KEPT = 128  # for etcd, nodes, logs and the like
CONNECTIONS_MAX = 1 << 16  # however many descriptors there may be: containers often have a thousand million
CANDIDATES_MAX = 16  # idle connections that are looked at to make room for one


def connections_max() -> int:
    """How many clients' connections this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return min(max(soft - DESCRIPTORS_KEPT, soft // 2), CONNECTIONS_MAX)


def client_connections_max() -> int:
    """How many of them one client may have: a quarter is for others, whatever it does."""
    return connections_max() * 3 // 4


def client_of(peer: tuple[str, int] | None) -> str:
    """Whose connection it is: of one IPv4 address, or of one network of IPv6, where a host has as many addresses as it
    likes; "" where nobody can say, as of a Unix socket."""
    return network_of(peer[0] if peer else "")


class BoundedProtocol(Http1Protocol):
    """One connection. A head that is too long is answered with 431, one that is too slow with 408; both are its end.

    Where there are as many as there may be, or as many of one client, one that has asked for nothing makes room for a
    new one: of the client that has most of them, the one that has waited for longest. If all are being answered,
    the new one is: with 503."""

    _of_clients: ClassVar[WeakKeyDictionary[ServerState, Counter[str]]] = WeakKeyDictionary()
    _client = ""
    _counted = False  # among those of its client
    _waits_since = 0.0  # for a head
    _cut = False  # it has made room for another
    _unheard = 0  # bytes since the parser last had something whole: a head, a piece of a body, an end
    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._client = client_of(self.client)
        counts = self._of_clients.setdefault(self.server_state, Counter())
        counts[self._client] += 1
        self._counted = True
        too_many = bool(self._client) and counts[self._client] > client_connections_max()
        full = counts.total() > connections_max()
        if (too_many or full) and not self._make_room(counts, self._client if too_many else None):
            who = "this client" if too_many else "this server"
            self.refuse(
                503,
                f"{who} has as many connections as {'one may have' if too_many else 'it can bear'}; try again",
            )
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_watching()
        self._uncount()
        super().connection_lost(exc)

    def linger(self) -> None:
        self._uncount()
        super().linger()

    def eof_received(self) -> bool:  # type: ignore[override]
        stays = super().eof_received()
        if not (stays or self.transport.get_write_buffer_size()):
            self._uncount()  # the loop is told of its end later: many may come before that
        return stays

    def _uncount(self) -> None:
        """It is over, or only waits for its end."""
        if self._counted:
            self._counted = False
            counts = self._of_clients[self.server_state]
            counts[self._client] -= 1
            if not counts[self._client]:
                del counts[self._client]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _feed(self, piece: bytes) -> None:
        self._unheard += len(piece)
        super()._feed(piece)
        if self._unheard > HEAD_BYTES_MAX and not self.has_ended:
            self.refuse(431, TOO_LONG)

    def _after_parse(self) -> None:
        super()._after_parse()
        if not self.has_ended and (self.cycle is None or self.cycle.response_complete):
            # uvicorn's own timer, for idle connections, ended with these bytes, and would not start again.
            self._await_head()

    def on_headers_complete(self) -> None:
        self._unheard = 0
        self._stop_timer()
        # One that came in a single read has not been counted.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_BYTES_MAX:
            return self.refuse(431, TOO_LONG)
        return super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unheard = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unheard = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _watch_unread(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(UNREAD_S, self._look_at_unread, size)

    def _look_at_unread(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_unread()
        else:
            log.warning("a client took nothing", seconds=UNREAD_S, bytes=before)
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _make_room(self, counts: Counter[str], client: str | None) -> bool:
        """Cut another connection that has been idle, or has not ended, for longest: of `client`, or of the one that has
        most. False if each has a request."""
        others = (c for c in self.connections if isinstance(c, BoundedProtocol) and c is not self)
        idle = (c for c in others if c.is_idle and client in (None, c._client))
        for oldest in heapq.nsmallest(
            CANDIDATES_MAX, idle, key=lambda c: (-counts[c._client], c._waits_since)
        ):
            # Where many connect at once, all do before the first one is heard.
            if not oldest.has_sent():
                oldest._cut = True
                oldest._uncount()  # the loop is told of its end later
                oldest.transport.abort()
                return True
        return False

    @property
    def is_idle(self) -> bool:
        """Nothing is being answered, or the last bytes have been waiting for its client for long."""
        if (
            self._cut
            or self._waiting
            or self._linger_timer is not None
            or not (self.cycle is None or self.cycle.response_complete)
        ):
            return False
        return not self.transport.is_closing() or self.loop.time() - self._waits_since > UNREAD_S

    def _await_head(self) -> None:
        self._waits_since = self.loop.time()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.has_ended:
            return
        if self.cycle is None and self._unheard:
            self.refuse(408, f"the head of the request did not arrive within {HEAD_S:g} s")
        else:
            self.transport.close()  # nothing was asked, or it has been answered

    def refuse(self, status: int, message: str) -> None:
        """Answer and close; where that cannot be said any more, close."""
        if self.has_ended:
            return
        self._refused = True
        self._stop_timer()
        if not self.interrupt():
            self.transport.close()
        else:
            self._tell(status, message)

    def _tell(self, status: int, message: str) -> None:
        kind = ERRORS.get(status, "BadRequestError")
        error = {"message": message, "type": kind, "param": None, "code": status}
        body = msgspec.json.encode({"error": error})
        given = next((value for name, value in self.headers or () if name == b"x-request-id"), b"")
        request_id = request_id_of(given.decode("latin-1"))
        log.info("no request", status=status, reason=message, request_id=request_id)
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.linger()
