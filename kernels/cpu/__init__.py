"""Kernels for CPUs in C, on one thread. Tensors are checked here and passed on as addresses."""

import torch

from kernels.base import PackedWeight, PagedCache, StepArrays
from kernels.cpu import _attention

HEAD_DIM_MAX = 512  # KF_HEAD_DIM_MAX in attention.c
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CpuKernels:
    """See kernels.base.Kernels."""

    __slots__ = ("_cache", "_dtype", "_head_dim", "_is_bf16", "_kv", "_kv_heads", "_step", "_tokens")

    def __init__(self, kv: PagedCache, step: StepArrays) -> None:
        if kv.head_dim > HEAD_DIM_MAX or kv.head_dim % 2:
            raise ValueError(f"head_dim {kv.head_dim} is not even or over {HEAD_DIM_MAX}")
        self._kv = kv  # keeps the memory alive
        self._head_dim, self._kv_heads = kv.head_dim, kv.kv_heads
        self._dtype = DTYPES[kv.dtype]
        self._is_bf16 = self._dtype is torch.bfloat16
        self._cache = _attention.Cache(
            kv.address, kv.num_blocks, kv.layers, kv.kv_heads, kv.block_size, kv.head_dim, self._is_bf16
        )
        self._step = _attention.Step(step.positions, step.slots, step.cu_q, step.context_lens, step.tables)
        self._tokens = len(step.positions)

    def _check(self, rows: int, *tensors: torch.Tensor) -> None:
        for t in tensors:
            if t.dtype is not self._dtype or not t.is_contiguous() or t.shape[0] < rows or not t.is_cpu:
                raise ValueError(
                    f"expected contiguous {self._dtype} with at least {rows} rows, got {t.dtype} {tuple(t.shape)}"
                )

    def _heads(self, q: torch.Tensor) -> int:
        heads, rest = divmod(q[0].numel() if len(q) else 0, self._head_dim)
        if rest:
            raise ValueError(f"rows of {q[0].numel()} values are no heads of {self._head_dim}")
        return heads

    def rope_write(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        q: torch.Tensor,
    ) -> None:
        self._check(self._tokens, qkv, q)
        heads = self._heads(q)
        for table in (cos, sin):
            if table.dtype is not torch.float32 or table.shape != cos.shape or not table.is_contiguous():
                raise ValueError("cos and sin must be contiguous float32 of one shape")
        if (
            cos.shape[1] * 2 != self._head_dim
            or qkv.shape[1] != (heads + 2 * self._kv_heads) * self._head_dim
        ):
            raise ValueError("qkv, q and the rotary table have different head sizes")
        for norm in (q_norm, k_norm):
            if norm is not None:
                self._check(self._head_dim, norm)
        _attention.rope_write(
            self._cache,
            layer,
            self._step,
            qkv.data_ptr(),
            qkv.shape[1],
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0],
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            eps,
            heads,
            q.data_ptr(),
        )

    def attention(
        self, layer: int, q: torch.Tensor, scale: float, window: int | None, out: torch.Tensor
    ) -> None:
        self._check(self._tokens, q, out)
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} keys is empty")
        if q.shape[1:] != out.shape[1:]:
            raise ValueError("q and out have different shapes")
        _attention.attention(
            self._cache, layer, self._step, q.data_ptr(), out.data_ptr(), self._heads(q), scale, window or 0
        )

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, rows: int
    ) -> None:
        self._check(rows, x, out)
        self._check(0, weight.packed)
        if x.shape[1] != weight.k or out.shape[1] != weight.n:
            raise ValueError(f"[{weight.n}, {weight.k}] does not map {x.shape[1]} to {out.shape[1]} values")
        if bias is not None:
            self._check(weight.n, bias)
        _attention.linear(
            x.data_ptr(),
            weight.packed.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            weight.k,
            weight.n,
            self._is_bf16,
        )

    def add_rms_norm(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        out: torch.Tensor | None,
        rows: int,
    ) -> None:
        n = residual.shape[1]
        for t in (x, residual, out):
            if t is not None:
                self._check(rows, t)
                if t.shape[1] != n:
                    raise ValueError(f"rows of {t.shape[1]} and of {n} values do not match")
        if out is not None:
            if weight is None:
                raise ValueError("a norm needs its weight")
            self._check(n, weight)
        _attention.add_rms_norm(
            0 if x is None else x.data_ptr(),
            residual.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if out is None else out.data_ptr(),
            rows,
            n,
            eps,
            self._is_bf16,
        )

    def silu_mul(self, x: torch.Tensor, out: torch.Tensor, rows: int) -> None:
        self._check(rows, x, out)
        if x.shape[1] != 2 * out.shape[1]:
            raise ValueError(f"rows of {x.shape[1]} values are not twice {out.shape[1]}")
        _attention.silu_mul(x.data_ptr(), out.data_ptr(), rows, out.shape[1], self._is_bf16)
