"""The codes in plain Python, byte by byte: what the kernels must equal. Slow, obvious, used by tests only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kernels.coding.field import generator, inverse, multiply

PRIME = 17
ROWS = PRIME - 1


def rs_encode(shards: Sequence[bytes], parity: int, size: int) -> list[bytes]:
    rows = generator(len(shards), parity)
    return [_combine(row, shards, size) for row in rows]


def rs_decode(shards: Sequence[bytes | None], parity: Sequence[bytes | None], size: int) -> list[bytes]:
    """All data shards, each of `size` bytes, from what is there."""
    count = len(shards)
    identity = [bytes(int(i == j) for j in range(count)) for i in range(count)]
    lines = [(identity[i], shard) for i, shard in enumerate(shards) if shard is not None]
    rows = generator(count, len(parity))
    lines += [(rows[i], shard) for i, shard in enumerate(parity) if shard is not None]
    known = [shard for _, shard in lines[:count]]
    return [_combine(row, known, size) for row in inverse([row for row, _ in lines[:count]])]


def _combine(row: bytes, shards: Sequence[bytes], size: int) -> bytes:
    out = bytearray(size)
    for factor, shard in zip(row, shards, strict=True):
        products = bytes(multiply(factor, value) for value in range(256))
        for at, value in enumerate(shard.translate(products)):
            out[at] ^= value
    return bytes(out)


def rdp_encode(shards: Sequence[bytes], size: int) -> list[bytes]:
    """The row parity, and the diagonal parity. A cell is `size / 16` bytes."""
    return [b"".join(_sum_of(cells, shards, size) for cells in lines) for lines in _rdp_lines(len(shards))]


def _rdp_lines(count: int) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
    """The data cells (row, column) in each cell of the two parities; one that is there twice cancels out."""
    across = [[(row, column) for column in range(count)] for row in range(ROWS)]
    along = []
    for diagonal in range(ROWS):
        cells = [((diagonal - column) % PRIME, column) for column in range(count)]
        row_of_parity = (diagonal - ROWS) % PRIME
        along.append(
            [cell for cell in cells if cell[0] < ROWS]
            + (across[row_of_parity] if row_of_parity < ROWS else [])
        )
    return across, along


def _sum_of(cells: Collection[tuple[int, int]], shards: Sequence[bytes], size: int) -> bytes:
    width = size // ROWS
    out = bytearray(width)
    for row, column in cells:
        for at, value in enumerate(shards[column][row * width : (row + 1) * width]):
            out[at] ^= value
    return bytes(out)
