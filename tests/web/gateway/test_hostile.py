"""Clients that are hostile or careless: nobody else may notice them, and nothing may grow with what they send."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import msgspec
import pytest

import web.protocol
from controlplane.contract import rpc
from tests.web.gateway.stack import KEY, MODEL, Stack, running, stream
from web.gateway.errors import ApiError
from web.gateway.openai.requests import INT64_MAX, ChatRequest, CompletionRequest, DetokenizeRequest, parse
from web.protocol import HEAD_BYTES_MAX

LIMIT_S = 20
ITEMS = 150_000
PARSE_LIMIT_S = 1.0  # three errors an item took over 3 s, and hundreds of megabytes


def with_stack(body: Callable[[Stack], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running() as stack, asyncio.timeout(LIMIT_S):
            await body(stack)

    asyncio.run(run())


async def connect(
    stack: Stack, address: str = "127.0.0.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """`address`: of the client."""
    host, port = stack.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), local_addr=(address, 0))


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection ends, however it ends."""
    out = bytearray()
    try:
        while piece := await reader.read(65536):
            out += piece
    except ConnectionError:
        pass  # it was closed while we were still sending: an end like any other
    return bytes(out)


@pytest.mark.parametrize("top_k", [INT64_MAX + 1, 2**64, 10**30])
def test_no_number_of_a_client_breaks_the_stream_to_a_scheduler(top_k: int) -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            ask = {"model": MODEL, "prompt": "a", "max_tokens": 2}
            refused = await client.post("/v1/completions", json=ask | {"top_k": top_k})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")
            largest = await client.post("/v1/completions", json=ask | {"top_k": INT64_MAX})
            assert largest.status_code == 200
        submits = [submit for node in stack.nodes for submit in node.submits]
        assert [s.sampling.top_k for s in submits] == [stack.service.model.vocab_size]
        assert rpc.decode_gateway_message(rpc.encode(submits[0])) == submits[0]
        assert stack.dispatcher.links.reconnects == 0

    with_stack(body)


@pytest.mark.parametrize(
    ("kind", "before", "item", "after"),
    [
        (CompletionRequest, b'{"prompt":[', b"null", b"]}"),
        (CompletionRequest, b'{"prompt":[[', b'"a"', b"]]}"),
        (CompletionRequest, b'{"prompt":"a","stop":[', b"0", b"]}"),
        (CompletionRequest, b'{"prompt":"a","stop_token_ids":[', b"-1", b"]}"),
        (ChatRequest, b'{"messages":[', b"null", b"]}"),
        (ChatRequest, b'{"messages":[{"role":"user","content":[', b"{}", b"]}]}"),
        (DetokenizeRequest, b'{"tokens":[', b"true", b"]}"),
    ],
)
def test_a_long_list_of_mistakes_is_given_up_at_the_first(
    kind: type[CompletionRequest] | type[ChatRequest] | type[DetokenizeRequest],
    before: bytes,
    item: bytes,
    after: bytes,
) -> None:
    raw = before + b",".join([item] * ITEMS) + after
    started = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        parse(kind, raw)
    assert time.perf_counter() - started < PARSE_LIMIT_S
    assert (caught.value.status, caught.value.param) == (400, json.loads(before + item + after).popitem()[0])


def test_too_many_mistakes_in_an_object_are_counted_only() -> None:
    bias = {f"a{number}": None for number in range(ITEMS)}
    with pytest.raises(ApiError, match=f"{ITEMS} mistakes"):
        parse(CompletionRequest, msgspec.json.encode({"prompt": "a", "logit_bias": bias}))


def test_a_message_may_come_back_as_it_was_given() -> None:
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": None}
    request = parse(ChatRequest, json.dumps({"messages": [answer]}).encode())
    assert request.messages[0].text == "x"
    with pytest.raises(ApiError, match="tool_calls"):
        parse(ChatRequest, json.dumps({"messages": [answer | {"tool_calls": [{}]}]}).encode())


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /livez HTTP/1.1\r\nhost: x\r\n",  # header after header
        b"GET /livez HTTP/1.1\r\nx: ",  # one header
        b"GET /",  # one address
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",  # trailers
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;",  # an extension of a chunk
    ],
)
def test_an_endless_head_is_cut_off(beginning: bytes) -> None:
    endless = b"x-y: %s\r\n" % (b"a" * 500) if beginning.endswith(b"\r\n") else b"a" * 500

    async def body(stack: Stack) -> None:
        reader, writer = await connect(stack)
        writer.write(beginning)
        sent = 0
        try:
            while sent < 64 * HEAD_BYTES_MAX:
                writer.write(endless * 40)
                sent += len(endless) * 40
                await writer.drain()
        except ConnectionError:
            pass  # as it should be
        answer = await rest(reader)
        writer.close()
        if beginning.startswith(b"GET") and answer:  # a reset may overtake it
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 431
        await stack.until(lambda: not stack.server.server_state.connections)

    with_stack(body)


