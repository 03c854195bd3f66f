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

import web.gateway.http.event_stream
import web.protocol
from tests.web.gateway.fake_node import reference
from tests.web.gateway.stack import KEY, MODEL, Stack, running
from web.gateway.request_memory import Memory

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


async def read_slowly(client: socket.socket, until: bytes) -> bytes:
    data = b""
    while until not in data[-2000:]:
        part = await asyncio.get_running_loop().sock_recv(client, 1 << 14)
        assert part, "the connection ended"
        data += part
    return data


def test_what_waits_counts_and_leaves_in_pieces() -> None:
    async def run() -> None:
        async with running(1, burst=5) as stack, asyncio.timeout(60):
            memory, node = stack.service.memory, stack.nodes[0]
            async with unread(stack, logprobs=20) as (client, protocol):
                await stack.until(lambda: not node.running)
                assert memory.total > 1_000_000, "2.7 KB for each token with its log probabilities"
                reading = asyncio.create_task(read_slowly(client, b"[DONE]"))
                buffered = 0
                while not reading.done():
                    buffered = max(buffered, protocol.transport.get_write_buffer_size())
                    await asyncio.sleep(0)
                assert buffered < 1_000_000, "all of it left at once"
                events = [
                    json.loads(line[6:]) for line in reading.result().split(b"\n") if line[:7] == b"data: {"
                ]
                ids = [token for event in events for token in event["choices"][0]["token_ids"]]
                assert ids == reference(PROMPT, 1, TOKENS)
                await stack.until(lambda: not memory.total)

    asyncio.run(run())


def test_an_answer_for_which_there_is_no_room_ends_at_once_and_says_why() -> None:
    async def run() -> None:
        async with running(1, burst=5) as stack, asyncio.timeout(60):
            memory, node = Memory(1 << 20, 0.5), stack.nodes[0]
            stack.service.memory = memory
            async with unread(stack, logprobs=20) as (client, _):
                await stack.until(lambda: node.cancels)
                assert memory.total < 100_000, "what waited is gone, though the client has not read yet"
                data = await read_slowly(client, b"[DONE]")
            error = json.loads(data.split(b"data: ")[-2].partition(b"\n")[0])["error"]
            assert (error["code"], "wait for its client" in error["message"]) == (413, True)
            await stack.until(lambda: not memory.total)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_an_answer_in_one_piece_counts_while_it_grows(kind: str) -> None:
    async def run() -> None:
        async with running(1, burst=5) as stack, stack.http() as client, asyncio.timeout(60):
            memory = stack.service.memory = Memory(1 << 20, 0.5)
            asked: dict[str, Any] = {"max_tokens": TOKENS, "seed": 1, "logprobs": 20, "prompt": list(PROMPT)}
            if kind != "completions":
                message = {"role": "user", "content": "Hello"}
                asked = {"max_tokens": TOKENS, "logprobs": True, "top_logprobs": 20, "messages": [message]}
            answer = await client.post(f"/v1/{kind}", json=asked)
            assert answer.status_code == 413
            await stack.until(lambda: stack.nodes[0].cancels)
            assert not memory.total
            small = await client.post(f"/v1/{kind}", json=asked | {"max_tokens": 20})
            assert small.json()["usage"]["completion_tokens"] == 20
            assert not memory.total

    asyncio.run(run())


def test_a_client_that_leaves_its_answers_unread_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running(1) as stack, asyncio.timeout(60):
            url, loop = urlsplit(stack.url), asyncio.get_running_loop()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
                client.setblocking(False)
                await loop.sock_connect(client, (url.hostname, url.port))
                ask = f"GET /openapi.json HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n"
                await loop.sock_sendall(client, ask.encode() * 300)  # more than the kernel takes
                await stack.until(lambda: stack.server.server_state.connections)
                await stack.until(lambda: not stack.server.server_state.connections)

    monkeypatch.setattr(web.protocol, "UNREAD_S", 0.3)
    asyncio.run(run())


def test_a_client_that_leaves_without_having_read_is_noticed() -> None:
    async def run() -> None:
        async with running(1, burst=5) as stack, asyncio.timeout(30):
            async with unread(stack):
                stack.nodes[0].held = True
            await stack.until(lambda: not stack.dispatcher.router.live)
            await stack.until(lambda: stack.nodes[0].cancels)
            assert b"kevlarflow_client_disconnects_total 1.0" in stack.service.metrics.render()[0]

    asyncio.run(run())


def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running(1, burst=5, keep_alive_s=0.05) as stack, asyncio.timeout(30), unread(stack):
            stack.nodes[0].held = True
            await stack.until(lambda: not stack.dispatcher.router.live)
            await stack.until(lambda: stack.nodes[0].cancels)

    monkeypatch.setattr(web.protocol, "UNREAD_S", 0.3)
    asyncio.run(run())


def test_a_defect_in_one_stream_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running(1) as stack, stack.openai() as client, asyncio.timeout(30):
            take = web.gateway.http.event_stream.EventStream.events

            def broken(self: Any, index: int, piece: Any) -> bytes:
                if piece.tokens[0].position == 5 and piece.tokens[0].token == reference(PROMPT, 7, 6)[5]:
                    raise RuntimeError("a defect")
                return take(self, index, piece)

            monkeypatch.setattr(web.gateway.http.event_stream.EventStream, "events", broken)

            async def text(seed: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=list(PROMPT), seed=seed, max_tokens=20, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            good, bad = await asyncio.gather(text(1), text(7), return_exceptions=True)
            assert good == stack.service.model.decode(reference(PROMPT, 1, 20))
            assert "internal error" in str(bad)

    asyncio.run(run())
