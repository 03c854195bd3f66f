"""Frames: what is sent is what arrives, and nothing else ever parses."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.contract.ids import Member
from controlplane.contract.requests import Sampling
from dataplane.core.messages import Admit, Block, Fence, KvMeta, Ping, StepMeta, pack_rows
from dataplane.core.request import pack_tokens, unpack_tokens
from dataplane.node import Node
from dataplane.transport.frames import BadFrame, Buffer, ForeignFrame, decode, encode, join

STEP = StepMeta(
    "p0",
    Fence(7, 2),
    3,
    pack_rows([(1, 0, 4, True)]),
    (Admit(1, Sampling(8, seed=3, logit_bias=((5, 1.0),)), pack_tokens([1, 2]), b""),),
    (9,),
)


@pytest.mark.parametrize("meta", [STEP, Ping(), KvMeta("p1", Fence(1), (Block(2, 0, 16, 123),))])
@pytest.mark.parametrize("payload", [b"", b"x" * 1000])
def test_round_trip(meta: StepMeta, payload: bytes) -> None:
    frame = decode(join(encode(meta, payload)))
    assert frame.meta == meta
    assert bytes(frame.payload) == payload


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_what_stays_in_memory_is_read_once_and_its_header_is_still_checked(at: int, flip: int) -> None:
    payload = b"activations" * 9
    data = bytearray(join(encode(STEP, payload, in_memory=True)))
    assert bytes(decode(data).payload) == payload
    at %= len(data) - len(payload)
    if at in (28, 29, 30, 31):
        return  # reserved
    data[at] ^= flip
    with pytest.raises(BadFrame):
        decode(data)


def other_version(part: int) -> bytearray:
    data = bytearray(join(encode(STEP, b"activations")))
    data[part] += 1
    return data


@pytest.mark.parametrize(("data", "foreign"), [
    (other_version(0), True),
    (other_version(2), True),
    (other_version(40), False),
    (b"KF", False),
])  # fmt: skip
def test_a_link_with_frames_of_another_version_is_closed(data: Buffer, foreign: bool) -> None:
    """One that was damaged on its way is dropped, as the next one may be whole; of another version all are."""
    with pytest.raises(BadFrame) as caught:
        decode(data)
    assert isinstance(caught.value, ForeignFrame) == foreign

    refused: list[tuple[Member, str]] = []

    class Transport:
        def refuse(self, peer: Member, reason: str) -> None:
            refused.append((peer, reason))

    node: Any = object.__new__(Node)
    node._transport, node._bad_frames = Transport(), 0
    node._on_message(Member("n1", "a"), memoryview(data))
    assert node._bad_frames == 1
    assert [peer for peer, _ in refused] == [Member("n1", "a")] * foreign
    if foreign:
        assert "expected b'KF' version" in refused[0][1]


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_flipped_byte_is_noticed(at: int, flip: int) -> None:
    data = bytearray(join(encode(STEP, b"activations" * 9)))
    at %= len(data)
    if at in (28, 29, 30, 31):
        return  # reserved
    data[at] ^= flip
    with pytest.raises(BadFrame):
        decode(data)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_block_that_carries_its_own_checksum_is_not_read_for_another(at: int, flip: int) -> None:
    block = bytes(range(256)) * 4
    data = bytearray(join(encode(KvMeta("p1", Fence(1), (Block(2, 0, 16, zlib.crc32(block)),)), block)))
    at %= len(data)
    if at in (28, 29, 30, 31):
        return  # reserved
    data[at] ^= flip
    if at < len(data) - len(block):
        with pytest.raises(BadFrame):
            decode(data)
    else:
        frame = decode(data)
        assert isinstance(frame.meta, KvMeta)
        assert zlib.crc32(frame.payload) != frame.meta.blocks[0].checksum


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(data)


def test_a_cut_frame_is_noticed() -> None:
    data = join(encode(STEP, b"activations"))
    for end in range(len(data)):
        with pytest.raises(BadFrame):
            decode(data[:end])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_tokens_pack(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens
