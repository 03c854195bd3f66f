# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Mixtures of experts: which experts a row takes, their products, and the sum of what they make.

A choice of an expert by a row is one pair. Pairs are put in order by expert and cut into tiles of one expert each; a
tile's product is that of linear.py, whose rows have the same bits in any tile, and a row adds up its pairs in the order
of its own choice. Where tiles begin is computed on the device, in arrays whose sizes depend on the number of rows
alone, so that a graph can capture all of it."""

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, ceil_div, check, dot, power_of_two
from kernels.triton.linear import ROWS, tile_sizes

ADD_TILE = 1024


@triton.jit
def _route(
    logits,
    weights,
    chosen,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHOSEN: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < EXPERTS
    value = tl.load(logits + row * EXPERTS + at, mask=inside, other=float("-inf"))
    value = tl.where(inside, tl.exp(value - tl.max(value, 0)), -1.0)
    total = tl.sum(tl.where(inside, value, 0.0), 0)
    taken = 0.0
    left = value
    for _ in tl.static_range(CHOSEN):
        most = tl.max(left, 0)
        taken += most
        left = tl.where(at == tl.min(tl.where(left == most, at, WIDTH), 0), -1.0, left)
    if NORMALISED:
        total = taken
    for i in tl.static_range(CHOSEN):
        most = tl.max(value, 0)
        best = tl.min(tl.where(value == most, at, EXPERTS - 1), 0)  # where nothing is a number: the last
        tl.store(chosen + row * CHOSEN + i, best)
        tl.store(weights + row * CHOSEN + i, most / total)
        value = tl.where(at == best, -1.0, value)


@triton.jit
def _expert_linear(
    x,
    weight,
    order,
    tiles,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 3
    expert = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if first >= end:
        return
    lane = first + tl.arange(0, ROWS)
    live = lane < end
    pair = tl.load(order + lane, mask=live, other=0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    x_row = x + (pair // PAIRS)[:, None] * K
    w_row = weight + expert * N * K + output.to(tl.int64)[None, :] * K
    row_mask, output_mask = live[:, None], (output < N)[None, :]
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for k in tl.range(0, K, INPUTS):
        at = k + tl.arange(0, INPUTS)
        inside = at < K
        x_tile = tl.load(x_row + at[None, :], mask=row_mask & inside[None, :], other=0.0)
        w_tile = tl.load(w_row + at[:, None], mask=output_mask & inside[:, None], other=0.0)
        acc = dot(x_tile, w_tile, acc)
    where = pair[:, None] * N + output[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=row_mask & output_mask)


@triton.jit
def _add_pairs(x, weights, out, N: tl.constexpr, CHOSEN: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < N
    acc = tl.zeros((TILE,), tl.float32)
    for i in tl.static_range(CHOSEN):
        pair = row * CHOSEN + i
        value = tl.load(x + pair * N + at, mask=inside, other=0.0).to(tl.float32)
        acc += tl.load(weights + pair) * value
    tl.store(out + row * N + at, acc.to(out.dtype.element_ty), mask=inside)


def route(
    logits: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, rows: int, normalised: bool
) -> None:
    """Of logits float32 [>=rows, experts]: the experts with the largest ones to chosen int32 [>=rows, n], the largest
    first and of equal ones the one with the lower number; and the softmax over all experts, or over the chosen ones
    (`normalised`), to weights float32 [>=rows, n]."""
    experts = logits.shape[1]
    check(rows, torch.float32, logits, weights)
    check(rows, torch.int32, chosen)
    if chosen.shape[1] > experts or weights.shape[1] != chosen.shape[1]:
        raise ValueError(f"cannot choose {chosen.shape[1]} of {experts} experts")
    _route[(rows,)](
        logits, weights, chosen,
        EXPERTS=experts, WIDTH=power_of_two(experts), CHOSEN=chosen.shape[1], NORMALISED=normalised,
        num_warps=1, **OPTIONS,
    )  # fmt: skip


def tiles_of(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs, int32 [rows * n], in order by expert; and tiles int32 [T, 3] of (expert, first place in that order,
    end). chosen: int32 [rows, n]. Tiles that are not needed are empty."""
    pairs = chosen.flatten()
    here = pairs.device
    order = torch.argsort(pairs, stable=True).int()
    counts = (pairs[None, :] == torch.arange(experts, device=here)[:, None]).sum(1)
    ends = counts.cumsum(0)
    tiles = (counts + ROWS - 1) // ROWS
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(len(pairs) // ROWS + min(experts, len(pairs)), device=here)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp_max(experts - 1)
    first = (ends - counts)[expert] + (tile - (tile_ends - tiles)[expert]) * ROWS
    end = torch.minimum(first + ROWS, ends[expert])
    return order, torch.stack([expert, first, end], 1).int()


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    pairs_of_a_row: int,
) -> None:
    """out [>=pairs, n], by pair, = x [>=pairs / pairs_of_a_row, k] times that pair's expert of weight [experts, n, k].
    order, tiles: see tiles_of()."""
    _, n, k = weight.shape
    pairs = len(order)
    check(pairs // pairs_of_a_row, weight.dtype, x)
    check(pairs, weight.dtype, out)
    check(1, weight.dtype, weight)
    if x.shape[1] != k or out.shape[1] != n:
        raise ValueError(f"[{n}, {k}] does not map {x.shape[1]} to {out.shape[1]} values")
    outputs, inputs = tile_sizes(n, weight.dtype)
    _expert_linear[(len(tiles), ceil_div(n, outputs))](
        x, weight, order, tiles, out,
        N=n, K=k, PAIRS=pairs_of_a_row, ROWS=ROWS, OUTPUTS=outputs, INPUTS=inputs,
        num_warps=4, num_stages=4 if weight.dtype is torch.bfloat16 else 2, **OPTIONS,
    )  # fmt: skip


def add_pairs(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, rows: int) -> None:
    """out [>=rows, n] = the sum of each row's pairs of x [>=rows * pairs, n], times weights float32 [>=rows, pairs]."""
    n, chosen = out.shape[1], weights.shape[1]
    check(rows * chosen, out.dtype, x)
    check(rows, out.dtype, out)
    check(rows, torch.float32, weights)
    if x.shape[1] != n:
        raise ValueError(f"rows of {x.shape[1]} and of {n} values do not match")
    _add_pairs[(rows, ceil_div(n, ADD_TILE))](
        x, weights, out, N=n, CHOSEN=chosen, TILE=min(ADD_TILE, power_of_two(n)), num_warps=4, **OPTIONS
    )
