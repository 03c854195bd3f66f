"""A stand-in for a scheduler: tokens as fast as a gateway takes them, or in steps of a given length.

    python -m bench.gateway_node SETTINGS EPOCH      prints its address; ends with its standard input

The first token of a request leaves at once, in a message of its own. After that each step has one token for every
stream, in messages of at most BATCH tokens, as microbatches make them. A request's seed is the length of its steps in
microseconds; 0 is full speed, where gRPC's flow control alone holds it back.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from controlplane.contract import rpc
from controlplane.contract.auth import bearer_matches, derive, load_secret
from controlplane.contract.config import load_config
from controlplane.contract.identity import Identity, ProcessRole
from controlplane.contract.requests import (
    Cancel,
    FinishReason,
    GatewayMessage,
    Recall,
    SchedulerMessage,
    Submit,
    Token,
    Tokens,
)

BATCH = 32  # tokens in a message
NODE, PIPELINE = "n0", "p0"
FIRST_TEXT, TEXTS = 300, 1000  # ids of the demo's tokenizer that are ordinary text


def token_at(rid: int, position: int) -> int:
    return FIRST_TEXT + (rid * 31 + position * 7919) % TEXTS


@dataclass(slots=True)
class Stream:
    submit: Submit
    position: int = 0

    def next(self) -> Token:
        rid, position, last = self.submit.rid, self.position, self.submit.sampling.max_tokens - 1
        self.position += 1
        finish = FinishReason.LENGTH if position == last else None
        return Token(rid, position, token_at(rid, position), finish=finish)


class Session:
    """What one gateway has asked for."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._streams: dict[int, Stream] = {}
        self._fresh: list[Stream] = []
        self._news = asyncio.Event()

    async def read(self, requests: AsyncIterator[GatewayMessage]) -> None:
        async for message in requests:
            match message:
                case Submit():
                    self._fresh.append(Stream(message))
                    self._news.set()
                case Cancel(rid):
                    self._streams.pop(rid, None)
                case Recall():
                    raise SystemExit("a client of this bench resumed a stream")

    async def steps(self) -> AsyncIterator[SchedulerMessage]:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if not self._streams and not self._fresh:
                self._news.clear()
                await self._news.wait()
            fresh, self._fresh = self._fresh, []
            for stream in fresh:
                yield self._batch([stream])
            running = list(self._streams.values())
            for first in range(0, len(running), BATCH):
                yield self._batch(running[first : first + BATCH])
            self._streams |= {s.submit.rid: s for s in fresh if s.position < s.submit.sampling.max_tokens}
            step_s = max((s.submit.sampling.seed for s in self._streams.values()), default=0) * 1e-6
            due = max(loop.time(), due + step_s)
            await asyncio.sleep(due - loop.time())

    def _batch(self, streams: list[Stream]) -> Tokens:
        tokens = tuple(stream.next() for stream in streams)
        for token in tokens:
            if token.finish is not None:
                self._streams.pop(token.rid, None)
        return Tokens(PIPELINE, self._epoch, tokens)


async def serve(settings: Path, epoch: int) -> None:
    """With the certificate of `NODE` where the settings have certificates, as a node does. Raises ConfigError."""
    config = load_config(settings)
    token, identity = (
        derive(load_secret(config.secret_file), "grpc"),
        Identity.of(config, ProcessRole.NODE, NODE),
    )

    async def behaviour(
        requests: AsyncIterator[GatewayMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[SchedulerMessage]:
        metadata = dict(context.invocation_metadata() or ())
        if not bearer_matches(metadata.get("authorization"), token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        await context.send_initial_metadata(rpc.ACCEPTED)
        session = Session(epoch)
        reader = asyncio.create_task(session.read(requests))
        try:
            async for message in session.steps():
                yield message
        finally:
            reader.cancel()

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *rpc.PINGS_WELCOME])
    server.add_generic_rpc_handlers(
        (rpc.stream_handler(rpc.FRONTDOOR, "Serve", behaviour, rpc.decode_gateway_message),)
    )
    port = identity.add_port(server, "127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(grace=None)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
