"""Every answer has an X-Request-Id, the client's own where it can be, and so have the log lines of its request."""

from __future__ import annotations

import json
import re

import pytest
import structlog
from structlog.testing import capture_logs

from tests.web.gateway.raw_http import (
    ASK,
    AUTH,
    CLOSE,
    STREAM,
    connected,
    post,
    request,
    split,
    talk,
)
from tests.web.gateway.stack import Stack, with_stack

MADE = re.compile("[0-9a-f]{32}")
ASKED = [
    (200, post(ASK, CLOSE)),
    (200, post(STREAM, CLOSE)),
    (200, request(b"GET", b"/livez", CLOSE)),
    (200, request(b"HEAD", b"/v1/models", CLOSE)),
    (204, request(b"OPTIONS", b"/v1/models", CLOSE)),
    (400, post(b"{", CLOSE)),
    (401, post(ASK, CLOSE).replace(AUTH, b"")),
    (404, request(b"GET", b"/nowhere", CLOSE)),
    (405, request(b"DELETE", b"/v1/models", CLOSE)),
    (413, request(b"POST", b"/v1/completions", b"content-length: 99999999\r\n" + CLOSE)),
    (415, post(ASK, b"content-encoding: br\r\n" + CLOSE)),
]
NO_REQUESTS = [
    (400, b"nonsense\r\n\r\n"),
    (431, b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"),
    (501, request(b"POST", b"/v1/completions", b"transfer-encoding: gzip\r\n")),
    (501, request(b"POST", b"/v1/completions", b"transfer-encoding: gzip\r\nx-request-id: mine\r\n")),
    (400, b"GET / HTTP/1.1\r\nx-request-id: mine\r\nx: y\r\nno header\r\n\r\n"),
    (505, b"GET / HTTP/2.0\r\nhost: x\r\nx-request-id: mine\r\n\r\n"),
    (431, b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: no good\r\nhost: y\r\n\r\n"),
]


GIVEN = ["", "abc/1=?", "550e8400-e29b-41d4-a716-446655440000", "no good", "x" * 129]


@pytest.mark.parametrize("given", GIVEN)
def test_each_answer_has_one(given: str) -> None:
    async def body(stack: Stack) -> None:
        line = f"x-request-id: {given}\r\n".encode() if given else b""
        for status, sent in ASKED:
            head = sent.replace(b"host: x\r\n", b"host: x\r\n" + line)
            with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
                (reply,) = split(await talk(stack, head), sent.startswith(b"HEAD"))
            assert reply.status == status
            found = reply.headers["x-request-id"]
            assert found == given if given[:3] in ("abc", "550") else MADE.fullmatch(found)
            polled = sent.startswith((b"GET", b"HEAD", b"OPTIONS")) and status < 400
            told = [entry["status"] for entry in lines if entry.get("request_id") == found]
            assert told == ([] if polled else [status])

    with_stack(body)


def test_what_is_no_request_has_one() -> None:
    async def body(stack: Stack) -> None:
        for status, sent in NO_REQUESTS:
            with capture_logs() as lines:
                (reply,) = split(await talk(stack, sent))
            assert reply.status == status
            found = reply.headers["x-request-id"]
            assert found == "mine" if b"mine" in sent else MADE.fullmatch(found)
            assert [entry["request_id"] for entry in lines] == [found]

    with_stack(body)


def test_a_refusal_has_not_the_id_of_the_request_before() -> None:
    async def body(stack: Stack) -> None:
        async with connected(stack) as (reader, writer):
            writer.write(request(b"GET", b"/livez", b"x-request-id: first\r\n"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"x-request-id: first" in head
            writer.write(b"nonsense\r\n\r\n")
            rest = await reader.read()
        assert b"400 Bad Request" in rest
        assert b"x-request-id: first" not in rest

    with_stack(body)


def test_the_answers_id_is_the_clients_own() -> None:
    async def body(stack: Stack) -> None:
        for given, said, wanted in (
            ("abc/1=?", "", "cmpl-abc/1=?"),
            ("a", "b+c", "cmpl-b+c"),
            ("a", "no good", "cmpl-a"),
        ):
            ask = json.dumps(json.loads(ASK) | ({"request_id": said} if said else {})).encode()
            sent = post(ask, f"x-request-id: {given}\r\n".encode() + CLOSE)
            (reply,) = split(await talk(stack, sent))
            assert (reply.json["id"], reply.headers["x-request-id"]) == (wanted, given)

    with_stack(body)


def test_requests_of_one_connection_have_their_own() -> None:
    async def body(stack: Stack) -> None:
        asked = [post(ASK, f"x-request-id: id-{n}\r\n".encode()) for n in range(3)] + [post(ASK, CLOSE)]
        replies = split(await talk(stack, b"".join(asked)))
        assert [reply.headers["x-request-id"] for reply in replies[:3]] == ["id-0", "id-1", "id-2"]
        assert MADE.fullmatch(replies[3].headers["x-request-id"])
        assert [json.loads(reply.body)["id"] for reply in replies[:3]] == [
            "cmpl-id-0",
            "cmpl-id-1",
            "cmpl-id-2",
        ]

    with_stack(body)
