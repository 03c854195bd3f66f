"""What a client waits for first leaves as one piece, and at once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from controlplane.contract.requests import Token
from web.gateway.http.server import GatewayServer, listen
from web.gateway.request_memory import Memory
from web.gateway.routing.delivery_queue import DeliveryQueue, Readers
from web.gateway.routing.events import Deliver
from web.protocol import BoundedProtocol

START = {"type": "http.response.start", "status": 200, "headers": []}
LIMIT_S = 10.0


class Recording:
    """A transport that keeps what is written, write by write."""

    def __init__(self, transport: Any, writes: list[bytes]) -> None:
        self._transport = transport
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(bytes(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, writes: list[bytes]) -> AsyncIterator[int]:
    class Recorded(BoundedProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(Recording(transport, writes))  # type: ignore[arg-type]

    config = uvicorn.Config(app, http=Recorded, ws="none", lifespan="off", log_config=None)
    server, sock = GatewayServer(config), listen("127.0.0.1", 0)
    sock.listen()  # who comes before the server is up waits
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await task


def exchange(
    app: ASGIApp, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> list[bytes]:
    """What the server wrote while `talk` spoke with it."""
    writes: list[bytes] = []

    async def run() -> None:
        async with asyncio.timeout(LIMIT_S), serving(app, writes) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await talk(reader, writer)
            writer.close()

    asyncio.run(run())
    return writes


def asked(method: bytes = b"GET", more: bytes = b"") -> bytes:
    return method + b" / HTTP/1.1\r\nhost: x\r\n" + more + b"\r\n"


@pytest.mark.parametrize("pieces", [[b"all"], [b"first", b"last"], [b"", b"last"]])
def test_a_head_leaves_with_the_first_of_its_body(pieces: list[bytes]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        for number, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(asked() + asked(more=b"connection: close\r\n"))
        await reader.read()

    writes = exchange(app, talk)
    assert len(writes) == 2 * len(pieces)
    for write in (writes[0], writes[len(pieces)]):
        head, _, body = write.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert pieces[0] in body
    assert writes[-1].endswith(b"0\r\n\r\n")


def test_a_head_without_a_body_yet_does_not_wait_for_it() -> None:
    seen = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await seen.wait()
        await send({"type": "http.response.body", "body": b"late"})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(asked(more=b"connection: close\r\n"))
        await reader.readuntil(b"\r\n\r\n")
        seen.set()
        assert b"late" in await reader.read()

    exchange(app, talk)


def test_a_head_is_whole_when_the_application_fails_after_it() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise RuntimeError("after the head")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(asked())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n")

    exchange(app, talk)


def test_an_answer_to_head_is_its_head() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"none of it"})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(asked(b"HEAD") + asked(b"HEAD", b"connection: close\r\n"))
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200") == 2
        assert b"none of it" not in answer

    exchange(app, talk)


def test_what_a_message_brings_is_read_at_its_end() -> None:
    async def run() -> None:
        readers, read = Readers(), list[int]()
        queues = [DeliveryQueue(readers, Memory().hold(b"o")) for _ in range(2)]
        for index, queue in enumerate(queues):
            queue.attach(functools.partial(read.append, index))
        tokens = (Token(1, 0, 5),)
        with readers.gathering():
            for queue in queues:
                queue.put((0, Deliver(1, tokens)))
            assert read == []
        assert read == [0, 1]
        queues[0].put((0, Deliver(1, tokens)))
        assert read == [0, 1], "never from within put"
        await asyncio.sleep(0)
        assert read == [0, 1, 0]

    asyncio.run(run())
