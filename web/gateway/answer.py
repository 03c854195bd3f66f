"""The HTTP answer of a generation: one JSON body, or a stream of server-sent events.

A stream always ends with `data: [DONE]`; whatever goes wrong before is told in an error event first. Clients
take a bare end of stream for success, so there is none.
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
from web.gateway.errors import ApiError
from web.gateway.generation import ClientGone, Generation, count_error
from web.gateway.service import Service

log = structlog.get_logger()

SEND_S = 60.0  # a client that takes nothing for so long is gone
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Format(Protocol):
    """How one of the two APIs writes a generation down."""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Events for a piece of choice `index`; empty when there is nothing to show yet."""

    def last(self) -> bytes:
        """Events between the last piece and [DONE] (usage, when asked for)."""

    def body(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer; `pieces` has one entry for each choice."""


class Answer(Response):
    """Runs `generation` while it is sent; frees it whatever happens."""

    def __init__(self, service: Service, generation: Generation, form: Format, stream: bool) -> None:
        self.status_code = 200  # Starlette's own fields are not used beyond this one
        self.background = None
        self._service = service
        self._generation = generation
        self._format = form
        self._stream = stream
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
            self._generation.start()
            await (self._send_stream(send) if self._stream else self._send_body(send))
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
        form, generation = self._format, self._generation
        while not generation.finished:
            # Nothing is sent before there is something to say, so that a refusal can still be a 429 or a 503.
            pieces = await generation.take(self._service.keep_alive_s)
            out = b"".join([form.chunk(index, piece) for index, piece in pieces]) if pieces else KEEP_ALIVE
            if out:
                await self._write(send, out)
        await self._write(send, form.last() + DONE, more=False)

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
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
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
