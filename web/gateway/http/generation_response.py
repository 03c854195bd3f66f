"""The HTTP answer of a generation: one JSON body, or a stream of server-sent events.

A stream ends with `data: [DONE]`; whatever goes wrong before is told in an error event first. Clients take a bare end
of stream for success, so there is none. Only a gateway that was told to stop ends a stream without [DONE], by a
`reconnect` event: the stream itself is not over. Each event has an id, by which its client goes on at any gateway.
"""

from __future__ import annotations

import asyncio

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from web.gateway.errors import ApiError
from web.gateway.http.connection import wire_of
from web.gateway.http.event_stream import EventStream
from web.gateway.openai.generation import ClientGone, count_error
from web.gateway.openai.long_lists import gathered, in_pieces
from web.gateway.resume.start_or_resume import StartedAnswer
from web.gateway.routing.delivery_queue import Gone
from web.gateway.service import Service

log = structlog.get_logger()

DONE = b"data: [DONE]\n\n"
RETRY_MS = 100  # a pause for EventSource; other gateways are ready, so there is no reason to wait longer
STOPPING = "this gateway is shutting down"
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class GenerationResponse(Response):
    """Runs the generation of `started` while it is sent; frees it whatever happens."""

    def __init__(self, service: Service, started: StartedAnswer) -> None:
        self.status_code = 200  # Starlette's own fields are not used beyond this one
        self.background = None
        self._service = service
        self._generation = started.generation
        self._form = started.form
        self._ticket = started.ticket
        self._cursor = started.cursor
        self._hold = started.hold
        self._event_ids = started.event_ids
        self._begun = False
        self._watcher: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._generation.traced(Headers(scope=scope).get("traceparent", ""))
        stream = EventStream(
            self._generation,
            self._form,
            self._ticket,
            self._cursor,
            wire_of(scope),
            self._service.keep_alive_s,
            self._event_ids,
        )
        try:
            await self._run(stream, receive, send)
        except ClientGone:
            return  # counted where it was noticed; `finally` frees everything
        finally:
            stream.close()
            self._generation.close()
            self._hold.release()
            if self._watcher is not None:
                self._watcher.cancel()
                self._watcher = None  # what it raises then has this object in its frames

    async def _run(self, stream: EventStream, receive: Receive, send: Send) -> None:
        """Answer; what goes wrong is told to the client. Raises ClientGone."""
        try:
            for index, piece in self._generation.known():
                stream.events(index, piece)
                await asyncio.sleep(0)  # other streams go on meanwhile
            self._generation.start()
            await asyncio.sleep(0)  # it leaves for its scheduler: what follows is done while that computes
            self._watcher = asyncio.create_task(self._watch(receive))
            await (self._send_stream(stream, send) if self._ticket else self._send_body(send))
        except ApiError as error:
            self._generation.failed(error.status, error.message)
            self._generation.close()  # a client that reads slowly may keep us here for long
            await self._send_error(stream, send, error)
        except ClientGone:
            raise
        except Exception:
            log.exception("a generation failed")
            self._generation.failed(500, "internal error of the gateway")
            await self._send_error(stream, send, ApiError(500, "internal error of the gateway"))

    async def _watch(self, receive: Receive) -> None:
        """The request's body has been read: the next message is the client's leaving."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.queue.put(Gone())

    async def _send_stream(self, stream: EventStream, send: Send) -> None:
        generation = self._generation
        while True:
            # Nothing is sent before there is something to say, so that a refusal can still be a 429 or a 503.
            out = await stream.turn(self._begun)
            for piece in stream.rest():
                await self._write(send, out + piece)
                out = b""
                await asyncio.sleep(0)  # other streams go on meanwhile
            if stream.finished:
                return await self._write(send, out + stream.last() + DONE, more=False)
            if generation.leaving and not generation.finished:
                return await self._hand_over(stream, send, out)
            if out:
                await self._write(send, out)

    async def _hand_over(self, stream: EventStream, send: Send, out: bytes) -> None:
        """Send the client to another gateway. Raises ApiError when it has nothing yet: then it just asks again."""
        if not (self._begun or out):
            raise ApiError(503, STOPPING, retry_after_s=1)
        if not self._event_ids:  # it could not say where to go on
            await self._write(send, out)
            raise ApiError(503, STOPPING)
        self._generation.leave()
        self._service.metrics.handed_over.inc()
        error = ApiError(503, f"{STOPPING}: send the request again, with Last-Event-ID, to any other")
        event = b"event: reconnect\nretry: %d\ndata: %s\n\n" % (RETRY_MS, error.encode())
        await self._write(send, out + stream.id() + event, more=False)

    async def _send_body(self, send: Send) -> None:
        generation = self._generation
        ended = asyncio.get_running_loop().create_future()

        def collect() -> None:
            if ended.done():
                return
            try:
                for index, piece in generation.take():
                    self._hold.grow(self._form.keep(index, piece))
            except Exception as error:  # the task tells the client
                ended.set_exception(error)
            else:
                if generation.finished:
                    ended.set_result(None)

        generation.queue.attach(collect)
        collect()
        await ended
        await self._send_json(send, 200, await self._body(), {})

    async def _body(self) -> list[bytes]:
        def write() -> list[bytes]:
            return list(in_pieces(self._form.body()))

        return await asyncio.to_thread(write) if self._form.heavy else write()

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            where = (b"content-location", f"/v1/streams/{self._ticket}".encode())
            await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_HEADERS, where]})
        message: Message = {"type": "http.response.body", "body": data, "more_body": more}
        await send(message)

    async def _send_error(self, stream: EventStream, send: Send, error: ApiError) -> None:
        """As a status while that is possible, else as an event."""
        count_error(self._service, error)
        if self._begun:
            await self._write(send, stream.failure(error) + DONE, more=False)
        else:
            await self._send_json(send, error.status, [error.encode()], error.headers)

    async def _send_json(self, send: Send, status: int, body: list[bytes], headers: dict[str, str]) -> None:
        size = sum(map(len, body))
        pairs = [(b"content-type", b"application/json"), (b"content-length", str(size).encode())]
        pairs += [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        for piece in gathered(body):  # the server waits between them for a slow client
            size -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": size > 0})
            if size:
                await asyncio.sleep(0)  # other streams go on meanwhile
