# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Operations on one row at a time: one program a row, so that a row cannot see the others."""

import torch
import triton
import triton.language as tl

from kernels.base import Activation
from kernels.triton.jit import OPTIONS, ceil_div, check, power_of_two

GATED_TILE = 1024


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    x_weight,
    out,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    NORM_X: tl.constexpr,
    NORM: tl.constexpr,
):
    at = tl.arange(0, WIDTH)
    inside = at < N
    where = tl.program_id(0).to(tl.int64) * N + at
    value = tl.load(residual + where, mask=inside, other=0.0)
    if ADD:
        more = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        if NORM_X:
            more_scale = 1.0 / tl.sqrt(tl.sum(more * more, 0) / N + EPS)
            more_factor = tl.load(x_weight + at, mask=inside, other=0.0).to(tl.float32)
            more = (more * more_scale * more_factor).to(value.dtype).to(tl.float32)
        added = value.to(tl.float32) + more
        value = added.to(value.dtype)
        tl.store(residual + where, value, mask=inside)
    if NORM:
        wide = value.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / N + EPS)
        factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + where, (wide * scale * factor).to(value.dtype), mask=inside)


@triton.jit
def _gated_mul(x, out, N: tl.constexpr, TILE: tl.constexpr, GELU: tl.constexpr):
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < N
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(x + row * 2 * N + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # x * 0.5 (1 + tanh(u)) = x / (1 + exp(-2 u))
        power = -1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1.0 + tl.exp(power)) * up
    else:
        value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * N + at, value.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    rows: int,
    x_weight: torch.Tensor | None = None,
) -> None:
    """residual += x, or x_weight * rms_norm(x), then out = weight * rms_norm(residual), for the first `rows` rows of
    [>=rows, n]; without x nothing is added, without out nothing normed. The sum is rounded to residual's dtype before
    its norm is taken. Weights may be float32."""
    n = residual.shape[1]
    check(rows, residual.dtype, x, residual, out)
    if out is not None and weight is None:
        raise ValueError("a norm needs its weight")
    for t in (x, out):
        if t is not None and t.shape[1] != n:
            raise ValueError(f"rows of {t.shape[1]} and of {n} values do not match")
    _add_rms_norm[(rows,)](
        residual if x is None else x,
        residual,
        residual if weight is None else weight,
        residual if x_weight is None else x_weight,
        residual if out is None else out,
        N=n, WIDTH=power_of_two(n), EPS=eps, ADD=x is not None, NORM_X=x_weight is not None, NORM=out is not None,
        num_warps=4 if n <= 4096 else 8, **OPTIONS,
    )  # fmt: skip


def gated_mul(x: torch.Tensor, out: torch.Tensor, rows: int, activation: Activation = "silu") -> None:
    """out [>=rows, n] = activation(x[:, :n]) * x[:, n:], for the first `rows` rows."""
    n = out.shape[1]
    check(rows, out.dtype, x, out)
    if x.shape[1] != 2 * n:
        raise ValueError(f"rows of {x.shape[1]} values are not twice {n}")
    gelu = activation == "gelu_tanh"
    _gated_mul[(rows, ceil_div(n, GATED_TILE))](
        x, out, N=n, TILE=GATED_TILE, GELU=gelu, num_warps=4, **OPTIONS
    )
