"""Reading the body of a request, within bounds of time and size, also of what it decompresses to."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator

from starlette.requests import ClientDisconnect, Request

GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
RAW_DEFLATE = -zlib.MAX_WBITS
PIECE_BYTES = 1 << 18
CODINGS = "gzip, deflate, identity"


class BodyError(Exception):
    """The request ends with this HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


async def read_body(
    request: Request, bytes_max: int, limit_s: float, keep: Callable[[int], None] = lambda count: None
) -> bytes:
    """The body, decoded, refused as soon as it exceeds its bound (a client may not name a length).

    `keep` is told of bytes before they are kept, and may raise. Raises BodyError.
    """
    parts: list[bytes] = []
    size = received = 0
    decode = _decoder(", ".join(request.headers.getlist("content-encoding")))
    try:
        async with asyncio.timeout(limit_s):
            async for raw in request.stream():
                received += len(raw)
                for part in decode(raw):
                    size += len(part)
                    if max(size, received) > bytes_max:
                        raise BodyError(413, f"the body exceeds {bytes_max} bytes")
                    keep(len(part))
                    parts.append(part)
    except TimeoutError:
        raise BodyError(408, f"the body did not arrive within {limit_s:g} s") from None
    except ClientDisconnect:
        raise BodyError(400, "the body ended early") from None  # nobody will read it
    return b"".join(parts)


def _decoder(coding: str) -> Callable[[bytes], Iterator[bytes]]:
    match [name for part in coding.lower().split(",") if (name := part.strip()) not in ("", "identity")]:
        case []:
            return lambda raw: iter((raw,))
        case ["gzip" | "x-gzip" | "deflate" as known]:
            return _Inflater(known).pieces
    raise BodyError(415, f"Content-Encoding {coding[:40]!r} is not supported: {CODINGS}")


class _Inflater:
    """`pieces` gives at most so much at a time that a bound can be looked at between; its end is that of the input."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._zlib = zlib.decompressobj(GZIP_OR_ZLIB)
        self._begun = False
        self._head = b""  # the first byte, while it is alone: two tell which format it is

    def pieces(self, raw: bytes) -> Iterator[bytes]:
        data = self._head + raw
        if raw and len(data) < 2 and not self._begun:
            self._head = data
            return
        self._head = b""
        if not raw:  # the end of the body
            if data or (self._begun and not self._zlib.eof):
                raise BodyError(400, f"the body is not whole {self._coding}")
            return
        while True:
            if self._zlib.eof:  # one more member, as gzip allows, or zeros that fill a block
                data = data.lstrip(b"\0") if self._coding != "deflate" else data
                if not data:
                    yield data  # what has come is counted
                    return
                self._zlib = zlib.decompressobj(GZIP_OR_ZLIB)
            piece = self._inflate(data)
            yield piece
            data = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
            if not data and (self._zlib.eof or len(piece) < PIECE_BYTES):
                return

    def _inflate(self, data: bytes) -> bytes:
        try:
            piece = self._zlib.decompress(data, PIECE_BYTES)
        except zlib.error:
            if self._begun or self._coding != "deflate":
                raise BodyError(400, f"the body is not valid {self._coding}") from None
            # Deflate without zlib's head, as some clients send it.
            self._zlib, self._begun = zlib.decompressobj(RAW_DEFLATE), True
            return self._inflate(data)
        self._begun = True
        return piece
