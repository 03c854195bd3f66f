"""Requests written by hand over raw sockets, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.web.gateway.stack import KEY, Stack

AUTH = b"authorization: Bearer " + KEY.encode() + b"\r\n"
ASK = json.dumps({"prompt": "a", "max_tokens": 3, "seed": 1}).encode()
STREAM = json.dumps({"prompt": "a", "max_tokens": 3, "seed": 1, "stream": True}).encode()
CLOSE = b"connection: close\r\n"
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def split(data: bytes, head: bool = False) -> list[Reply]:
    """All answers of a connection, bodies as their headers say."""
    replies = []
    while data:
        top, _, data = data.partition(b"\r\n\r\n")
        first, *lines = top.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status, body = int(first.split()[1]), b""
        if head or status in (100, 204):
            pass
        elif "content-length" in headers:
            size = int(headers["content-length"])
            body, data = data[:size], data[size:]
        elif headers.get("transfer-encoding") == "chunked":
            while (size := int((line := data.partition(b"\r\n"))[0], 16)) > 0:
                body, data = body + line[2][:size], line[2][size + 2 :]
            data = line[2][2:]
        else:
            body, data = data, b""
        replies.append(Reply(status, headers, body))
    return replies


def request(
    method: bytes, path: bytes, more: bytes = b"", body: bytes = b"", version: bytes = b"1.1"
) -> bytes:
    length = b"content-length: %d\r\n" % len(body) if body else b""
    return b"%b %b HTTP/%b\r\nhost: x\r\n%b%b%b\r\n%b" % (method, path, version, AUTH, length, more, body)


def post(body: bytes, more: bytes = b"", version: bytes = b"1.1") -> bytes:
    return request(b"POST", b"/v1/completions", more, body, version)


@contextlib.asynccontextmanager
async def connected(stack: Stack) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def talk(stack: Stack, sent: bytes, half_close: bool = False) -> bytes:
    """All that comes until the gateway ends the connection."""
    async with connected(stack) as (reader, writer):
        writer.write(sent)
        if half_close:
            writer.write_eof()
        return await reader.read()
