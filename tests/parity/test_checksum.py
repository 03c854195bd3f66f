"""The checksum of KV blocks is zlib's CRC-32, on processors that fold and on those that look up."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from dataplane._fast import checksum

SIZES = [*range(200), 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 1 << 20]


@pytest.fixture(params=[False, True], ids=["folding", "tables"])
def tables(request: pytest.FixtureRequest) -> Iterator[None]:
    checksum.use_tables(request.param)
    yield
    checksum.use_tables(False)


@pytest.mark.usefixtures("tables")
def test_it_is_zlibs() -> None:
    rng = np.random.default_rng(5)
    for size in SIZES:
        data = rng.bytes(size + 3)
        for begin in range(4):  # not aligned
            part = memoryview(data)[begin : begin + size]
            value = int(rng.integers(0, 2**32))
            assert checksum.crc32(part) == zlib.crc32(part), (size, begin)
            assert checksum.crc32(part, value) == zlib.crc32(part, value), (size, begin)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("size", [32, 100, 16_384, 50_000])
def test_blocks_have_the_checksums_of_their_bytes(size: int) -> None:
    rng = np.random.default_rng(6)
    pool = rng.integers(0, 256, (7, size), np.uint8)
    blocks = np.array([6, 0, 3, 3], np.int64)
    expected = [zlib.crc32(pool[block].tobytes()) for block in blocks]
    assert checksum.block_sums(pool, blocks).tolist() == expected
    out = bytearray(4 * size)
    assert checksum.gather_blocks(pool, blocks, out).tolist() == expected
    assert bytes(out) == b"".join(pool[block].tobytes() for block in blocks)
    assert checksum.piece_sums(bytes(out) + b"x", size).tolist() == expected
    with pytest.raises(ValueError, match="do not fit"):
        checksum.gather_blocks(pool, blocks, out[:-1])
