# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Blocks between the cache, where a block's layers lie apart, and the wire, where each is one piece; and their sums.

A sum is 32 bits: of a block's values as 32-bit words, each mixed with its place, added up. Any order of adding gives
the same bits, so a device computes it at the speed of its memory. A word that differs always changes its own part of
the sum; several that differ go unnoticed once in 2^32 times. It is another sum than the CPU's CRC-32: nodes of one
kind exchange KV, and only they."""

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, ceil_div

TILE = 1024
GOLDEN = 0x9E3779B9
MIX_1, MIX_2 = 0x85EBCA6B, 0xC2B2AE35  # the finaliser of MurmurHash3 (Appleby), a bijection of 32 bits
KEY = 0x5851F42D


@triton.jit
def _copy_blocks(
    cache,
    wire,
    blocks,
    places,
    BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OUT: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    nth = tl.program_id(2)
    inside = at < SIZE
    here = cache + (plane * BLOCKS + tl.load(blocks + nth)) * SIZE + at
    there = wire + (tl.load(places + nth).to(tl.int64) * PLANES + plane) * SIZE + at
    if OUT:
        tl.store(there, tl.load(here, mask=inside), mask=inside)
    else:
        tl.store(here, tl.load(there, mask=inside), mask=inside)


@triton.jit
def _sum_blocks(
    data,
    blocks,
    sums,
    PLANE_STEP: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    GOLDEN: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
    KEY: tl.constexpr,
):
    """WORDS: 32-bit words of a plane of a block. In units of it, planes and blocks are their steps apart."""
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    nth = tl.program_id(2)
    inside = at < WORDS
    first = plane * PLANE_STEP + tl.load(blocks + nth).to(tl.int64) * BLOCK_STEP
    word = tl.load(data + first * WORDS + at, mask=inside, other=0)
    place = (tl.program_id(0) * WORDS + at).to(tl.uint32)
    mixed = word.to(tl.uint32, bitcast=True) ^ (place * GOLDEN + KEY)
    mixed = (mixed ^ (mixed >> 16)) * MIX_1
    mixed = (mixed ^ (mixed >> 13)) * MIX_2
    mixed = mixed ^ (mixed >> 16)
    total = tl.sum(tl.where(inside, mixed, 0).to(tl.int32, bitcast=True), 0)
    tl.atomic_add(sums + nth, total)


def _check(cache: torch.Tensor, wire: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor) -> None:
    planes, _, size = cache.shape
    if wire.shape[1:] != (planes, size) or wire.dtype is not cache.dtype or not wire.is_contiguous():
        raise ValueError(f"a block is {planes} planes of {size} values, contiguous")
    if len(blocks) != len(places):
        raise ValueError(f"{len(blocks)} blocks for {len(places)} places")


def _copy(
    cache: torch.Tensor, blocks: torch.Tensor, wire: torch.Tensor, places: torch.Tensor, out: bool
) -> None:
    _check(cache, wire, blocks, places)
    if not len(blocks):
        return
    planes, count, size = cache.shape
    grid = (planes, ceil_div(size, TILE), len(blocks))
    _copy_blocks[grid](
        cache,
        wire,
        blocks,
        places,
        BLOCKS=count,
        PLANES=planes,
        SIZE=size,
        TILE=TILE,
        OUT=out,
        num_warps=4,
        **OPTIONS,
    )


def gather_blocks(
    cache: torch.Tensor, blocks: torch.Tensor, wire: torch.Tensor, places: torch.Tensor
) -> None:
    """Copies blocks[i] of cache [planes, num_blocks, size] to wire[places[i]], of [pieces, planes, size]. int32 [n],
    whose values nobody looks at: blocks and pieces that do not exist are the caller's to refuse."""
    _copy(cache, blocks, wire, places, True)


def scatter_blocks(
    cache: torch.Tensor, blocks: torch.Tensor, wire: torch.Tensor, places: torch.Tensor
) -> None:
    """The reverse of gather_blocks."""
    _copy(cache, blocks, wire, places, False)


def sum_blocks(cache: torch.Tensor, blocks: torch.Tensor, sums: torch.Tensor) -> None:
    """Adds the sums of blocks [n] int32 of cache [planes, num_blocks, size] to sums [n] int32, which begin as zeros."""
    planes, count, size = cache.shape
    _sum(cache, blocks, sums, planes, size, (count, 1))


def sum_pieces(wire: torch.Tensor, pieces: torch.Tensor, sums: torch.Tensor) -> None:
    """The same of pieces [n] int32 of wire [pieces, planes, size]: what the blocks have that they are copies of."""
    _, planes, size = wire.shape
    _sum(wire, pieces, sums, planes, size, (1, planes))


def _sum(
    data: torch.Tensor,
    which: torch.Tensor,
    sums: torch.Tensor,
    planes: int,
    size: int,
    steps: tuple[int, int],
) -> None:
    """Raises ValueError for blocks whose planes are not whole 32-bit words."""
    if size * data.element_size() % 4:
        raise ValueError(f"a plane of {size} values of {data.dtype} is not whole 32-bit words")
    if not len(which):
        return
    words = size * data.element_size() // 4
    grid = (planes, ceil_div(words, TILE), len(which))
    _sum_blocks[grid](
        data.view(torch.int32), which, sums, PLANE_STEP=steps[0], BLOCK_STEP=steps[1], WORDS=words, TILE=TILE,
        GOLDEN=GOLDEN, MIX_1=MIX_1, MIX_2=MIX_2, KEY=KEY, num_warps=4, **OPTIONS,
    )  # fmt: skip
