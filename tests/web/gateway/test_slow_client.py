"""A client that does not read: what waits for it is bounded, nothing is lost, and one that stays so is given up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

import web.gateway.stream
from tests.web.gateway.fake_node import reference
from tests.web.gateway.stack import KEY, MODEL, Stack, running

PROMPT = (400, 401)
TOKENS = 1500
KERNEL_BYTES = 4096  # of socket buffers, so that what a client leaves unread stays in the gateway


@contextlib.asynccontextmanager
async def unread(stack: Stack, **options: Any) -> AsyncIterator[tuple[socket.socket, Any]]:
    """A stream that has filled its connection: the client's socket, and uvicorn's protocol."""
    url, loop = urlsplit(stack.url), asyncio.get_running_loop()
    asked = {"model": MODEL, "prompt": list(PROMPT), "seed": 1, "max_tokens": TOKENS, "stream": True}
    body = json.dumps(asked | {"return_token_ids": True} | options).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        f"Content-Length: {len(body)}",
    ]
    head = "\r\n".join([*lines, "", ""])
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        client.setblocking(False)
        await loop.sock_connect(client, (url.hostname, url.port))
        await stack.until(lambda: stack.server.server_state.connections)
        (protocol,) = stack.server.server_state.connections
        protocol.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES
        )
        await loop.sock_sendall(client, head.encode() + body)
        await stack.until(lambda: protocol.flow.write_paused)
        yield client, protocol


def test_what_waits_for_a_slow_client_is_bounded_and_it_gets_every_token_once() -> None:
    async def run() -> None:
        async with running(1, burst=5) as stack, asyncio.timeout(30), unread(stack) as (client, protocol):
            written = protocol.transport.get_write_buffer_size()
            await stack.until(lambda: not stack.nodes[0].running)  # all tokens are there
            assert protocol.transport.get_write_buffer_size() == written < 2 * 65536
            data = b""
            while b"data: [DONE]" not in data:
                data += await asyncio.get_running_loop().sock_recv(client, 1 << 16)
            events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
            ids = [token for event in events for token in event["choices"][0]["token_ids"]]
            assert ids == reference(PROMPT, 1, TOKENS)
            assert events[-1]["choices"][0]["finish_reason"] == "length"

    asyncio.run(run())


def test_a_client_that_leaves_without_having_read_is_noticed() -> None:
    async def run() -> None:
        async with running(1, burst=5) as stack, asyncio.timeout(30):
            async with unread(stack):
                stack.nodes[0].held = True
            await stack.until(lambda: not stack.dispatcher.router.live)
            await stack.until(lambda: stack.nodes[0].cancels)
            assert b"kevlarflow_client_disconnects_total 1.0" in stack.service.metrics.render()

    asyncio.run(run())


def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running(1, burst=5, keep_alive_s=0.05) as stack, asyncio.timeout(30), unread(stack):
            stack.nodes[0].held = True
            await stack.until(lambda: not stack.dispatcher.router.live)
            await stack.until(lambda: stack.nodes[0].cancels)

    monkeypatch.setattr(web.gateway.stream, "SEND_S", 0.3)
    asyncio.run(run())


def test_a_defect_in_one_stream_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running(1) as stack, stack.openai() as client, asyncio.timeout(30):
            take = web.gateway.stream.EventStream.events

            def broken(self: Any, index: int, piece: Any) -> bytes:
                if piece.tokens[0].position == 5 and piece.tokens[0].token == reference(PROMPT, 7, 6)[5]:
                    raise RuntimeError("a defect")
                return take(self, index, piece)

            monkeypatch.setattr(web.gateway.stream.EventStream, "events", broken)

            async def text(seed: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=list(PROMPT), seed=seed, max_tokens=20, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            good, bad = await asyncio.gather(text(1), text(7), return_exceptions=True)
            assert good == stack.service.model.decode(reference(PROMPT, 1, 20))
            assert "internal error" in str(bad)

    asyncio.run(run())
