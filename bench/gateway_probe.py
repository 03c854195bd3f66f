"""First tokens on a connection that stays open, as clients with a pool of connections have them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from bench.kevlarflow_load import Client, Outcome, Request, read

LIMIT_S = 60.0
END = b"0\r\n\r\n"  # of a chunked answer


class _Kept(asyncio.Protocol):
    """One connection; `ended` is replaced before each request."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        if b"".join(piece for _, piece in self.pieces[-2:]).endswith(END) and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the gateway closed the connection"))


async def in_turn(client: Client, requests: Sequence[Request]) -> list[Outcome]:
    """One after the other, on one connection, each due when it is sent. Raises OSError."""
    loop = asyncio.get_running_loop()
    outcomes: list[Outcome] = []
    transport, kept = await loop.create_connection(_Kept, client.host, client.port, ssl=client.tls)
    try:
        async with asyncio.timeout(LIMIT_S):
            for request in requests:
                kept.pieces, kept.ended = [], loop.create_future()
                outcome = Outcome(request, time.monotonic())
                transport.write(client.message(request))
                await kept.ended
                read(kept.pieces, outcome)
                outcomes.append(outcome)
    finally:
        transport.abort()
    return outcomes
