# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Erasure codes on a GPU: sums of shards, with factors of GF(2^8) and along diagonals. kernels/cuda/coding.py is what
others use, docs/decisions/erasure-codes.md has the algebra.

A word of 32 bits is four bytes side by side (where a shard is not whole words, a word has one byte in it). No table
and no look-up: doubling is a shift and a XOR, and a product with c adds c 2^b for each bit b of a byte. That is 32
operations for a factor and a word, which matters little: the links that bring shards are slower.

Shards are any number of buffers, so kernels get tables of their addresses. Each program does one tile of positions."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.coding.field import multiply
from kernels.triton.jit import OPTIONS, ceil_div, power_of_two

TILE = 1024
FACTOR_BITS = 8
PRIME = 17  # of row-diagonal parity
ROWS = PRIME - 1
LANES = 0x01010101  # one bit in every byte of a word


@triton.jit
def _at(addresses, index, WORD: tl.constexpr):
    return tl.load(addresses + index).to(tl.pointer_type(WORD))


@triton.jit
def _doubled(word, LANES: tl.constexpr):
    return ((word & 127 * LANES) << 1) ^ (((word >> 7) & LANES) * 0x1D)


@triton.jit(do_not_specialize=["shards"])
def _combine(
    data,
    sizes,
    starts,
    start_sizes,
    outs,
    out_sizes,
    factors,
    shards,
    SUM: tl.constexpr,
    POWERS: tl.constexpr,
    OTHERS: tl.constexpr,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Output 0, if SUM: start + the sum of all shards. Then, if POWERS: start + d0 + 2 d1 + 4 d2 .. Then OTHERS, of
    which the first SUM + POWERS are unused: start + the sum of factors[output, shard] times the shard. A start or an
    output that is not there has size 0."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    zeros = tl.zeros((TILE,), tl.int32)
    total, horner = zeros, zeros
    rows = tl.arange(0, OTHERS)
    rest = tl.zeros((OTHERS, TILE), tl.int32)
    for nth in range(shards):
        shard = shards - 1 - nth  # Horner's rule begins with the highest power
        word = tl.load(_at(data, shard, WORD) + at, mask=at < tl.load(sizes + shard), other=0).to(tl.int32)
        if SUM:
            total ^= word
        if POWERS:
            horner = _doubled(horner, LANES) ^ word
        if OTHERS > 1:
            for bit in tl.static_range(8):
                factor = tl.load(factors + (rows * shards + shard) * 8 + bit)
                rest ^= (((word >> bit) & LANES)[None, :]) * factor[:, None]
    if SUM:
        _finish(total, at, starts, start_sizes, outs, out_sizes, 0, WORD)
    if POWERS:
        _finish(horner, at, starts, start_sizes, outs, out_sizes, SUM, WORD)
    if OTHERS > 1:
        there = (rows >= SUM + POWERS)[:, None] & (at[None, :] < tl.load(start_sizes + rows)[:, None])
        rest ^= tl.load(_at(starts, rows, WORD)[:, None] + at[None, :], mask=there, other=0).to(tl.int32)
        there = (rows >= SUM + POWERS)[:, None] & (at[None, :] < tl.load(out_sizes + rows)[:, None])
        tl.store(_at(outs, rows, WORD)[:, None] + at[None, :], rest.to(WORD), mask=there)


@triton.jit
def _finish(word, at, starts, start_sizes, outs, out_sizes, index, WORD: tl.constexpr):
    """Adds the start and writes the output."""
    inside = at < tl.load(start_sizes + index)
    word ^= tl.load(_at(starts, index, WORD) + at, mask=inside, other=0).to(tl.int32)
    tl.store(_at(outs, index, WORD) + at, word.to(WORD), mask=at < tl.load(out_sizes + index))


@triton.jit(do_not_specialize=["columns", "width"])
def _lines(
    data,
    sizes,
    numbers,
    starts,
    start_sizes,
    outs,
    out_sizes,
    columns,
    width,
    DIAGONAL: tl.constexpr,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
    PRIME: tl.constexpr,
):
    """Row `program_id(1)` of output 0: start + the cells of the columns in that row, or on that diagonal."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    line = tl.program_id(1)
    inside = at < width
    word = tl.zeros((TILE,), tl.int32)
    for column in range(columns):
        row = line
        if DIAGONAL:
            row = (line - tl.load(numbers + column) + PRIME) % PRIME  # PRIME - 1 is a row of zeros
        cell = row.to(tl.int64) * width + at
        size = tl.where(row < PRIME - 1, tl.load(sizes + column), 0)
        there = inside & (cell < size)
        word ^= tl.load(_at(data, column, WORD) + cell, mask=there, other=0).to(tl.int32)
    beyond = tl.load(out_sizes)  # of the start, too
    cell = tl.where(inside, line.to(tl.int64) * width + at, beyond)
    _finish(word, cell, starts, start_sizes, outs, out_sizes, 0, WORD)


@triton.jit(do_not_specialize=["first", "second", "width"])
def _walk(
    sums,
    outs,
    out_sizes,
    first,
    second,
    width,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
    PRIME: tl.constexpr,
):
    """Columns `first` (output 0) and `second` (output 1) from what rows (sums 0) and diagonals (sums 1) lack. Begins at
    the diagonal that has nothing of `second`: what it lacks is a cell of `first`, by which the row gives one of
    `second`, and that what the next diagonal lacks."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < width
    carried = tl.zeros((TILE,), tl.int32)
    diagonal = (second + PRIME - 1) % PRIME
    while diagonal != PRIME - 1:
        row = (diagonal - first + PRIME) % PRIME
        cell = row.to(tl.int64) * width + at
        along = _at(sums, 1, WORD) + diagonal.to(tl.int64) * width + at
        found = carried ^ tl.load(along, mask=inside, other=0).to(tl.int32)
        carried = found ^ tl.load(_at(sums, 0, WORD) + cell, mask=inside, other=0).to(tl.int32)
        there = inside & (cell < tl.load(out_sizes))
        tl.store(_at(outs, 0, WORD) + cell, found.to(WORD), mask=there)
        there = inside & (cell < tl.load(out_sizes + 1))
        tl.store(_at(outs, 1, WORD) + cell, carried.to(WORD), mask=there)
        diagonal = (row + second) % PRIME


Tensors = Sequence[torch.Tensor | None]


class Table:
    """Addresses and sizes of buffers, where kernels read them. None is a buffer that is not there: it has size 0."""

    def __init__(self, buffers: Tensors, word: int, device: torch.device) -> None:
        """`word`: bytes of a unit of size. The buffers must outlive the kernels that are launched with this."""
        values = [[b.data_ptr() if b is not None else 0 for b in buffers]]
        values.append([b.nbytes // word if b is not None else 0 for b in buffers])
        both = torch.tensor(values, dtype=torch.int64).to(device)
        # Two allocations: each begins where kernels expect it, at a multiple of 16.
        self.addresses, self.sizes = both[0].clone(), both[1].clone()


def word_bytes(width: int, *groups: Tensors) -> int:
    """4 if buffers and `width` (of rows; 0 without them) are whole words, else 1."""
    there = [b for buffers in groups for b in buffers if b is not None]
    return 1 if width % 4 or any(b.data_ptr() % 4 or b.nbytes % 4 for b in there) else 4


def combine(
    shards: Tensors,
    starts: Tensors,
    outs: Tensors,
    factors: Sequence[bytes],
    *,
    sums: bool = False,
    powers: bool = False,
) -> None:
    """outs[i] = starts[i] + factors[i] times the shards; None in shards and starts is zeros, in outs not wanted.

    Buffers on one device, contiguous, of any dtype. The first row must be ones if `sums`, the next one 1, 2, 4 .. if
    `powers`: they cost less. An output may be its own start."""
    there = [out for out in outs if out is not None]
    if not there or not (longest := max(out.nbytes for out in there)):
        return
    word, device = word_bytes(0, shards, starts, outs), there[0].device
    cheap = sums + powers
    others = power_of_two(len(outs), 2) if len(outs) > cheap else 1
    padding = [None] * (others - len(outs))
    read, begin, write = (
        Table(b, word, device) for b in (shards, [*starts, *padding], [*outs, *padding])
    )  # fmt: skip
    bits = torch.zeros(others, len(shards), FACTOR_BITS, dtype=torch.int32)
    for i, row in enumerate(factors[cheap:], cheap):
        bits[i] = torch.tensor([[multiply(c, 1 << b) for b in range(FACTOR_BITS)] for c in row])
    _combine[(ceil_div(longest // word, TILE),)](
        read.addresses, read.sizes, begin.addresses, begin.sizes, write.addresses, write.sizes, bits.to(device),
        len(shards), SUM=int(sums), POWERS=int(powers), OTHERS=others, WORD=_word(word), TILE=TILE, LANES=LANES,
        num_warps=4, **OPTIONS,
    )  # fmt: skip


def add_lines(
    columns: Tensors,
    numbers: Sequence[int],
    start: torch.Tensor | None,
    out: torch.Tensor,
    width: int,
    diagonal: bool,
) -> None:
    """The rows of `out`, of `width` bytes each: start + the sums of rows, or of diagonals, of an array whose columns
    `numbers` are given; None is a column of zeros. `out` may be `start`, but none of the columns."""
    if not width:
        return
    word, device = word_bytes(width, columns, [start, out]), out.device
    read, begin, write = (Table(b, word, device) for b in (columns, [start], [out]))
    _lines[(ceil_div(width // word, TILE), ROWS)](
        read.addresses, read.sizes, torch.tensor(list(numbers), dtype=torch.int32).to(device), begin.addresses,
        begin.sizes, write.addresses, write.sizes, len(columns), width // word, DIAGONAL=diagonal, WORD=_word(word),
        TILE=TILE, PRIME=PRIME, num_warps=4, **OPTIONS,
    )  # fmt: skip


def walk(
    across: torch.Tensor, along: torch.Tensor, numbers: tuple[int, int], outs: Tensors, width: int
) -> None:
    """The two columns `numbers` of an array from what its rows (`across`) and diagonals (`along`) lack without them, 16
    rows of `width` bytes each."""
    if not width:
        return
    word, device = word_bytes(width, [across, along], outs), across.device
    sums = Table([across, along], word, device)
    for first, second in ((0, 1), (1, 0)):
        write = Table([outs[first], outs[second]], word, device)
        _walk[(ceil_div(width // word, TILE),)](
            sums.addresses, write.addresses, write.sizes, numbers[first], numbers[second], width // word,
            WORD=_word(word), TILE=TILE, PRIME=PRIME, num_warps=4, **OPTIONS,
        )  # fmt: skip


def _word(size: int) -> tl.dtype:
    return tl.int32 if size == 4 else tl.uint8
