"""Bodies of requests over raw sockets: codings, bounds, chunks, those that break off or are not expected."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest

from tests.web.gateway.raw_http import (
    ASK,
    CLOSE,
    STREAM,
    connected,
    post,
    request,
    split,
    talk,
)
from tests.web.gateway.stack import Stack, with_stack
from web.gateway.http.guard import BODY_BYTES_MAX


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        (b"gzip", gzip.compress),
        (b"x-gzip", gzip.compress),
        (b"identity, gzip", gzip.compress),
        (b"GZIP", gzip.compress),
        (b"gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        (b"gzip", lambda data: gzip.compress(data) + bytes(512)),
        (b"gzip", lambda data: gzip.compress(data[:9]) + bytes(7) + gzip.compress(data[9:]) + bytes(7)),
        (b"deflate", zlib.compress),
        (b"deflate", lambda data: zlib.compress(data)[2:-4]),
        (b"identity", bytes),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_compressed_bodies(coding: bytes, encode: Callable[[bytes], bytes], step: int) -> None:
    async def body(stack: Stack) -> None:
        data = encode(ASK)
        chunks = b"".join(
            b"%x\r\n%b\r\n" % (len(p), p) for p in (data[k : k + step] for k in range(0, len(data), step))
        )
        head = b"transfer-encoding: chunked\r\ncontent-encoding: " + coding + b"\r\n" + CLOSE
        sent = request(b"POST", b"/v1/completions", head) + chunks + b"0\r\n\r\n"
        (reply,) = split(await talk(stack, sent))
        assert (reply.status, reply.json["usage"]["completion_tokens"]) == (200, 3)

    with_stack(body)


BOMB = gzip.compress(b" " * (BODY_BYTES_MAX + 1))


@pytest.mark.parametrize(
    ("coding", "data", "status", "words"),
    [
        (b"br", ASK, 415, "br"),
        (b"gzip, gzip", ASK, 415, "gzip, gzip"),
        (b"zstd", ASK, 415, "gzip, deflate, identity"),
        (b"gzip\r\ncontent-encoding: gzip", ASK, 415, "gzip, gzip"),
        (b"gzip", ASK, 400, "not valid gzip"),
        (b"deflate", b"\xff" * 50, 400, "not valid deflate"),
        (b"gzip", gzip.compress(ASK)[:-9], 400, "not whole gzip"),
        (b"gzip", b"\x1f", 400, "not whole gzip"),
        (b"gzip", gzip.compress(ASK) + b"junk", 400, "not valid gzip"),
        (b"gzip", gzip.compress(ASK) + b"\0\0junk", 400, "not valid gzip"),
        (b"gzip", b"\0\0" + gzip.compress(ASK), 400, "not valid gzip"),
        (b"deflate", zlib.compress(ASK) + b"\0\0", 400, "not valid deflate"),
        (b"gzip", gzip.compress(ASK) + bytes(BODY_BYTES_MAX), 413, str(BODY_BYTES_MAX)),
        (b"gzip", BOMB, 413, str(BODY_BYTES_MAX)),
        (b"gzip", gzip.compress(BOMB), 400, "JSON"),
        (b"deflate", zlib.compress(b" " * (BODY_BYTES_MAX * 20)), 413, str(BODY_BYTES_MAX)),
    ],
)
def test_bodies_that_are_refused(coding: bytes, data: bytes, status: int, words: str) -> None:
    async def body(stack: Stack) -> None:
        for path in (b"/v1/completions", b"/tokenize"):
            sent = request(b"POST", path, b"content-encoding: " + coding + b"\r\n" + CLOSE, data)
            (reply,) = split(await talk(stack, sent))
            assert (reply.status, words in reply.json["error"]["message"]) == (status, True), reply.body

    with_stack(body)


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\nhello\n", b"5\r\nhelloX\r\n0\r\n\r\n", b"-1\r\n"])
def test_a_broken_body_is_told_so(chunk: bytes) -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            writer.write(request(b"POST", b"/v1/completions", b"transfer-encoding: chunked\r\n"))
            await stack.until(lambda: stack.server.server_state.tasks)
            writer.write(chunk)
            (reply,) = split(await reader.read())
        assert (reply.status, reply.headers["connection"]) == (400, "close")
        # Never as the answer to a request that was whole.
        for node in stack.nodes:
            node.held = True
        async with connected(stack) as (reader, writer):
            writer.write(post(ASK) + b"nonsense\r\n\r\n")
            await stack.until(lambda: stack.dispatcher.router.live == 1)
            for node in stack.nodes:
                node.held = False
            replies = split(await reader.read())
        assert [reply.status for reply in replies] == [200, 400]

    with_stack(body)


def test_expect_continue() -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            head, _, _ = post(ASK, b"expect: 100-continue\r\n" + CLOSE).rpartition(ASK)
            writer.write(head)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(ASK)
            (reply,) = split(await reader.read())
            assert reply.status == 200
        refused = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n"
        )
        (reply,) = split(await talk(stack, refused))
        assert (reply.status, reply.headers["connection"]) == (401, "close"), (
            "it need not send its body any more"
        )

    with_stack(body)


def test_bodies_where_none_is_expected_and_pipelines() -> None:
    async def body(stack: Stack) -> None:
        sent = request(b"GET", b"/v1/models", body=b"hello") + request(b"HEAD", b"/livez", body=b"hello")
        data = await talk(stack, sent + request(b"GET", b"/version", CLOSE))
        assert data.count(b"HTTP/1.1 200 OK") == 3
        replies = split(await talk(stack, post(STREAM) + post(ASK) + post(STREAM, CLOSE)))
        assert [reply.status for reply in replies] == [200, 200, 200]

    with_stack(body)
