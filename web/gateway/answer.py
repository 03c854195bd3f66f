"""The HTTP answer of a generation: one JSON body, or a stream of server-sent events.

A stream ends with `data: [DONE]`; whatever goes wrong before is told in an error event first. Clients take a bare end
of stream for success, so there is none. Only a gateway that was told to stop ends a stream without [DONE], by a
`reconnect` event: the stream itself is not over. Each event has an id, by which its client goes on at any gateway.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from web.gateway.channel import Gone
from web.gateway.choice import Piece
from web.gateway.cursor import Cursor, Mark
from web.gateway.errors import ApiError
from web.gateway.generation import ClientGone, Generation, count_error
from web.gateway.service import Service

log = structlog.get_logger()

SEND_S = 60.0  # a client that takes nothing for so long is gone
DONE = b"data: [DONE]\n\n"
# No empty line after it: the openai client takes one for an event once it has seen an id.
KEEP_ALIVE = b": keep-alive\n"
RETRY_MS = 100  # a pause for EventSource; other gateways are ready, so there is no reason to wait longer
STOPPING = "this gateway is shutting down"
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Format(Protocol):
    """How one of the two APIs writes a generation down."""

    def opening(self, index: int) -> bytes:
        """The event before the first one of choice `index`, if there is one."""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """The event for a piece of choice `index`; empty when there is nothing to show yet."""

    def last(self) -> bytes:
        """Events between the last piece and [DONE] (usage, when asked for)."""

    def body(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer; `pieces` has one entry for each choice."""


class Answer(Response):
    """Runs `generation` while it is sent; frees it whatever happens.

    `ticket`: of the stream; empty for an answer in one piece. `cursor`: what the client has of it.
    """

    def __init__(
        self, service: Service, generation: Generation, form: Format, ticket: str, cursor: Cursor
    ) -> None:
        self.status_code = 200  # Starlette's own fields are not used beyond this one
        self.background = None
        self._service = service
        self._generation = generation
        self._format = form
        self._ticket = ticket
        self._cursor = cursor
        self._taken = [0] * len(generation.plans)  # tokens of each choice, up to the last piece
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self._run(send)
        except ClientGone:
            return  # counted where it was noticed; `finally` frees everything
        except (TimeoutError, OSError) as error:
            log.warning("client took nothing", error=repr(error))
        finally:
            self._generation.close()
            watcher.cancel()

    async def _run(self, send: Send) -> None:
        """Answer; what goes wrong is told to the client. Raises ClientGone, TimeoutError and OSError."""
        try:
            for index, piece in self._generation.known():
                self._events(index, piece)
                await asyncio.sleep(0)  # other streams go on meanwhile
            self._generation.start()
            await (self._send_stream(send) if self._ticket else self._send_body(send))
        except ApiError as error:
            await self._send_error(send, error)
        except (ClientGone, TimeoutError, OSError):
            raise
        except Exception:
            log.exception("a generation failed")
            await self._send_error(send, ApiError(500, "internal error of the gateway"))

    async def _watch(self, receive: Receive) -> None:
        """The request's body has been read: the next message is the client's leaving."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.channel.put(Gone())

    async def _send_stream(self, send: Send) -> None:
        generation, time = self._generation, asyncio.get_running_loop().time
        said = time()
        while not generation.finished:
            # Nothing is sent before there is something to say, so that a refusal can still be a 429 or a 503.
            pieces = await generation.take(self._service.keep_alive_s)
            out = b"".join([self._events(index, piece) for index, piece in pieces])
            if generation.leaving and not generation.finished:
                return await self._hand_over(send, out)
            if not out and (not pieces or time() - said >= self._service.keep_alive_s):
                out = KEEP_ALIVE
            if out:
                await self._write(send, out)
                said = time()
        last = b"" if self._cursor.usage else self._format.last()
        self._cursor.usage = True
        await self._write(send, (self._id() + last if last else b"") + DONE, more=False)
        return None

    def _events(self, index: int, piece: Piece) -> bytes:
        """The events of a piece with their ids; none when the client has them already."""
        self._taken[index] += len(piece.tokens)
        data = self._format.chunk(index, piece)
        if piece.silent:
            return b""
        marks, out = self._cursor.marks, b""
        if marks[index] is None and (opening := self._format.opening(index)):
            marks[index] = Mark(0)
            out = self._id() + opening
        if data:
            marks[index] = Mark(self._taken[index], piece.finish is not None)
            out += self._id() + data
        return out

    def _id(self) -> bytes:
        return f"id: {self._ticket}.{self._cursor}\n".encode()

    async def _hand_over(self, send: Send, out: bytes) -> None:
        """Send the client to another gateway. Raises ApiError when it has nothing yet: then it just asks again."""
        if not (self._begun or out):
            raise ApiError(503, STOPPING, retry_after_s=1)
        self._generation.leave()
        self._service.metrics.handed_over.inc()
        error = ApiError(503, f"{STOPPING}: send the request again, with Last-Event-ID, to any other")
        event = b"event: reconnect\nretry: %d\ndata: %s\n\n" % (RETRY_MS, error.encode())
        await self._write(send, out + self._id() + event, more=False)

    async def _send_body(self, send: Send) -> None:
        generation = self._generation
        pieces = [Piece() for _ in generation.plans]
        while not generation.finished:
            for index, piece in await generation.take(self._service.keep_alive_s):
                whole = pieces[index]
                whole.text += piece.text
                whole.tokens += piece.tokens
                whole.finish, whole.stop_reason = piece.finish, piece.stop_reason
        body = msgspec.json.encode(self._format.body(pieces))
        await self._send_json(send, 200, body, {})

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            where = (b"content-location", f"/v1/streams/{self._ticket}".encode())
            await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_HEADERS, where]})
        message: Message = {"type": "http.response.body", "body": data, "more_body": more}
        async with asyncio.timeout(SEND_S):
            await send(message)

    async def _send_error(self, send: Send, error: ApiError) -> None:
        """As a status while that is possible, else as an event."""
        count_error(self._service, error)
        if self._begun:
            await self._write(send, b"data: " + error.encode() + b"\n\n" + DONE, more=False)
        else:
            await self._send_json(send, error.status, error.encode(), error.headers)

    async def _send_json(self, send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
        pairs = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        pairs += [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        async with asyncio.timeout(SEND_S):
            await send({"type": "http.response.body", "body": body})
