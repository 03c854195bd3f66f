"""What clients and proxies do with HTTP/1, and uvicorn does not know.

- HTTP/1.0 has no chunks and no 100 Continue: an answer without a length ends with the connection.
- What a client sent ahead is answered, whatever nonsense follows it: one request after the other, the rest waits as it
  came. A parsed one takes thirty times its bytes, and who has no key could send as many as it likes.
- A connection that is closed with bytes unread is reset, and the answer may be lost: it is read on for a while.
- What has been sent before the server ends is answered, too.
- A client may shut its sending side after its request, and read on.
- A client that offers another protocol (h2c, as Java's does) is answered in this one, body and all.
- Trailers are no headers: nobody has agreed that they may be taken for such.
- A transfer coding other than chunked is refused instead of taken for the body; so are other versions, and HTTP/1.1
  without one Host.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import termios
from array import array
from collections.abc import MutableMapping
from typing import Any, ClassVar, cast
from weakref import WeakSet

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

LINGER_S = 5.0  # for a client to read its answer and to close
LINGERING_MAX = 64  # more are closed at once: they count for nothing else
ENDING_S = 0.5  # once the server ends: for a request that is on its way, or has been read in part
WAITING_BYTES_MAX = 64 * 1024  # sent ahead, before no more is read; one read of the loop may exceed it
TURN_BYTES_MAX = 64 * 1024  # that are parsed before others have their turn
TURN_PIECES_MAX = 1024
MESSAGE_END = b"\r\n\r\n"  # of every head, and of every body in chunks
PROBE_S = 0.5  # between two looks whether a client that has shut its side still reads
# Says nothing, and a connection that is gone answers with a reset.
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


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
        if not last or self.keep_alive or self.disconnected:
            return await super().send(message)  # type: ignore[arg-type]
        self.keep_alive = True  # else uvicorn would close, with what has been sent unread
        self.protocol.listen_no_more()
        await super().send(message)  # type: ignore[arg-type]
        return self.protocol.end()


class _Flow(FlowControl):
    """Reads no further while too much waits, whoever wants to hear of the client's end."""

    def __init__(self, transport: asyncio.Transport, waiting: bytearray) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if len(self._waiting) <= WAITING_BYTES_MAX:
            super().resume_reading()


