"""A TCP relay in front of etcd, to cut or silence a client's connection while etcd itself runs on."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable

HOST = "127.0.0.1"


class EtcdProxy:
    """`cut`: connections break and new ones are refused. `silence`: nothing passes, nothing breaks."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, 0)

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._refusing = True
        for writer in tuple(self._writers):
            writer.transport.abort()

    def silence(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._refusing = False
        self._open.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        self._open.set()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(HOST, self._target_port)
        both = {writer, there_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._relay(reader, there_writer), self._relay(there_reader, writer))
        except OSError:
            pass  # a connection that ends is what a proxy is for
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def etcd_proxy(target_port: int) -> AsyncIterator[EtcdProxy]:
    proxy = EtcdProxy(target_port)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()


async def eventually(condition: Callable[[], object | Awaitable[object]], limit_s: float, what: str) -> None:
    """Poll an async or plain condition; AssertionError after `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            while True:
                value = condition()
                if inspect.isawaitable(value):
                    value = await value
                if value:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s:g} s: {what}") from None


async def no_task_left() -> None:
    """AssertionError unless this task is soon the only one (gRPC ends its own a moment after a close)."""
    await eventually(lambda: len(asyncio.all_tasks()) == 1, 2.0, f"no task left of {asyncio.all_tasks()}")
