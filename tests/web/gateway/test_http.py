"""HTTP as clients and proxies speak it: versions, methods, heads, ends, other origins. Over raw sockets."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.web.gateway.raw_http import (
    ASK,
    AUTH,
    CLOSE,
    H2C,
    STREAM,
    connected,
    post,
    request,
    split,
    talk,
)
from tests.web.gateway.stack import Stack, stream, with_stack

GETS = [
    "/livez",
    "/readyz",
    "/health",
    "/version",
    "/load",
    "/metrics",
    "/v1/models",
    "/v1/models/kevlar-demo",
    "/openapi.json",
]


def test_head_is_get_without_a_body() -> None:
    async def body(stack: Stack) -> None:
        more = CLOSE + b"x-request-id: same\r\n"
        for path in GETS:
            (get,) = split(await talk(stack, request(b"GET", path.encode(), more)))
            (head,) = split(await talk(stack, request(b"HEAD", path.encode(), more)), head=True)
            for reply in (get, head):
                reply.headers.pop("date")
            assert (head.status, head.body) == (200, b"")
            if path != "/metrics":  # counts what was asked
                assert head.headers == get.headers
        (missing,) = split(await talk(stack, request(b"HEAD", b"/nowhere", CLOSE)), head=True)
        assert missing.status == 404

    with_stack(body)


def test_head_of_a_stream_takes_it_from_nobody() -> None:
    async def body(stack: Stack) -> None:
        async with stack.http() as client:
            ticket = (await stream(client, {"prompt": "a", "max_tokens": 3})).last_id.partition(".")[0]
            assert (
                (await client.head(f"/v1/streams/{ticket}"))
                .headers["content-type"]
                .startswith("text/event-stream")
            )
            assert (await client.head("/v1/streams/nonsense")).status_code == 404

    with_stack(body)


@pytest.mark.parametrize("method", [b"PUT", b"PATCH", b"DELETE", b"PROPFIND", b"TRACE", b"POST"])
def test_other_methods_are_told_which_there_are(method: bytes) -> None:
    async def body(stack: Stack) -> None:
        (reply,) = split(await talk(stack, request(method, b"/v1/models", CLOSE)))
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert reply.json["error"]["code"] == 405

    with_stack(body)


def test_options() -> None:
    async def body(stack: Stack) -> None:
        for path, allow in (
            (b"/v1/models", "GET, HEAD, OPTIONS"),
            (b"/v1/completions", "OPTIONS, POST"),
            (b"*", None),
            (b"http://elsewhere", None),  # without a path: the server itself
        ):
            (reply,) = split(await talk(stack, request(b"OPTIONS", path, CLOSE)))
            assert reply.status == 204
            assert reply.headers["allow"] == allow or (allow is None and "POST" in reply.headers["allow"])
            assert not any("access-control" in name for name in reply.headers)
        (reply,) = split(await talk(stack, request(b"OPTIONS", b"/nowhere", CLOSE)))
        assert reply.status == 404

    with_stack(body)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/v1/models/", 200),
        (b"//v1//models", 200),
        (b"/v1/%6Dodels", 200),
        (b"http://elsewhere/v1/models", 200),
        (b"/v1/models?limit=3&x", 200),
        (b"http://elsewhere", 404),
        (b"http://elsewhere?x", 404),
        (b"/v1/models/kevlar%2Ddemo", 200),
        (b"/v1/models/org%2Fother", 404),
        (b"/v1/%zz%ff", 404),
        (b"/v1/models%0a", 404),
        (b"/v1/models%0d%0A", 404),
        (b"/v1/models/%00", 404),
        (b"/livez%0A", 404),
        ("/v1/é".encode(), 400),
    ],
)
def test_targets(target: bytes, status: int) -> None:
    async def body(stack: Stack) -> None:
        (reply,) = split(await talk(stack, request(b"GET", target, CLOSE)))
        assert reply.status == status

    with_stack(body)


def test_http_1_0_gets_no_chunks() -> None:
    async def body(stack: Stack) -> None:
        for more in (b"", b"connection: keep-alive\r\n"):
            (whole,) = split(await talk(stack, post(ASK, more, b"1.0")))
            assert (whole.status, whole.headers["connection"]) == (200, "close")
            (streamed,) = split(await talk(stack, post(STREAM, more, b"1.0")))
            assert "transfer-encoding" not in streamed.headers
            assert streamed.body.startswith(b"id: ")
            assert streamed.body.endswith(b"data: [DONE]\n\n")
            chunks = [
                json.loads(line[6:]) for line in streamed.body.splitlines() if line.startswith(b"data: {")
            ]
            assert "".join(c["choices"][0]["text"] for c in chunks) == whole.json["choices"][0]["text"]

    with_stack(body)


@pytest.mark.parametrize(
    "sent", [post(ASK), post(STREAM), post(STREAM, version=b"1.0"), post(ASK) + post(STREAM) + post(ASK)]
)
def test_a_client_that_has_shut_its_side_is_answered(sent: bytes) -> None:
    async def body(stack: Stack) -> None:
        replies = split(await talk(stack, sent, half_close=True))
        assert [reply.status for reply in replies] == [200] * sent.count(b"POST")
        assert replies[-1].body
        assert not stack.server.server_state.connections

    with_stack(body)


def test_a_client_that_shuts_its_side_too_early_is_not_waited_for() -> None:
    async def body(stack: Stack) -> None:
        assert await talk(stack, post(ASK)[:-5], half_close=True) == b""
        assert await talk(stack, b"GET /livez HT", half_close=True) == b""

    with_stack(body)


def test_a_client_that_is_gone_is_noticed_although_it_may_only_have_shut_its_side() -> None:
    async def body(stack: Stack) -> None:
        for node in stack.nodes:
            node.held = True
        for sent in (post(ASK), post(STREAM), post(ASK) + post(ASK)):
            async with connected(stack) as (_, writer):
                writer.write(sent)
                await stack.until(lambda: stack.dispatcher.router.live == 1)
            await stack.until(lambda: stack.dispatcher.router.live == 0)

    with_stack(body)


def test_one_that_waits_for_long_with_its_side_shut_still_gets_its_answer() -> None:
    async def body(stack: Stack) -> None:
        for node in stack.nodes:
            node.held = True
        async with connected(stack) as (reader, writer):
            writer.write(post(ASK))
            writer.write_eof()
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            for node in stack.nodes:
                node.held = False
            replies = [reply for reply in split(await reader.read()) if reply.status != 100]
            assert [reply.status for reply in replies] == [200]

    with_stack(body)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("offer", [H2C, b"connection: upgrade, close\r\nupgrade: websocket\r\n"])
def test_offers_of_other_protocols_are_declined(offer: bytes, at_once: bool) -> None:
    async def body(stack: Stack) -> None:
        sent = post(ASK, offer)
        async with connected(stack) as (reader, writer):
            for part in (sent,) if at_once else (sent[:30], sent[30:-20], sent[-20:-3], sent[-3:]):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if offer is H2C:
                writer.write(request(b"GET", b"/version", CLOSE))
            replies = split(await reader.read())
        assert [reply.status for reply in replies] == [200] * (2 if offer is H2C else 1)
        assert replies[0].json["usage"]["completion_tokens"] == 3

    with_stack(body)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"content-length: 5\r\ntransfer-encoding: chunked\r\n", 400),
        (b"content-length: 5\r\ncontent-length: 6\r\n", 400),
        (b"content-length: -5\r\n", 400),
        (b"content-length : 5\r\n", 400),
        (b"transfer-encoding: gzip, chunked\r\n", 501),
        (b"transfer-encoding: gzip\r\n", 501),
        (b"x: " + b"a" * 70_000 + b"\r\n", 431),
        (b"host: y\r\n", 400),
    ],
)
def test_ambiguous_heads_end_the_connection(head: bytes, status: int) -> None:
    async def body(stack: Stack) -> None:
        sent = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
            + AUTH
            + head
            + b"\r\n0\r\n\r\n"
            + request(b"GET", b"/livez")
        )
        (reply,) = split(await talk(stack, sent))
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert reply.json["error"]["code"] == status

    with_stack(body)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/2.0\r\nhost: x\r\n\r\n", 505),
        (b"GET /livez\r\n\r\n", 505),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n", 501),
    ],
)
def test_versions_and_hosts(sent: bytes, status: int) -> None:
    async def body(stack: Stack) -> None:
        (reply,) = split(await talk(stack, sent))
        assert (reply.status, reply.headers["connection"]) == (status, "close")

    with_stack(body)


def test_who_is_refused_can_read_why_although_more_is_on_its_way() -> None:
    """What is closed with bytes unread is reset: the answer was lost with the connection."""

    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            writer.write(b"nonsense\r\n\r\n" + bytes(8 << 20))
            (reply,) = split(await reader.read())
        assert reply.status == 400

    with_stack(body)


def test_an_answer_is_not_lost_with_a_body_that_nobody_reads() -> None:
    async def body(stack: Stack) -> None:
        head = request(b"POST", b"/v1/completions", CHUNKED + CLOSE)
        for start, status in ((head, 413), (head.replace(AUTH, b""), 401)):
            async with connected(stack) as (reader, writer):
                writer.write(start + b"FFFFFFF\r\n" + bytes(16 << 20))
                (reply,) = split(await reader.read())
            assert reply.status == status

    with_stack(body)


@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", post(ASK, b"transfer-encoding: chunked\r\n")])
def test_what_was_sent_ahead_of_nonsense_is_answered(nonsense: bytes) -> None:
    async def body(stack: Stack) -> None:
        for sent, statuses in (
            (request(b"GET", b"/livez"), [200, 400]),
            (post(ASK) + post(STREAM) + request(b"GET", b"/nowhere"), [200, 200, 404, 400]),
            (post(STREAM, CLOSE), [200]),
        ):
            replies = split(await talk(stack, sent + nonsense))
            assert [reply.status for reply in replies] == statuses
        head = request(b"POST", b"/v1/completions", CHUNKED)
        replies = split(await talk(stack, post(STREAM) + head + b"no size\r\n"))
        assert [reply.status for reply in replies] == [200, 400]
        assert replies[0].body.endswith(b"data: [DONE]\n\n")

    with_stack(body)


def test_http_1_0_is_not_told_to_continue() -> None:
    async def body(stack: Stack) -> None:
        replies = split(await talk(stack, post(ASK, b"expect: 100-continue\r\n", b"1.0")))
        assert [reply.status for reply in replies] == [200]
        replies = split(await talk(stack, post(ASK, b"expect: 100-continue\r\n" + CLOSE)))
        assert [reply.status for reply in replies] == [100, 200]

    with_stack(body)


def test_what_follows_a_refused_request_is_not_done() -> None:
    async def body(stack: Stack) -> None:
        bad = request(b"POST", b"/v1/completions", b"transfer-encoding: gzip\r\ncontent-length: 0\r\n")
        replies = split(await talk(stack, bad.replace(b"content-length: 0\r\n", b"") + post(ASK)))
        assert [reply.status for reply in replies] == [501]
        double = b"GET /livez HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n"
        replies = split(await talk(stack, double + post(ASK)))
        assert [reply.status for reply in replies] == [400]
        assert not any(node.submits for node in stack.nodes)

    with_stack(body)


CHUNKED = b"transfer-encoding: chunked\r\n"


def chunked(body: bytes, extension: bytes = b"", trailers: bytes = b"", size: int = 5) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return chunks + b"0%b\r\n%b\r\n" % (extension, trailers)


@pytest.mark.parametrize(
    "sent",
    [
        chunked(ASK),
        chunked(ASK, size=1),
        chunked(ASK, b';name=value;other="a b"'),
        chunked(ASK, trailers=b"checksum: abc\r\n"),
        b"0000" + chunked(ASK, size=9),
    ],
)
def test_chunks_in_all_forms(sent: bytes) -> None:
    async def body(stack: Stack) -> None:
        head = request(b"POST", b"/v1/completions", CHUNKED)
        replies = split(await talk(stack, head + sent + request(b"GET", b"/livez", CLOSE)))
        assert [reply.status for reply in replies] == [200, 200]
        assert replies[0].json["usage"]["completion_tokens"] == 3

    with_stack(body)


def test_trailers_are_no_headers() -> None:
    """A key, an encoding or an event id that comes behind the body is nothing that anybody has let through."""

    async def body(stack: Stack) -> None:
        for trailer, status in (
            (AUTH, 401),
            (b"content-encoding: br\r\n", 200),
            (b"x-request-id: behind\r\n", 200),
            (b"last-event-id: nonsense\r\n", 200),
            (b"expect: 100-continue\r\n", 200),
        ):
            head = request(b"POST", b"/v1/completions", CHUNKED + CLOSE)
            if trailer == AUTH:
                head = head.replace(AUTH, b"")
            (reply,) = split(await talk(stack, head + chunked(ASK, trailers=trailer)))
            assert reply.status == status
            assert reply.headers["x-request-id"] != "behind"

    with_stack(body)


def preflight(origin: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    return b"OPTIONS %b HTTP/1.1\r\nhost: x\r\norigin: %b\r\n%b%b%b\r\n" % (
        path,
        origin,
        b"access-control-request-method: POST\r\n",
        b"access-control-request-headers: authorization,last-event-id\r\n",
        CLOSE,
    )


def test_origins_are_off_by_default() -> None:
    async def body(stack: Stack) -> None:
        (reply,) = split(await talk(stack, preflight(b"https://a.example")))
        assert reply.status == 204
        (answer,) = split(await talk(stack, post(ASK, b"origin: https://a.example\r\n" + CLOSE)))
        for headers in (reply.headers, answer.headers):
            assert not any("access-control" in name for name in headers)

    with_stack(body)


@pytest.mark.parametrize("origins", [("https://a.example", "http://localhost:3000"), ("*",)])
def test_pages_of_allowed_origins_may_read(origins: tuple[str, ...]) -> None:
    async def body(stack: Stack) -> None:
        everybody = origins == ("*",)
        (reply,) = split(await talk(stack, preflight(b"https://a.example")))
        wanted = "*" if everybody else "https://a.example"
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (204, wanted)
        assert reply.headers["access-control-allow-headers"] == "authorization,last-event-id"
        assert "POST" in reply.headers["access-control-allow-methods"]
        (reply,) = split(await talk(stack, preflight(b"https://b.example")))
        assert ("access-control-allow-origin" in reply.headers) == everybody
        (reply,) = split(await talk(stack, preflight(b"https://a.example", b"/nowhere")))
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (404, wanted)
        said = b"origin: https://a.example\r\n" + CLOSE
        no_key = post(ASK, said).replace(AUTH, b"")
        for sent, status in (
            (post(ASK, said), 200),
            (post(STREAM, said), 200),
            (post(b"{", said), 400),
            (no_key, 401),
        ):
            (answer,) = split(await talk(stack, sent))
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, wanted)
            exposed = answer.headers["access-control-expose-headers"].lower()
            assert {"content-location", "x-request-id", "retry-after"} <= set(exposed.split(", "))
            assert answer.headers.get("vary") == (None if everybody else "Origin")

    with_stack(body, origins=origins)
