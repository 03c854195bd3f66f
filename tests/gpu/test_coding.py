"""Erasure codes on a GPU, or in Triton's interpreter: the bytes of the C kernels, and of the table-driven oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

from kernels.coding import _oracle
from kernels.coding.codes import TooManyLost, make_code
from kernels.cuda.coding import make_device_code

SHAPES = [
    ("xor", 1, 1),
    ("xor", 5, 1),
    ("rdp", 1, 2),
    ("rdp", 3, 2),
    ("rs", 1, 1),
    ("rs", 3, 2),
    ("rs", 3, 3),
]


def on(device: torch.device, content: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)[: len(content)].to(device)


def contents(shards: Sequence[torch.Tensor]) -> list[bytes]:
    return [shard.cpu().numpy().tobytes() for shard in shards]


def make_shards(count: int, sizes: Sequence[int], seed: int) -> list[bytes]:
    numbers = random.Random(seed)
    return [numbers.randbytes(sizes[i % len(sizes)]) for i in range(count)]


def zeros(device: torch.device, count: int, size: int) -> list[torch.Tensor]:
    return [torch.full((size,), 0xEE, dtype=torch.uint8, device=device) for _ in range(count)]


def expected(name: str, shards: list[bytes], parity: int, size: int) -> list[bytes]:
    return _oracle.rdp_encode(shards, size) if name == "rdp" else _oracle.rs_encode(shards, parity, size)


@pytest.mark.parametrize("sizes", [(400, 132, 400, 0), (331, 17, 330)], ids=["words", "bytes"])
@pytest.mark.parametrize(("name", "data", "parity"), [*SHAPES, ("rdp", 16, 2), ("rs", 9, 6)])
def test_parities_are_the_oracles(device, name, data, parity, sizes) -> None:
    code, plain = make_device_code(name, data, parity), make_shards(data, sizes, data)
    checks = zeros(device, parity, code.parity_bytes(sizes[0]))
    shards = [on(device, shard) for shard in plain]
    code.encode(shards, checks)
    want = expected(name, plain, parity, len(checks[0]))
    assert contents(checks) == want
    for i in range(parity):
        one = zeros(device, parity, len(checks[0]))
        code.encode(shards, [buffer if j == i else None for j, buffer in enumerate(one)])
        assert contents(one)[i] == want[i]


@pytest.mark.parametrize("sizes", [(208, 200, 64), (131, 17, 130)], ids=["words", "bytes"])
@pytest.mark.parametrize(("name", "data", "parity"), SHAPES)
def test_every_pattern_of_losses_is_restored(device, name, data, parity, sizes) -> None:
    code, plain = make_device_code(name, data, parity), make_shards(data, sizes, data)
    whole = plain + expected(name, plain, parity, code.parity_bytes(sizes[0]))
    for count in range(parity + 1):
        for lost in itertools.combinations(range(data + parity), count):
            left = [on(device, b"\x55" * len(shard) if i in lost else shard) for i, shard in enumerate(whole)]
            code.decode(left[:data], left[data:], lost)
            assert contents(left) == whole, lost


@pytest.mark.parametrize("lost", [(0, 15), (7, 16), (0, 17), (16, 17)])
def test_sixteen_shards_of_rdp(device, lost) -> None:
    code, plain = make_device_code("rdp", 16, 2), make_shards(16, (1 << 16, 50_000), 3)
    size = code.parity_bytes(1 << 16)
    checks = [bytearray(size), bytearray(size)]
    make_code("rdp", 16, 2).encode(plain, checks)
    whole = [*plain, *map(bytes, checks)]
    left = [on(device, bytes(len(shard)) if i in lost else shard) for i, shard in enumerate(whole)]
    code.decode(left[:16], left[16:], lost)
    assert contents(left) == whole


@pytest.mark.parametrize(("name", "data", "parity"), [("xor", 3, 1), ("rdp", 3, 2), ("rs", 4, 3)])
def test_several_tiles_equal_the_c_kernels(device, name, data, parity, monkeypatch) -> None:
    monkeypatch.setattr("kernels.triton.coding.TILE", 128)
    code, plain = make_device_code(name, data, parity), make_shards(data, (10_004, 7_000), 5)
    checks = zeros(device, parity, code.parity_bytes(10_004))
    shards = [on(device, shard) for shard in plain]
    code.encode(shards, checks)
    want = [bytearray(len(checks[0])) for _ in range(parity)]
    make_code(name, data, parity).encode(plain, want)
    assert contents(checks) == want
    lost = range(parity)
    left = [torch.zeros_like(shard) if i in lost else shard for i, shard in enumerate(shards)]
    code.decode(left, checks, lost)
    assert contents(left) == plain


@pytest.mark.parametrize("sizes", [(400, 132, 400, 0), (331, 17, 330)], ids=["words", "bytes"])
@pytest.mark.parametrize(
    ("name", "data", "parity"), [("xor", 4, 1), ("rdp", 3, 2), ("rs", 4, 2), ("rs", 3, 4)]
)
def test_updates_in_any_order_equal_an_encoding(device, name, data, parity, sizes) -> None:
    code, plain = make_device_code(name, data, parity), make_shards(data, sizes, 1)
    shards, size = [on(device, shard) for shard in plain], code.parity_bytes(sizes[0])
    want = expected(name, plain, parity, size)
    for order in itertools.islice(itertools.permutations(range(data)), 0, None, 4):
        checks = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(parity)]
        for index in order:
            code.update(checks, index, shards[index])
        assert contents(checks) == want, order
    for index in order:
        code.update(checks, index, shards[index])
    assert not any(check.any() for check in checks), "what is added twice is gone"


def test_parities_that_are_lost_need_no_buffer(device) -> None:
    for name in ("rdp", "rs"):
        code, plain = make_device_code(name, 4, 2), make_shards(4, (500, 96), 9)
        shards, checks = [on(device, shard) for shard in plain], zeros(device, 2, code.parity_bytes(500))
        code.encode(shards, checks)
        for gone in (0, 1):
            left = [None if i == gone else check for i, check in enumerate(checks)]
            restored = [torch.zeros_like(shard) if i == 2 else shard for i, shard in enumerate(shards)]
            code.decode(restored, left, {2, 4 + gone})
            assert contents(restored) == plain


def test_any_type_of_element_is_lossless(device) -> None:
    """Not a number, infinities and denormals keep their bits; a view that begins between words is right, too."""
    patterns = torch.arange(-(1 << 15), 1 << 15, 8, dtype=torch.int32).to(torch.int16).to(device)
    patterns[::2] += 7  # every exponent, low and high bits
    shards = [patterns.view(torch.bfloat16), patterns.view(torch.float16), patterns.view(torch.float32)]
    shards.append(patterns[1:].view(torch.bfloat16))
    for name, parity in (("xor", 1), ("rdp", 2), ("rs", 2)):
        code = make_device_code(name, 4, parity)
        checks = zeros(device, parity, code.parity_bytes(patterns.nbytes))
        code.encode(shards, checks)
        for index, shard in enumerate(shards):
            restored = torch.zeros_like(shard)
            code.decode([restored if i == index else s for i, s in enumerate(shards)], checks, {index})
            assert torch.equal(restored.view(torch.int16), shard.view(torch.int16))


@pytest.mark.parametrize(("name", "parity"), [("xor", 1), ("rdp", 2), ("rs", 2)])
def test_what_cannot_be_done_is_refused(device, name, parity) -> None:
    code = make_device_code(name, 3, parity)
    size = code.parity_bytes(64)
    shards, checks = [on(device, bytes(64))] * 3, zeros(device, parity, size)
    with pytest.raises(TooManyLost):
        code.decode(shards, checks, range(parity + 1))
    with pytest.raises(ValueError, match="longer than its parity"):
        code.encode([*shards[:2], on(device, bytes(size + 1))], checks)
    with pytest.raises(ValueError, match="data"):
        code.encode(shards[:2], checks)
    with pytest.raises(ValueError, match="contiguous"):
        code.encode([*shards[:2], on(device, bytes(64))[::2]], checks)
    with pytest.raises(ValueError, match="not one of 3"):
        code.update(checks, 3, shards[0])
    with pytest.raises(ValueError, match="needed"):
        code.decode(shards, [None] * parity, {0})
    for wrong in (("xor", 3, 2), ("rdp", 17, 2), ("rs", 3, 9), ("raid", 3, 1)):
        with pytest.raises(ValueError, match=r"parity|data"):
            make_device_code(*wrong)
