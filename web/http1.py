"""What clients and proxies do with HTTP/1, and uvicorn does not know.

- HTTP/1.0 has no chunks and no 100 Continue: an answer without a length ends with the connection.
- What a client sent ahead is answered, whatever nonsense follows it.
- A connection that is closed with bytes unread is reset, and the answer may be lost: it is read on for a while.
- A client may shut its sending side after its request, and read on.
- A client that offers another protocol (h2c, as Java's does) is answered in this one, body and all.
- Trailers are no headers: nobody has agreed that they may be taken for such.
- A transfer coding other than chunked is refused instead of taken for the body; so are other versions, and HTTP/1.1
  without one Host.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

LINGER_S = 5.0  # for a client to read its answer and to close
LINGERING_MAX = 64  # more are closed at once: they count for nothing else
PROBE_S = 0.5  # between two looks whether a client that has shut its side still reads
CONTINUE = (
    b"HTTP/1.1 100 Continue\r\n\r\n"  # says nothing, and a connection that is gone answers with a reset
)


class _Held:
    """Stands in for an answer's transport while its head waits: that leaves with the first piece of the body, as one
    record of TLS and one packet, or with the next turn of the loop if there is no piece yet."""

    def __init__(self, cycle: _Cycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            self.leave(data)
        else:
            self._head = data

    def leave(self, data: bytes = b"") -> None:
        head, self._head = self._head, b""
        self._cycle.transport = self._transport
        if head and not self._transport.is_closing():
            self._transport.write(head + data)

    def close(self) -> None:
        self.leave()
        self._transport.close()


class _Cycle(RequestResponseCycle):
    """One answer. uvicorn names the class itself, so that its objects are given this one before their tasks run."""

    protocol: Http1Protocol
    _unbounded = False  # of HTTP/1.0, without a length

    async def send(self, message: MutableMapping[str, Any]) -> None:  # type: ignore[override]
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            if (
                self.scope["http_version"] == "1.0"
                and b"content-length" not in names
                and message["status"] not in (204, 304)
            ):
                self._unbounded, self.chunked_encoding = True, False
            if self.scope["method"] != "HEAD":  # whose body is never written
                held = _Held(self)
                self.transport = cast(asyncio.Transport, held)
                asyncio.get_running_loop().call_soon(held.leave)
        elif self._unbounded and self.scope["method"] != "HEAD":
            self.expected_content_length = len(message.get("body", b""))
        if not (last and self.more_body) or self.keep_alive or self.disconnected:
            return await super().send(message)  # type: ignore[arg-type]
        self.keep_alive = True  # else uvicorn would close, with a part of the body unread
        await super().send(message)  # type: ignore[arg-type]
        return self.protocol.linger()


class Http1Protocol(HttpToolsProtocol):
    """One connection. Subclasses say how what must not be is refused."""

    _refused = False  # whatever else comes is dropped
    _lingering: ClassVar[int] = 0  # connections of this process that only wait for their end
    _linger_timer: asyncio.TimerHandle | None = None
    _head_ended = False  # what the parser still brings are trailers
    _declining = False  # the parser has stopped before the body of a request that offers another protocol
    _probe_timer: asyncio.TimerHandle | None = None
    _answering: RequestResponseCycle | None = (
        None  # of several that were sent ahead, the one whose turn it is
    )

    def refuse(self, status: int, message: str) -> None:
        """Answer and close."""
        raise NotImplementedError

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            Http1Protocol._lingering -= 1
        super().connection_lost(exc)
        # uvicorn tells the newest of several requests that were sent ahead, not the one that is being answered.
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._declining:
                self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            if not self.has_ended:
                self.refuse(400, "this is not valid HTTP/1.1")

    @property
    def has_ended(self) -> bool:
        """Nothing of what the client sends is listened to any more."""
        return self._refused or self.transport.is_closing()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_ended = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_ended:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_ended = True
        if self.has_ended:
            return None
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return self.refuse(505, "HTTP/1.1 and HTTP/1.0 are understood")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (version == "1.1" and not hosts):
            return self.refuse(400, "a request of HTTP/1.1 has one Host")
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
                return self.refuse(501, "the only transfer coding that is understood is chunked")
        if self.parser.get_method() == b"CONNECT":
            return self.refuse(501, "this is no proxy")
        if self.parser.should_upgrade():
            self._declining = True
            return None
        if not self.url.startswith(b"/") and not (target := httptools.parse_url(self.url)).path:
            self.url = b"/" + (b"?" + target.query if target.query else b"")  # "http://host" is its root
        if version == "1.0":
            self.expect_100_continue = False
        super().on_headers_complete()
        self.cycle.__class__ = _Cycle
        cast(_Cycle, self.cycle).protocol = self
        return None

    def interrupt(self) -> bool:
        """The request whose body is arriving ends here; False if that cannot be said to its client any more."""
        cycle = self.cycle
        if cycle is None or not cycle.more_body or cycle.response_complete:
            return True
        if cycle.response_started:
            return False
        if cycle is not self._answering:
            self.pipeline.popleft()
        cycle.disconnected = True  # whatever its application still says is not sent
        cycle.message_event.set()
        return True

    @property
    def is_answering(self) -> bool:
        cycle = self._answering
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def linger(self) -> None:
        """The last word is said: close once the client has closed, or a little later."""
        self._refused = True
        if self._linger_timer is not None or self.transport.is_closing():
            return None
        if self._lingering >= LINGERING_MAX or not self.transport.can_write_eof():
            return self.transport.close()
        self.transport.write_eof()
        Http1Protocol._lingering += 1
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)
        return None

    def on_body(self, body: bytes) -> None:
        if not (self._declining or self.has_ended):
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not (self._declining or self.has_ended):
            super().on_message_complete()
            self.headers = []  # what follows is not this request

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. What it has asked for whole is still answered; then the connection ends."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        if self._probe_timer is None:
            self._probe_timer = self.loop.call_later(PROBE_S, self._probe)
        return True

    def say_something(self) -> None:
        """Called now and then while an answer is on its way to a client that may be gone."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _probe(self) -> None:
        """Who has shut its side, and who is gone, look the same until something is sent to them."""
        if self._answering is None or self.transport.is_closing():
            return
        if self._answering.response_started:
            self.say_something()
        elif self._answering.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
        self._probe_timer = self.loop.call_later(PROBE_S, self._probe)

    def _decline(self, rest: bytes) -> None:
        """Once more, without the offer: the head, and all that came after it, for a parser that has not heard of it."""
        self._declining = False
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(t for t in tokens if t.lower() not in (b"upgrade", b"http2-settings"))
            if name not in (b"upgrade", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"".join(head) + b"\r\n" + rest)