def test_one_client_leaves_connections_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has three quarters of what there may be, and makes room for itself before anybody else has to."""
    monkeypatch.setattr(web.protocol, "connections_max", lambda: 12)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n" % KEY.encode()
    ask = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"

    async def body(stack: Stack) -> None:
        open_now = stack.server.server_state.connections
        other = await connect(stack, "127.0.0.2")
        await stack.until(lambda: open_now)
        flood = [await connect(stack) for _ in range(30)]  # of whom nobody asks for anything
        await stack.until(lambda: len(open_now) == 10)
        other[1].write(ask)  # the oldest of all that were idle, and still there
        assert b"200 OK" in await other[0].readuntil(b"\r\n\r\n")
        for _, writer in flood:
            writer.close()
        await stack.until(lambda: len(open_now) == 1)
        busy = []
        for number in range(9):
            busy.append(await connect(stack))
            busy[-1][1].write(head + b"content-length: 9\r\n\r\n")
            await stack.until(lambda number=number: len(stack.server.server_state.tasks) > number)
        for _ in range(3):
            busy.append(await connect(stack))
            answer = await busy[-1][0].readuntil(b"try again")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"this client has as many connections" in answer
        late = await connect(stack, "127.0.0.3")
        late[1].write(ask)
        assert b"200 OK" in await late[0].readuntil(b"\r\n\r\n")
        for _, writer in (other, late, *busy):
            writer.close()
        await stack.until(lambda: not open_now)

    with_stack(body)


def test_who_has_gone_keeps_nobody_out_until_the_loop_is_told() -> None:
    """Many may come in the turn of the loop that sees the end of many: each finds the places of those who have gone."""

    async def body(stack: Stack) -> None:
        open_now = stack.server.server_state.connections
        gone = [await connect(stack) for _ in range(5)]
        await stack.until(lambda: len(open_now) == 5)
        counts = web.protocol.BoundedProtocol._of_clients[stack.server.server_state]
        assert counts == {"127.0.0.1": 5}
        for connection in list(open_now):  # as the loop does where it reads the end
            assert connection.eof_received() is False
            connection.transport.close()
        assert (counts, len(open_now)) == ({}, 5)
        await stack.until(lambda: not open_now)
        assert counts == {}
        for _, writer in gone:
            writer.close()

    with_stack(body)


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3::9", 1), "20010db800010002/64"),
        (("2001:db8:1:2:ffff::", 1), "20010db800010002/64"),
        (("2001:db8:1:3::9", 1), "20010db800010003/64"),
        (("fe80::1%eth0", 1), "fe80000000000000/64"),
        (("a name", 1), ""),
        (None, ""),
    ],
)
def test_who_is_one_client(peer: tuple[str, int] | None, client: str) -> None:
    assert web.protocol.client_of(peer) == client


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.protocol, "HEAD_S", 0.2)

    async def body(stack: Stack) -> None:
        reader, writer = await connect(stack)
        writer.write(sent)
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 408 ") if sent else answer == b""
        writer.close()

    with_stack(body)


def test_a_dribbling_client_cannot_keep_a_connection_after_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web.protocol, "HEAD_S", 0.3)

    async def body(stack: Stack) -> None:
        reader, writer = await connect(stack)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        ended = asyncio.create_task(rest(reader))
        while not ended.done():
            writer.write(b"G" if not writer.is_closing() else b"")
            await asyncio.wait({ended}, timeout=0.05)
        writer.close()

    with_stack(body)


def test_bounds_of_heads_leave_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow answer, a large body, and requests that were sent ahead."""
    monkeypatch.setattr(web.protocol, "HEAD_S", 0.2)

    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            for node in stack.nodes:
                node.step_s = 0.02
            events = await stream(client, {"prompt": "a", "max_tokens": 30})
            assert (events.status, events.done, events.errors) == (200, True, [])
            large = {"model": MODEL, "prompt": [1] * 1_000_000}
            answer = await client.post("/v1/completions", json=large)
            assert "maximum context length" in answer.json()["error"]["message"]
        reader, writer = await connect(stack)
        ask = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n" % KEY.encode()
        writer.write((ask + b"\r\n") * 300 + ask + b"connection: close\r\n\r\n")
        assert (await rest(reader)).count(b"HTTP/1.1 200 OK") == 301
        writer.close()

    with_stack(body)


def test_what_is_not_http_is_told_so_in_json() -> None:
    async def body(stack: Stack) -> None:
        reader, writer = await connect(stack)
        writer.write(b"BREW /coffee HTTP/1.1\r\n\r\n")
        head, _, text = (await rest(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(text)["error"]["type"] == "BadRequestError"
        writer.close()

    with_stack(body)
