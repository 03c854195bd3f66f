"""uvicorn, with an end that leaves no stream hanging."""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import signal
import socket
from collections.abc import Iterator
from typing import Protocol

import structlog
import uvicorn
from starlette.types import ASGIApp

from controlplane.contract.address import bound
from web.gateway.http.connection import StreamProtocol
from web.https import ContextFactory

log = structlog.get_logger()

STOP_GRACE_S = 5.0  # answers in one piece may finish for so long
DATE_S = 1.0  # how long the date of answers stays the same
ACCEPT_TURNS_MAX = 100  # of the loop, for connections that wait to be accepted at a stop
# From there to a protocol: asyncio drops what it has no transport for when the server is closed.
ACCEPTED_TURNS = 3
TELL_S = 2.0  # after that they are told within this, then connections are cut


class Serving(Protocol):
    """Who has the requests: see Dispatcher."""

    @property
    def live(self) -> int: ...
    def hand_over(self) -> None: ...
    def shut_down(self) -> None: ...


class GatewayServer(uvicorn.Server):
    """Signals are ours: uvicorn's own handling would wait for open streams before telling them anything. So is its
    clock, which would look ten times a second whether the server is to end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Take nothing new, and end with the last connection."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # 0: at each of these the date of answers is set
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DATE_S):
                    await self._leaving.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Who waits to be accepted may have sent a request: closing what listens would reset it."""
        poll = select.poll()
        for listening in sockets or ():
            poll.register(listening, select.POLLIN)
        for _ in range(ACCEPT_TURNS_MAX):
            if not poll.poll(0):
                break
            await asyncio.sleep(0)
        for _ in range(ACCEPTED_TURNS):
            await asyncio.sleep(0)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 picks a free one."""
    return bound(host, port)


def make_server(
    app: ASGIApp, stop_grace_s: float = STOP_GRACE_S, https: ContextFactory | None = None
) -> GatewayServer:
    config = uvicorn.Config(
        app,
        http=StreamProtocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client on this host could send another address
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(stop_grace_s + TELL_S),
        backlog=1024,
        ssl_context_factory=https,
    )
    return GatewayServer(config)


async def serve(
    server: GatewayServer, sock: socket.socket, serving: Serving, stop_grace_s: float = STOP_GRACE_S
) -> None:
    """Serve until SIGTERM or SIGINT (or `stop`)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, server, serving, stop_grace_s)
    try:
        await server.serve(sockets=[sock])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def stop(server: GatewayServer, serving: Serving, grace_s: float = STOP_GRACE_S) -> None:
    """Take nothing new, send streams to other gateways, and end when the other answers are out, or the grace is."""
    if not server.should_exit:
        log.info("shutting down", live=serving.live)
        serving.hand_over()
        asyncio.get_running_loop().call_later(grace_s, serving.shut_down)
    server.leave()
