"""Junk of all kinds, as bytes, for whoever reads what others wrote: by itself, and in the places of what is right."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

DEEP = 5000
DIGITS = 5000  # more than the interpreter makes a number of

# Tokens of JSON, and what is not quite one.
JSON = [
    b'"r\xe9paration"', b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'"', b'""',
    b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"[" * DEEP, b'{"a":' * DEEP,
    b"1e999", b"-1e999", b"1e308", b"1e2", b"0.1000000000000000055511151231257827", b"2.0", b"NaN", b"Infinity",
    b"1" + b"0" * 400, b"9" * DIGITS, b"18446744073709551616", b"18446744073709551615", b"9223372036854775808",
    b"-9223372036854775809", b"-1", b"0", b"2", b'"2"', b"null", b"true", b"[]", b"{}", b"[2]", b'{"\xff":1}',
    b'{"a":1,"a":2}', b'[{"stages":[]}]', b"nul", b"\xef\xbb\xbf1",
]  # fmt: skip
# The same in MessagePack.
PACKED = [
    b"\xa1\xe9", b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\xa1\x00", b"\xa0", b"\xa5a",
    b"\x91" * DEEP + b"\xc0", b"\x81\xa1a" * DEEP + b"\xc0", b"\x91" * DEEP,
    b"\xcb\x7f\xf8" + bytes(6), b"\xcb\x7f\xf0" + bytes(6), b"\xcb\xff\xf0" + bytes(6), b"\xcb\x7f\xef" + b"\xff" * 6,
    b"\xcf" + b"\xff" * 8, b"\xcf\x80" + bytes(7), b"\xd3\x80" + bytes(7), b"\xff", b"\x00", b"\x02", b"\xc0", b"\xc3",
    b"\x90", b"\x80", b"\x91\x02", b"\x81\xa1\xff\x01", b"\x81\x90\x01", b"\xc1", b"\xdb\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xd6\xff\x00\x00\x00\x00",
    b"\xc4\x01\xff",
]  # fmt: skip
WHOLE = [b"", b"\0", b" ", bytes(range(256)), b"\x1f\x8b\x08", "{}".encode("utf-16"), *JSON, *PACKED]


def in_json(good: bytes) -> Iterator[bytes]:
    """Junk, parts of `good`, and `good` with junk in a field that nobody knows, and in place of each that is known, at
    every level."""
    yield from WHOLE
    yield from _cut(good)
    for token in JSON:
        yield b'{"unknown":%b,%b' % (token, good[1:])
        yield b'%b,"unknown":%b}' % (good[:-1], token)
        yield b'{"schema":%b,%b' % (token, good[1:])
        yield b'%b,"schema":%b}' % (good[:-1], token)
        yield from (msgspec.json.encode(spoilt) for spoilt in _spoilt(msgspec.json.decode(good), token))


def in_packed(good: bytes) -> Iterator[bytes]:
    """As `in_json`, of MessagePack."""
    yield from WHOLE
    yield from _cut(good)
    for token in PACKED:
        yield good + token
        yield from (msgspec.msgpack.encode(spoilt) for spoilt in _spoilt(msgspec.msgpack.decode(good), token))


def _cut(good: bytes) -> Iterator[bytes]:
    yield from (good[: len(good) * part // 16] for part in range(1, 16))


def _spoilt(value: object, token: bytes) -> Iterator[object]:
    """The value with the token in each of its places, one at a time; beside the last of a list, too."""
    raw = msgspec.Raw(token)
    if isinstance(value, dict):
        for name, item in value.items():
            yield value | {name: raw}
            yield from (value | {name: spoilt} for spoilt in _spoilt(item, token))
        yield value | {"unknown": raw}
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield [*value[:at], raw, *value[at + 1 :]]
            yield from ([*value[:at], spoilt, *value[at + 1 :]] for spoilt in _spoilt(item, token))
        yield [*value, raw]
