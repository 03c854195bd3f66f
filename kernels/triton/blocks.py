# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Between the cache, where a block's layers lie apart, and the wire, where they are one piece."""

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, ceil_div

TILE = 1024


@triton.jit(do_not_specialize=["block"])
def _copy_block(
    cache, wire, block, BLOCKS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, OUT: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < SIZE
    here = cache + (plane * BLOCKS + block) * SIZE + at
    there = wire + plane * SIZE + at
    if OUT:
        tl.store(there, tl.load(here, mask=inside), mask=inside)
    else:
        tl.store(here, tl.load(there, mask=inside), mask=inside)


def _copy(cache: torch.Tensor, block: int, wire: torch.Tensor, out: bool) -> None:
    planes, blocks, size = cache.shape
    if not 0 <= block < blocks:
        raise IndexError(f"block {block} is not one of {blocks}")
    if wire.shape != (planes, size) or wire.dtype is not cache.dtype or not wire.is_contiguous():
        raise ValueError(f"a block is {planes} planes of {size} values, contiguous")
    grid = (planes, ceil_div(size, TILE))
    _copy_block[grid](
        cache, wire, block, BLOCKS=blocks, SIZE=size, TILE=TILE, OUT=out, num_warps=4, **OPTIONS
    )


def gather_block(cache: torch.Tensor, block: int, wire: torch.Tensor) -> None:
    """Copies block `block` of cache [planes, num_blocks, size] to wire [planes, size]. Raises IndexError."""
    _copy(cache, block, wire, True)


def scatter_block(cache: torch.Tensor, block: int, wire: torch.Tensor) -> None:
    """The reverse of gather_block."""
    _copy(cache, block, wire, False)