class Http1Protocol(HttpToolsProtocol):
    """One connection. Subclasses say how what must not be is refused."""

    _refused = False  # whatever else comes is dropped
    _lingering: ClassVar[int] = 0  # connections of this process that only wait for their end
    _linger_timer: asyncio.TimerHandle | None = None
    _head_ended = False  # what the parser still brings are trailers
    _declining = False  # the parser has stopped before the body of a request that offers another protocol
    _probe_timer: asyncio.TimerHandle | None = None
    _next_turn: asyncio.Handle | None = None  # to parse on
    _whole = True  # the parser is between two requests
    _body_left = 0  # bytes, of a body whose length was told
    _seam = b""  # the last bytes that were parsed: an end may have come in two pieces
    _shut = False  # the client has shut its sending side
    _ending = False  # so does the server
    _ended: ClassVar[WeakSet[ServerState]] = WeakSet()  # servers that take nothing new
    _end_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting = bytearray()  # to be parsed

    def refuse(self, status: int, message: str) -> None:
        """Answer and close."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self._waiting)
        if self.server_state in self._ended:  # accepted before that, or with a handshake that took longer
            self._ending = True
            self._end_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        for handle in (self._probe_timer, self._end_timer, self._next_turn, self._linger_timer):
            if handle is not None:
                handle.cancel()
        if self._linger_timer is not None:
            Http1Protocol._lingering -= 1
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it, and all that it holds, where the client reset
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        if self.has_ended:
            return
        self._unset_keepalive_if_required()
        self._waiting += data
        if self._next_turn is None:
            self._parse()

    @property
    def is_answering(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _parse(self) -> None:
        """On to the end of a request, or of what has come; then the next one when this one is answered."""
        self._next_turn = None
        size = pieces = 0
        while self._waiting and not (self.has_ended or (self._whole and self.is_answering)):
            if size >= TURN_BYTES_MAX or pieces >= TURN_PIECES_MAX:
                self._next_turn = self.loop.call_soon(self._parse)
                return
            piece = self._next_piece()
            size, pieces = size + len(piece), pieces + 1
            self._feed(piece)
        self._after_parse()

    def _after_parse(self) -> None:
        if self.has_ended:
            return
        answering = self._whole and self.is_answering
        if not self._waiting and (self._shut or self._ending):
            if answering:
                self.cycle.keep_alive = False
            elif self._shut:
                self.transport.close()
        if len(self._waiting) > WAITING_BYTES_MAX:
            self.flow.pause_reading()
            self._start_probing()
        elif self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def _next_piece(self) -> bytes:
        """Bytes of one request: where it ends, its parser could not be stopped."""
        waiting = self._waiting
        size = min(len(waiting), TURN_BYTES_MAX)
        if self._body_left:
            size = min(size, self._body_left)
            self._body_left -= size
        elif (at := (self._seam + waiting[:3]).find(MESSAGE_END)) >= 0:
            size = at + len(MESSAGE_END) - len(self._seam)
        elif (at := waiting.find(MESSAGE_END, 0, size)) >= 0:
            size = at + len(MESSAGE_END)
        piece = bytes(waiting[:size])
        del waiting[:size]
        self._seam = (self._seam + piece[-3:])[-3:]
        return piece

    def _feed(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as offer:
            if self._declining:
                self._decline(piece[offer.args[0] :])
        except httptools.HttpParserError:
            if not self.has_ended:
                self.refuse(400, "this is not valid HTTP/1.1")

    @property
    def has_ended(self) -> bool:
        """Nothing of what the client sends is listened to any more."""
        return self._refused or self.transport.is_closing()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_ended = self._whole = False

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
            # "http://host" is its root; whose options are asked for, it is the server itself.
            root = b"*" if self.parser.get_method() == b"OPTIONS" and target.query is None else b"/"
            self.url = root + (b"?" + target.query if target.query else b"")
        if version == "1.0":
            self.expect_100_continue = False
        self._body_left = int(next((value for name, value in self.headers if name == b"content-length"), 0))
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
        cycle.disconnected = True  # whatever its application still says is not sent
        cycle.message_event.set()
        return True

    def listen_no_more(self) -> None:
        """Whatever else comes is dropped."""
        self._refused = True
        self._waiting.clear()

    def end(self) -> None:
        """The last answer is out: close, so that it arrives."""
        if self.cycle.more_body or self.flow.read_paused or self.has_sent():
            self.linger()
        else:
            self.transport.close()

    def has_sent(self) -> bool:
        """Whether the client has sent something that has not been read yet. Who has only gone has not, nor who is gone
        with TLS, where that is told in bytes, too."""
        if self.transport.is_closing():
            return False
        connection = self.transport.get_extra_info("socket").fileno()
        if self.transport.get_extra_info("sslcontext") is not None:
            poll = select.poll()
            poll.register(connection, select.POLLRDHUP)
            if poll.poll(0):
                return False
        unread = array("i", [0])
        fcntl.ioctl(connection, termios.FIONREAD, unread)
        return unread[0] > 0

    def shutdown(self) -> None:
        """The server ends. What has been sent by now is answered; uvicorn would reset the connection under it."""
        self._ended.add(self.server_state)
        if self.has_ended:
            return
        self._ending = True
        if self.is_answering:
            if not (self._waiting or self.has_sent()):
                self.cycle.keep_alive = False
        elif self._waiting or not self._whole or self.has_sent():
            self._end_soon()
        else:
            self.transport.close()

    def _end_soon(self) -> None:
        if self._end_timer is None:
            self._end_timer = self.loop.call_later(ENDING_S, self._end_unasked)

    def _end_unasked(self) -> None:
        self._end_timer = None
        if not (self.is_answering or self.has_ended):
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.has_ended:
            return
        if self._waiting:
            self._unset_keepalive_if_required()
            self._parse()
        elif self._shut:
            self.transport.close()
        if self._ending and not (self.is_answering or self.has_ended):
            self._end_soon()

    def linger(self) -> None:
        """The last word is said: close once the client has closed, or a little later."""
        self.listen_no_more()
        if self._linger_timer is not None or self.transport.is_closing():
            return None
        self.flow.resume_reading()
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
            self._whole = True
            self.headers = []  # what follows is not this request

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. What it has asked for whole is still answered; then the connection ends."""
        if not (self._waiting or (self._whole and self.is_answering)):
            return False
        self._shut = True
        if not self._waiting:
            self.cycle.keep_alive = False
        self._start_probing()
        return True

    def say_something(self) -> None:
        """Called now and then while an answer is on its way to a client that may be gone."""

    def _start_probing(self) -> None:
        if self._probe_timer is None:
            self._probe_timer = self.loop.call_later(PROBE_S, self._probe)

    def _probe(self) -> None:
        """Who has shut its side, or is read no further, and who is gone, look the same until something is sent to
        them."""
        self._probe_timer = None
        if self.transport.is_closing() or not (self._shut or self.flow.read_paused):
            return
        if not self.is_answering:
            pass
        elif self.cycle.response_started:
            self.say_something()
        elif self.cycle.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
        self._start_probing()

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
        self._waiting[:0] = b"".join(head) + b"\r\n" + rest
        self._seam = b""
