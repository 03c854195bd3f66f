"""Requests that are sent before others are answered, or just as the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest

from tests.web.gateway.raw_http import ASK, CLOSE, STREAM, connected, post, request, split
from tests.web.gateway.stack import Stack, with_stack
from web.gateway.http.connection import StreamProtocol
from web.http1 import WAITING_BYTES_MAX

READ_BYTES = 256 * 1024  # of asyncio, at once
TINY = b"GET / HTTP/1.1\r\nhost:x\r\n\r\n"  # without a key
TURN_CPU_S_MAX = 0.06
LIVE = request(b"GET", b"/livez")


def the_protocol(stack: Stack) -> StreamProtocol:
    (protocol,) = stack.server.server_state.connections
    assert isinstance(protocol, StreamProtocol)
    return protocol


def counted_heads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each head was parsed."""
    heads: list[float] = []
    parsed = StreamProtocol.on_headers_complete

    def counting(protocol: StreamProtocol) -> None:
        heads.append(time.monotonic())
        parsed(protocol)

    monkeypatch.setattr(StreamProtocol, "on_headers_complete", counting)
    return heads


def hold(stack: Stack, held: bool) -> None:
    for node in stack.nodes:
        node.held = held


def test_what_is_sent_ahead_waits_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, each of these took a kilobyte and more."""
    heads = counted_heads(monkeypatch)

    async def body(stack: Stack) -> None:
        hold(stack, True)
        async with connected(stack) as (reader, writer):
            writer.write(post(ASK))
            await stack.until(lambda: stack.dispatcher.router.live == 1)
            count = 200_000
            writer.write(TINY * count + request(b"GET", b"/nowhere", CLOSE))
            await stack.until(lambda: the_protocol(stack).flow.read_paused or len(heads) > 1)
            await asyncio.sleep(0.1)
            assert len(heads) == 1
            assert len(the_protocol(stack)._waiting) <= WAITING_BYTES_MAX + READ_BYTES
            hold(stack, False)
            line = await reader.readuntil(b"\r\n")
            while line.startswith(b"HTTP/1.1 100"):  # the gateway looks whether it reads
                await reader.readuntil(b"\r\n")
                line = await reader.readuntil(b"\r\n")
            assert line.startswith(b"HTTP/1.1 200 ")
            writer.transport.abort()

    with_stack(body)


def test_many_requests_at_once_leave_turns_to_others() -> None:
    async def body(stack: Stack) -> None:
        longest = 0.0

        async def ticking() -> None:
            nonlocal longest
            while True:
                before = time.thread_time()  # others may have the processor meanwhile
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - before)

        async with connected(stack) as (reader, writer):
            others = asyncio.create_task(ticking())
            # The loop that sends is the same: it is all in the kernel or waits here.
            writer.write(TINY * 100_000)
            await reader.readuntil(b"401")
            await asyncio.sleep(0.5)
            others.cancel()
            writer.transport.abort()
        assert longest < TURN_CPU_S_MAX

    with_stack(body)


def test_answers_come_in_order_whatever_the_bodies_are(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = counted_heads(monkeypatch)
    chunked = request(b"POST", b"/v1/completions", b"transfer-encoding: chunked\r\n")
    padded = ASK[:-1] + b"\r\n\r\n" + ASK[-1:]  # what ends a head may stand in a body
    chunks = chunked + b"%X\r\n%b\r\n0\r\n\r\n" % (len(padded), padded)
    sent = [post(padded), chunks, LIVE, post(STREAM), request(b"GET", b"/nowhere"), chunks, b"\r\n" + LIVE]
    statuses = [200, 200, 200, 200, 404, 200, 200]

    async def body(stack: Stack) -> None:
        for size in (1, 7, 1 << 20):
            heads.clear()
            async with connected(stack) as (reader, writer):
                whole = b"".join(sent) + request(b"GET", b"/version", CLOSE) + LIVE
                for at in range(0, len(whole), size):
                    writer.write(whole[at : at + size])
                    await asyncio.sleep(0)
                replies = split(await reader.read())
            assert [reply.status for reply in replies] == [*statuses, 200]
            assert "version" in replies[-1].json
            assert len(heads) == len(replies)  # what follows `connection: close` is nobody's request

    with_stack(body)


def test_an_answer_arrives_although_more_has_been_sent() -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            writer.write(request(b"GET", b"/livez", CLOSE) + TINY * 200_000)
            (reply,) = split(await reader.read())
        assert reply.status == 200

    with_stack(body)


def test_who_sent_ahead_and_shut_its_side_gets_all_answers() -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            writer.write(LIVE * 3000 + LIVE[:-2])  # more than may wait; the last one is not whole
            writer.write_eof()
            replies = split(await reader.read())
        assert [reply.status for reply in replies if reply.status != 100] == [200] * 3000

    with_stack(body)


def test_who_leaves_what_it_sent_ahead_is_noticed() -> None:
    async def body(stack: Stack) -> None:
        hold(stack, True)
        async with connected(stack) as (_, writer):
            writer.write(post(ASK) + TINY * 200_000)
            await stack.until(lambda: stack.dispatcher.router.live == 1)
            writer.transport.abort()
        await stack.until(lambda: stack.dispatcher.router.live == 0)

    with_stack(body)


def test_nothing_holds_a_connection_that_was_reset() -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            writer.write(LIVE)
            await reader.readuntil(b"ok")
            protocol = the_protocol(stack)
            timer = protocol.timeout_keep_alive_task
            assert timer is not None
            linger = b"\x01\0\0\0\0\0\0\0"  # on, 0 s: a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            await stack.until(lambda: not stack.server.server_state.connections)
            assert timer.cancelled()

    with_stack(body)


@pytest.mark.parametrize(
    ("sent", "status"), [(LIVE, 200), (request(b"GET", b"/readyz"), 503), (post(ASK), 503)]
)
def test_what_was_sent_before_a_stop_is_answered(sent: bytes, status: int) -> None:
    async def body(stack: Stack) -> None:
        async with contextlib.AsyncExitStack() as opened:
            ends = [await opened.enter_async_context(connected(stack)) for _ in range(4)]
            for reader, writer in ends:
                writer.write(LIVE)
                assert len(split(await reader.readuntil(b"}"))) == 1
            for number, (_, writer) in enumerate(ends):
                writer.write(sent * (number + 1))
            stack.stop()
            for protocol in list(stack.server.server_state.connections):
                protocol.shutdown()  # as the server does, whose turn may come before theirs
            for number, (reader, _) in enumerate(ends):
                replies = split(await reader.read())
                assert [reply.status for reply in replies] == [status] * (number + 1)
                assert replies[-1].headers["connection"] == "close"
                assert status == 200 or replies[-1].headers["retry-after"] == "1"

    with_stack(body)


def test_who_waits_to_be_accepted_at_a_stop_is_answered() -> None:
    async def body(stack: Stack) -> None:
        host, port = stack.url.removeprefix("http://").split(":")
        waiting = [socket.create_connection((host, int(port))) for _ in range(20)]
        for one in waiting:
            one.sendall(LIVE)
        stack.stop()
        for one in waiting:
            reader, writer = await asyncio.open_connection(sock=one)
            (reply,) = split(await reader.read())
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            writer.close()

    with_stack(body)


def test_who_has_asked_for_nothing_does_not_hold_up_a_stop() -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (idle, _), connected(stack) as (begun, writer):
            writer.write(LIVE[:-2])
            await stack.until(
                lambda: any(
                    isinstance(c, StreamProtocol) and not c._whole
                    for c in stack.server.server_state.connections
                )
            )
            stack.stop()
            began = time.monotonic()
            assert (await idle.read(), await begun.read()) == (b"", b"")
            assert time.monotonic() - began < 3

    with_stack(body)
