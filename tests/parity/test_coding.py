"""Erasure codes: every loss is restored, with the oracle's bytes, on every instruction set and however work is cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.coding import _native, _oracle
from kernels.coding.codes import Code, TooManyLost, make_code

LEVELS = ["C", "AVX2", "AVX-512", "GFNI"]
SHAPES = [("xor", n, 1) for n in range(1, 9)]
SHAPES += [("rdp", n, 2) for n in range(1, 9)]
SHAPES += [("rs", n, k) for n in range(1, 9) for k in (1, 2, 3)]


@pytest.fixture(params=range(4), ids=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    in_use = _native.set_level(request.param)
    if in_use != request.param:
        _native.set_level(-1)
        pytest.skip(f"this processor has no {LEVELS[request.param]}, at most {LEVELS[in_use]}")
    yield in_use
    _native.set_level(-1)


def _shards(count: int, longest: int, seed: int, unequal: bool = True) -> list[bytearray]:
    numbers = random.Random(seed)
    sizes = [numbers.randrange(longest + 1) if unequal and i else longest for i in range(count)]
    return [bytearray(numbers.randbytes(size)) for size in sizes]


def _parity(code: Code, shards: list[bytearray]) -> list[bytearray]:
    size = code.parity_bytes(max(map(len, shards)))
    return [bytearray(b"\xee" * size) for _ in range(code.parity)]


def _expected(name: str, shards: list[bytearray], parity: int, size: int) -> list[bytes]:
    plain = [bytes(shard) for shard in shards]
    return _oracle.rdp_encode(plain, size) if name == "rdp" else _oracle.rs_encode(plain, parity, size)


def test_parities_by_known_values() -> None:
    """P is the XOR; Q = d0 + 2 d1 + 4 d2 as RAID 6 has it."""
    code, parity = make_code("rs", 3, 2), [bytearray(2), bytearray(2)]
    code.encode([b"\x01\x80", b"\x02\x80", b"\x80\x01"], parity)
    assert parity == [b"\x83\x01", bytes([1 ^ 4 ^ 0x3A, 0x80 ^ 0x1D ^ 4])]


@pytest.mark.parametrize(("name", "data", "parity"), SHAPES)
def test_every_pattern_of_losses_is_restored(name: str, data: int, parity: int) -> None:
    code, shards = make_code(name, data, parity), _shards(data, 331, data)
    checks = _parity(code, shards)
    code.encode(shards, checks)
    whole = [bytes(shard) for shard in [*shards, *checks]]
    for count in range(parity + 1):
        for lost in itertools.combinations(range(data + parity), count):
            left = [
                bytearray(b"\x55" * len(shard)) if i in lost else bytearray(shard)
                for i, shard in enumerate(whole)
            ]
            code.decode(left[:data], left[data:], lost)
            assert [bytes(shard) for shard in left] == whole, lost


@pytest.mark.parametrize(("data", "parity"), [(6, 4), (6, 5), (9, 6), (3, 8)])
def test_many_parities(data: int, parity: int) -> None:
    """More outputs than registers: some patterns of losses, whole vectors and a tail, and updates."""
    code, shards, numbers = make_code("rs", data, parity), _shards(data, 1_300, parity), random.Random(parity)
    checks = _parity(code, shards)
    code.encode(shards, checks)
    assert [bytes(check) for check in checks] == _expected("rs", shards, parity, len(checks[0]))
    added = [bytearray(len(check)) for check in checks]
    for index, shard in enumerate(shards):
        code.update(added, index, shard)
    assert added == checks
    whole = [*shards, *checks]
    for _ in range(20):
        lost = numbers.sample(range(data + parity), numbers.randrange(1, parity + 1))
        left = [bytearray(b"\x55" * len(shard)) if i in lost else shard for i, shard in enumerate(whole)]
        code.decode(left[:data], left[data:], lost)
        assert left == whole, lost


@pytest.mark.parametrize("offset", [0, 32, 64, 13])
@pytest.mark.parametrize(
    ("name", "data", "parity"), [("xor", 9, 1), ("xor", 2, 1), ("rdp", 3, 2), ("rs", 5, 3)]
)
def test_outputs_go_past_the_cache_when_the_caller_says_so(
    name: str, data: int, parity: int, offset: int
) -> None:
    code, shards = make_code(name, data, parity), _shards(data, 3_000, 8)
    expected = _parity(code, shards)
    code.encode(shards, expected, stream=False)
    room = [np.zeros(len(check) + 128, np.uint8) for check in expected]
    checks = [space[-space.ctypes.data % 64 + offset :][: len(expected[0])] for space in room]
    code.encode(shards, checks, stream=True)
    assert [bytes(check) for check in checks] == expected
    for lost in itertools.combinations(range(data), min(parity, data)):
        left = [bytearray(len(shard)) if i in lost else shard for i, shard in enumerate(shards)]
        code.decode(left, checks, lost, stream=True)
        assert left == shards, lost


@pytest.mark.parametrize("lost", [(0, 15), (3, 4), (7, 16), (15, 16), (0, 17), (16, 17)])
def test_sixteen_shards_of_rdp(lost: tuple[int, int]) -> None:
    code, shards = make_code("rdp", 16, 2), _shards(16, 20_000, 3)
    checks = _parity(code, shards)
    code.encode(shards, checks)
    whole = [*shards, *checks]
    left = [bytearray(len(shard)) if i in lost else bytearray(shard) for i, shard in enumerate(whole)]
    code.decode(left[:16], left[16:], lost)
    assert left == whole


def test_parities_that_are_lost_need_no_buffer() -> None:
    for name in ("rdp", "rs"):
        code, shards = make_code(name, 4, 2), _shards(4, 500, 9)
        checks = _parity(code, shards)
        code.encode(shards, checks)
        for gone in (0, 1):
            left: list[bytearray | None] = [
                None if i == gone else bytearray(check) for i, check in enumerate(checks)
            ]
            restored = [bytearray(len(shard)) if i == 2 else shard for i, shard in enumerate(shards)]
            code.decode(restored, left, {2, 4 + gone})
            assert restored == shards


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parities_are_the_oracles(draw: st.DataObject) -> None:
    """Unaligned addresses, odd and unequal lengths."""
    name, data, parity = draw.draw(st.sampled_from([*SHAPES, ("rs", 20, 5), ("rdp", 16, 2)]))
    code, numbers = make_code(name, data, parity), random.Random(draw.draw(st.integers(0, 1 << 30)))
    longest = draw.draw(st.integers(0, 700))
    shards = []
    for i in range(data):
        offset, size = numbers.randrange(64), longest if i == 0 else numbers.randrange(longest + 1)
        shards.append(memoryview(bytearray(numbers.randbytes(offset + size)))[offset:])
    size, offset = code.parity_bytes(longest), numbers.randrange(64)
    checks = [memoryview(bytearray(offset + size))[offset:] for _ in range(parity)]
    code.encode(shards, checks)
    assert [bytes(check) for check in checks] == _expected(name, shards, parity, size)
    if name != "rdp":
        lost = numbers.sample(range(data), min(parity, data))
        left = [None if i in lost else bytes(shard) for i, shard in enumerate(shards)]
        padded = [bytes(shard).ljust(size, b"\0") for shard in shards]
        assert _oracle.rs_decode(left, [bytes(check) for check in checks], size) == padded


@pytest.mark.parametrize(
    ("name", "data", "parity"), [("xor", 5, 1), ("rdp", 5, 2), ("rs", 5, 2), ("rs", 4, 4)]
)
def test_updates_in_any_order_equal_an_encoding(name: str, data: int, parity: int) -> None:
    code, shards = make_code(name, data, parity), _shards(data, 9_001, 1)
    expected = _parity(code, shards)
    code.encode(shards, expected)
    for order in itertools.islice(itertools.permutations(range(data)), 0, None, 7):
        checks = [bytearray(len(check)) for check in expected]
        for index in order:
            code.update(checks, index, shards[index])
        assert checks == expected, order
        for index in order:
            code.update(checks, index, shards[index])
        assert not any(map(any, checks)), "what is added twice is gone"


@pytest.mark.parametrize(("name", "data", "parity"), [("xor", 4, 1), ("rdp", 4, 2), ("rs", 8, 3)])
def test_parts_in_threads_equal_one_call(name: str, data: int, parity: int) -> None:
    code, shards = make_code(name, data, parity), _shards(data, 70_001, 2)
    whole, parts, added = _parity(code, shards), _parity(code, shards), _parity(code, shards)
    code.encode(shards, whole)
    positions = code.positions(len(whole[0]))
    cuts = [0, 1, 63, positions // 3, positions // 2 + 5, positions]
    lost = {0, data} if parity > 1 else {0}
    added = [bytearray(len(check)) for check in whole]
    restored = [bytearray(len(shard)) if i in lost else shard for i, shard in enumerate(shards)]
    checks = [bytearray(len(check)) if i + data in lost else check for i, check in enumerate(whole)]

    def part(begin: int, end: int) -> None:
        code.encode(shards, parts, begin, end)
        for index, shard in enumerate(shards):
            code.update(added, index, shard, begin, end)
        code.decode(restored, checks, lost, begin, end)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(part, *cut) for cut in itertools.pairwise(cuts)]:
            done.result()
    assert parts == whole
    assert added == whole
    assert restored == shards
    assert checks == whole


@pytest.mark.parametrize(
    ("name", "data", "parity"), [("xor", 3, 1), ("rdp", 3, 2), ("rs", 3, 2), ("rs", 3, 3)]
)
@pytest.mark.parametrize("offset", [0, 8, 13])
def test_large_outputs_past_the_cache(name: str, data: int, parity: int, offset: int, level: int) -> None:
    """The same bytes as plain C has for the sum and by known algebra for the others: what is lost comes back."""
    code, rng = make_code(name, data, parity), np.random.default_rng(4)
    size = (1 << 20) + 12_345
    shards = [rng.integers(0, 256, size - 1000 * i, np.uint8) for i in range(data)]
    checks = [np.zeros(code.parity_bytes(size) + offset, np.uint8)[offset:] for _ in range(parity)]
    code.encode(shards, checks)
    padded = np.zeros((data, len(checks[0])), np.uint8)
    for row, shard in zip(padded, shards, strict=True):
        row[: len(shard)] = shard
    assert np.array_equal(checks[0], np.bitwise_xor.reduce(padded))
    _native.set_level(0)
    plain = [np.zeros(len(check), np.uint8) for check in checks]
    code.encode(shards, plain)
    assert np.array_equal(checks, plain)
    _native.set_level(level)
    lost = range(min(parity, data))
    restored = [
        np.zeros(len(shard) + offset, np.uint8)[offset:] if i in lost else shard
        for i, shard in enumerate(shards)
    ]
    code.decode(restored, checks, lost)
    assert all(np.array_equal(a, b) for a, b in zip(restored, shards, strict=True))


def test_any_type_of_element_is_lossless() -> None:
    """Not a number, infinities and denormals keep their bits."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    bfloat16 = torch.from_numpy(patterns.copy()).view(torch.bfloat16)
    shards = [patterns.view(np.float16), bfloat16.view(torch.int16).numpy(), patterns.view(np.float32)]
    for name, parity in (("xor", 1), ("rdp", 2), ("rs", 2)):
        code = make_code(name, 3, parity)
        checks = [np.zeros(code.parity_bytes(1 << 17) // 4, np.float32) for _ in range(parity)]
        code.encode(shards, checks)
        restored = np.zeros(1 << 16, np.float16)
        code.decode([restored, *shards[1:]], checks, {0})
        assert restored.tobytes() == patterns.tobytes()


@pytest.mark.parametrize(("name", "parity"), [("xor", 1), ("rdp", 2), ("rs", 2)])
def test_what_cannot_be_done_is_refused(name: str, parity: int) -> None:
    code = make_code(name, 3, parity)
    shards, size = [bytearray(64)] * 3, code.parity_bytes(64)
    checks = [bytearray(size) for _ in range(parity)]
    with pytest.raises(TooManyLost):
        code.decode(shards, checks, range(parity + 1))
    with pytest.raises(ValueError, match="longer than its parity"):
        code.encode([*shards[:2], bytearray(size + 1)], checks)
    with pytest.raises(ValueError, match="data"):
        code.encode(shards[:2], checks)
    with pytest.raises(ValueError, match="not one of 3"):
        code.update(checks, 3, shards[0])
    with pytest.raises(ValueError, match="is not a part"):
        code.encode(shards, checks, 1, size + 1)
    with pytest.raises(BufferError):
        code.encode(shards, [bytes(size)] * parity)
    with pytest.raises(ValueError, match="shards"):
        code.decode(shards, checks, {3 + parity})
    with pytest.raises(ValueError, match="needed"):
        code.decode(shards, [None] * parity, {0})
    for wrong in (("xor", 3, 2), ("rdp", 17, 2), ("rs", 3, 9), ("rs", 0, 1), ("raid", 3, 1)):
        with pytest.raises(ValueError, match=r"parity|data"):
            make_code(*wrong)
