# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Matrix products whose rows have the same bits whatever the number of rows.

cuBLAS chooses another kernel, with another order of sums, for another number of rows; padding to fixed numbers would
tie the guarantee to its heuristics and version. Here every output is one program's sum over all inputs in order, in
tiles that depend on the weight alone: the split over inputs that would fill a GPU better in decode is given up."""

import torch
import triton
import triton.language as tl

from kernels.triton.jit import OPTIONS, ceil_div, check, dot

# 64 rows is the least that uses Hopper's warp-group products. In decode most of them are empty, but 64 multiply-adds
# for each weight read are less than a GPU can do in that time.
ROWS = 64
PROGRAMS_MIN = 128  # about the number of multiprocessors: narrower tiles for narrower weights


def tile_sizes(n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Outputs and inputs of a tile for a weight of n outputs."""
    outputs = next((size for size in (128, 64) if ceil_div(n, size) >= PROGRAMS_MIN), 32)
    return (outputs, 64) if dtype is torch.bfloat16 else (min(outputs, 64), 32)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    weight,
    bias,
    out,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    # Neighbours share the weight's tile, which then comes from the cache for all but the first.
    row_tiles = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) // row_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    x_row = x + row.to(tl.int64)[:, None] * K
    w_row = weight + output.to(tl.int64)[None, :] * K
    row_mask, output_mask = (row < rows)[:, None], (output < N)[None, :]
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for k in tl.range(0, K, INPUTS):
        at = k + tl.arange(0, INPUTS)
        if K % INPUTS == 0:
            x_tile = tl.load(x_row + at[None, :], mask=row_mask, other=0.0)
            w_tile = tl.load(w_row + at[:, None], mask=output_mask, other=0.0)
        else:
            inside = at < K
            x_tile = tl.load(x_row + at[None, :], mask=row_mask & inside[None, :], other=0.0)
            w_tile = tl.load(w_row + at[:, None], mask=output_mask & inside[:, None], other=0.0)
        acc = dot(x_tile, w_tile, acc)
    if HAS_BIAS:
        acc += tl.load(bias + output, mask=output < N, other=0.0).to(tl.float32)[None, :]
    where = row.to(tl.int64)[:, None] * N + output[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=row_mask & output_mask)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, rows: int
) -> None:
    """out [>=rows, n] = x [>=rows, k] weight [n, k]^T + bias [n], for the first `rows` rows. Sums are float32;
    out may be float32 where the others are bfloat16."""
    n, k = weight.shape
    check(rows, weight.dtype, x)
    check(n, weight.dtype, weight, bias)
    check(rows, out.dtype, out)
    if x.shape[1] != k or out.shape[1] != n:
        raise ValueError(f"[{n}, {k}] does not map {x.shape[1]} to {out.shape[1]} values")
    outputs, inputs = tile_sizes(n, weight.dtype)
    _linear[(ceil_div(rows, ROWS) * ceil_div(n, outputs),)](
        x, weight, weight if bias is None else bias, out, rows,
        N=n, K=k, HAS_BIAS=bias is not None, ROWS=ROWS, OUTPUTS=outputs, INPUTS=inputs,
        num_warps=4, num_stages=4 if weight.dtype is torch.bfloat16 else 2, **OPTIONS,
    )  # fmt: skip
