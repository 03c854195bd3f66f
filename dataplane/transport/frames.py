"""One frame: a fixed header, the message (MessagePack), and its payload (activations or a KV block).

    offset  size  field
    0       2     magic "KF"
    2       1     version
    3       1     0: the checksum covers the payload; 1: the message carries its payload's own (KV blocks), which
                  its receiver checks; 2: the payload never leaves the memory of this host
    4       4     CRC-32, begun with the byte before, of the message and, if that byte is 0, of the payload
    8       8     epoch, also readable without decoding the message
    16      4     length of the message, bytes
    20      8     length of the payload, bytes
    28      4     reserved, 0 (the message starts 32-byte aligned)

Little endian. A frame that does not parse, or whose checksum differs, raises BadFrame and is dropped and
counted by the receiver: a step or copy that is lost is repeated, a wrong one never happens. A link that brings frames
of another version is closed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import msgspec

from controlplane.contract.errors import PeerError
from controlplane.contract.ids import Member
from controlplane.unreadable import UNREADABLE
from dataplane._fast.checksum import crc32
from dataplane.core.messages import KvMeta, Meta, Ping, RestoredMeta, ShardMeta, SurvivorMeta
from dataplane.transport.base import FRAMES_VERSION

HEADER = struct.Struct("<2sBBIQIQI")
MAGIC = b"KF"
VERSION = FRAMES_VERSION
COVERED, CHECKED, IN_MEMORY = range(3)
OF_KV = (KvMeta, ShardMeta, SurvivorMeta, RestoredMeta)  # whose payload is blocks of KV

Buffer = bytes | bytearray | memoryview
Send = Callable[[Member, Meta, Buffer], bool]
"""Sends a message and its payload to a member (possibly oneself). False: it was not sent."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Meta).decode


class BadFrame(PeerError):
    """A peer's frame is corrupted, cut short, or of another version."""


class ForeignFrame(BadFrame):
    """Not a frame of ours, or of another version: so will the next one be. The link is of no use."""


class Frame(msgspec.Struct, frozen=True):
    epoch: int
    meta: Meta
    payload: memoryview


def encode(meta: Meta, payload: Buffer = b"", *, in_memory: bool = False) -> list[Buffer]:
    """The parts of one frame, to be sent in order. The payload is not copied. in_memory: it travels through memory
    that both ends share, where a checksum would find nothing that it would not itself be exposed to."""
    body = _encode(meta)
    data = memoryview(payload).cast("B")
    # KV blocks are most of the bytes on a link: they are not read twice.
    checked = CHECKED if isinstance(meta, OF_KV) else IN_MEMORY if in_memory else COVERED
    checksum = crc32(body, checked)
    if checked == COVERED:
        checksum = crc32(data, checksum)
    epoch = 0 if isinstance(meta, Ping) else meta.fence.epoch
    header = HEADER.pack(MAGIC, VERSION, checked, checksum, epoch, len(body), len(data), 0)
    return [header + body, data] if len(data) else [header + body]


def decode(data: Buffer) -> Frame:
    """Parse one frame. A payload of KV is still to be held against its checksums. Raises BadFrame."""
    view = memoryview(data).cast("B")
    if len(view) < HEADER.size:
        raise BadFrame(f"frame of {len(view)} bytes is shorter than its header")
    magic, version, checked, checksum, epoch, meta_len, payload_len, _ = HEADER.unpack_from(view)
    if magic != MAGIC or version != VERSION:
        raise ForeignFrame(
            f"frame has magic {magic!r} version {version}, expected {MAGIC!r} version {VERSION}"
        )
    if HEADER.size + meta_len + payload_len != len(view):
        raise BadFrame(f"frame of {len(view)} bytes announces {HEADER.size + meta_len + payload_len}")
    body = view[HEADER.size : HEADER.size + meta_len]
    if crc32(body if checked else view[HEADER.size :], checked) != checksum:
        raise BadFrame("frame checksum differs")
    try:
        meta = _decode(body)
    except UNREADABLE as error:
        raise BadFrame(f"frame message: {error}") from error
    if checked > IN_MEMORY or (checked == CHECKED) != isinstance(meta, OF_KV):
        raise BadFrame(f"frame with checks {checked} of a {type(meta).__name__}")
    if not isinstance(meta, Ping) and meta.fence.epoch != epoch:
        raise BadFrame(f"frame header says epoch {epoch}, its message {meta.fence.epoch}")
    return Frame(epoch, meta, view[HEADER.size + meta_len :])


def join(parts: Sequence[Buffer]) -> bytes:
    """The frame as one buffer."""
    return b"".join(parts)
