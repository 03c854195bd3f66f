"""First tokens on a connection that stays open, as clients with a pool of connections have them; and without a gateway,
as the gateway itself has them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from bench.gateway_node import NODE, PIPELINE
from bench.kevlarflow_load import Client, Outcome, Request, read
from controlplane.contract import rpc
from controlplane.contract.auth import derive, load_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.contract.requests import Sampling, Submit, Tokens

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


async def at_the_node(
    config: ClusterConfig, address: str, prompt: tuple[int, ...], count: int
) -> list[float]:
    """Seconds to the first token of each of `count` requests, one after the other on one stream to the node. Raises
    TimeoutError and grpc.aio.AioRpcError."""
    identity = Identity.of(config, ProcessRole.GATEWAY, "g1")
    token = derive(load_secret(config.secret_file), "grpc")
    seconds: list[float] = []
    async with (
        asyncio.timeout(LIMIT_S),
        identity.channel(address, ProcessName(ProcessRole.NODE, NODE)) as channel,
    ):
        serve = channel.stream_stream(
            rpc.FRONTDOOR_SERVE,
            request_serializer=rpc.encode,
            response_deserializer=rpc.decode_scheduler_message,
        )
        call = serve(
            metadata=(("authorization", f"Bearer {token}"), (rpc.STREAM_SCHEMA_KEY, str(rpc.STREAM_SCHEMA)))
        )
        await call.wait_for_connection()
        for rid in range(1, count + 1):
            began = time.monotonic()
            await call.write(Submit(rid, PIPELINE, prompt, Sampling(max_tokens=1, seed=0)))
            message = await call.read()
            seconds.append(time.monotonic() - began)
            assert isinstance(message, Tokens)
            assert message.items[0].finish is not None
        call.cancel()
    return seconds
