"""The operations of a stage one by one, on tensors: for tests, and for whoever measures them."""

import numpy as np
import numpy.typing as npt
import torch

from kernels.base import DTYPES, PagedCache, StepArrays
from kernels.cpu import _native
from kernels.cpu.pack import Packed

HEAD_DIM_MAX = 512  # KF_HEAD_DIM_MAX in dispatch.c

STORE, ADD, SILU_MUL, FLOAT = _native.STORE, _native.ADD, _native.SILU_MUL, _native.FLOAT
GELU_MUL = _native.GELU_MUL


def cache_of(kv: PagedCache) -> _native.Cache:
    """Raises ValueError for a shape that the kernels do not take."""
    if kv.head_dim > HEAD_DIM_MAX or kv.head_dim % 2:
        raise ValueError(f"head_dim {kv.head_dim} is not even or over {HEAD_DIM_MAX}")
    is_bf16 = DTYPES[kv.dtype] is torch.bfloat16
    return _native.Cache(
        kv.address, kv.num_blocks, kv.layers, kv.kv_heads, kv.block_size, kv.head_dim, is_bf16
    )


def step_of(step: StepArrays) -> _native.Step:
    """Raises ValueError for arrays that do not fit together."""
    return _native.Step(step.positions, step.slots, step.cu_q, step.context_lens, step.tables)


def attention(
    team: _native.Team,
    kv: PagedCache,
    layer: int,
    step: StepArrays,
    q: torch.Tensor,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """out [T, heads, head_dim] = softmax(scale q K) V over the cache, causal, last `window` keys only if given."""
    _check(DTYPES[kv.dtype], len(step.positions), q, out)
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys is empty")
    if q.shape != out.shape or q.shape[-1] != kv.head_dim:
        raise ValueError("q, out and the cache have different shapes")
    args = (q.data_ptr(), out.data_ptr(), q.shape[1], scale, window or 0)
    _native.attention(team, cache_of(kv), layer, step_of(step), *args)


def rope_write(
    team: _native.Team,
    kv: PagedCache,
    layer: int,
    step: StepArrays,
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    q: torch.Tensor,
    wide: bool = False,
) -> None:
    """Splits qkv [T, (heads + 2 kv_heads) * head_dim], norms q and k per head (weights float32 [head_dim] or None;
    wide: as in rms_norm), rotates the first values of heads by (cos, sin) float32 [positions, rotated / 2]. K and V go
    into the cache, queries into q [T, heads, head_dim]."""
    dtype, (cos, sin) = DTYPES[kv.dtype], rotary
    _check(dtype, len(step.positions), qkv, q)
    heads = q.shape[1]
    if (
        cos.shape != sin.shape
        or 2 * cos.shape[1] > kv.head_dim
        or qkv.shape[1] != (heads + 2 * kv.kv_heads) * kv.head_dim
        or cos.dtype is not torch.float32
        or sin.dtype is not torch.float32
    ):
        raise ValueError("qkv, q and the rotary table have different head sizes")
    for norm in norms:
        if norm is not None:
            _check(torch.float32, kv.head_dim, norm)
    q_norm, k_norm = (0 if norm is None else norm.data_ptr() for norm in norms)
    args = (qkv.data_ptr(), qkv.shape[1], cos.data_ptr(), sin.data_ptr(), len(cos), 2 * cos.shape[1])
    _native.rope_write(
        team, cache_of(kv), layer, step_of(step), *args, q_norm, k_norm, eps, wide, heads, q.data_ptr()
    )


def rms_norm(
    team: _native.Team,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    wide: bool = False,
    add: bool = False,
) -> None:
    """out = (add: +=) weight * rms_norm(x), all [rows, n] but weight float32 [n]. wide: what is normalised is not
    rounded before it is weighted."""
    rows, n = x.shape
    _check(x.dtype, rows, x, out)
    _check(torch.float32, n, weight)
    if out.shape[1] != n:
        raise ValueError(f"rows of {n} and of {out.shape[1]} values do not match")
    is_bf16 = x.dtype is torch.bfloat16
    _native.rms_norm(team, x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, n, eps, wide, add, is_bf16)


def linear(
    team: _native.Team,
    x: torch.Tensor,
    weight: Packed,
    out: torch.Tensor,
    epilogue: int,
    ends: npt.NDArray[np.int64] | None = None,
) -> None:
    """x [rows, k] W^T + bias, then what `epilogue` says with out [rows, n] (see kf_epilogue in kernels.h). ends: of the
    shards that are summed in fixed point, of a dense weight with STORE or ADD."""
    rows = len(x)
    _check(x.dtype, rows, x)
    _check(torch.float32 if epilogue == FLOAT else x.dtype, rows, out)
    if x.shape[1] != weight.k or out.shape[1] != weight.n or not weight.fits(x.dtype):
        raise ValueError(
            f"[{weight.n}, {weight.k}] does not map {x.shape[1]} to {out.shape[1]} values of {x.dtype}"
        )
    is_bf16 = x.dtype is torch.bfloat16
    prepared = torch.empty(rows, _native.prepared_size(weight.k), dtype=torch.uint8)
    addresses = (x.data_ptr(), weight.place, out.data_ptr(), prepared.data_ptr())
    _native.linear(team, *addresses, rows, weight.k, weight.n, epilogue, is_bf16, ends)


def _check(dtype: torch.dtype, rows: int, *tensors: torch.Tensor) -> None:
    for t in tensors:
        if t.dtype is not dtype or not t.is_contiguous() or t.shape[0] < rows or not t.is_cpu:
            raise ValueError(
                f"expected contiguous {dtype} with at least {rows} rows, got {t.dtype} {tuple(t.shape)}"
            )
