"""JSON with long lists in it, in pieces: none of them keeps the event loop for long (pure).

Log probabilities are nearly all of the answers that have them, up to some kilobytes for a token. Their entries are
encoded as they come and kept as bytes; what is written at the end takes the lists as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

PIECE_BYTES = 64 << 10

_to_json = msgspec.json.Encoder().encode
_HOLE = msgspec.Raw(b"\0")  # JSON has no such byte: where a list is to go


def one_line(data: bytes) -> bytes:
    """JSON of one line, also for clients that take what Unicode calls a line end for one (Python's splitlines)."""
    if data.isascii():
        return data
    return (
        data.replace(b"\xe2\x80\xa8", b"\\u2028")
        .replace(b"\xe2\x80\xa9", b"\\u2029")
        .replace(b"\xc2\x85", b"\\u0085")
    )


class LongList:
    """A list that only grows, as JSON. May stand anywhere in a value that `in_pieces` or `encode` writes."""

    __slots__ = ("_full", "_last", "size")

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        self._full: list[bytes] = []
        self._last = bytearray()
        self.size = 0  # bytes
        self.extend(entries)

    def __bool__(self) -> bool:
        return self.size > 0

    def extend(self, entries: Iterable[Any]) -> int:
        """Returns how many bytes that keeps."""
        before = self.size
        for entry in entries:
            data = one_line(_to_json(entry))
            self._last += b"," + data if self.size else data
            self.size += len(data) + 1
            if len(self._last) >= PIECE_BYTES:
                self._full.append(bytes(self._last))
                self._last = bytearray()
        return self.size - before

    def join(self, other: LongList) -> None:
        """Take the entries of `other` in, after its own."""
        if other:
            if self._last:
                self._full.append(bytes(self._last))
            self._full += [b",", *other._full] if self.size else other._full
            self._last = bytearray(other._last)
            self.size += other.size

    def pieces(self) -> Iterator[bytes]:
        yield b"["
        yield from self._full
        yield bytes(self._last) + b"]"


def in_pieces(value: Any) -> Iterator[bytes]:
    """The JSON of `value`, on one line."""
    lists: list[LongList] = []

    def leave_out(found: Any) -> msgspec.Raw:
        if not isinstance(found, LongList):
            raise TypeError(f"no JSON is made of a {type(found).__name__}")
        lists.append(found)
        return _HOLE

    first, *others = one_line(msgspec.json.encode(value, enc_hook=leave_out)).split(b"\0")
    yield first
    for found, rest in zip(lists, others, strict=True):
        yield from found.pieces()
        yield rest


def encode(value: Any) -> bytes:
    """As `in_pieces`, where it is known to be short."""
    return b"".join(in_pieces(value))


def gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of `PIECE_BYTES` or a little more: of large ones slices, of small ones several."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        for at in range(0, len(piece), PIECE_BYTES):
            part = piece[at : at + PIECE_BYTES]
            waiting.append(part)
            size += len(part)
            if size >= PIECE_BYTES:
                yield b"".join(waiting)
                waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
