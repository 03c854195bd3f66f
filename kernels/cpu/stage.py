"""A whole stage in one call: the threads walk through all its layers without coming back to Python."""

import numpy as np
import numpy.typing as npt
import torch

from kernels.base import DTYPES, Layer, Linear, PagedCache, StageSpec, StepArrays
from kernels.cpu import _native
from kernels.cpu.ops import cache_of, step_of
from kernels.cpu.pack import Packed, pack, pack_gate_up
from kernels.memory import Arena


class CpuStage:
    """See kernels.base.StageKernels. Threads sleep between steps; within one they wait for each other busily, but
    for microseconds only. Its maker must not fork afterwards."""

    def __init__(self, spec: StageSpec, kv: PagedCache, threads: int = 1) -> None:
        self._hidden, self._heads, self._intermediate, self._eps = (
            spec.hidden,
            spec.heads,
            spec.intermediate,
            spec.eps,
        )
        self._rotary = spec.rotary
        self._kv = kv  # keeps the memory alive
        self._dtype = DTYPES[kv.dtype]
        self._team = _native.Team(threads)
        self._kept: list[Packed | torch.Tensor | None] = []  # likewise
        arena = Arena()
        self._native = _native.Stage(
            self._team,
            cache_of(kv),
            len(spec.layers),
            spec.hidden,
            spec.intermediate,
            spec.heads,
            spec.eps,
            kv.head_dim**-0.5,
        )
        for index, layer in enumerate(spec.layers):
            self._set_layer(index, layer, arena)
        self._head = None if spec.head is None else pack(Linear(spec.head.weight), arena)
        self._norm = None if spec.head is None else spec.head.norm.clone()
        self._logits = np.empty((0, 0 if self._head is None else self._head.n), np.float32)
        self._rows = 0
        self.reserve(16)

    def reserve(self, rows: int) -> torch.Tensor:
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            heads, kv_heads = (n * self._kv.head_dim for n in (self._heads, self._kv.kv_heads))
            sizes = (self._hidden, self._hidden, heads + 2 * kv_heads, heads, heads, self._intermediate)
            self._buffers = [torch.empty(self._rows, size, dtype=self._dtype) for size in sizes]
            self._native.set_buffers(*(buffer.data_ptr() for buffer in self._buffers))
        return self._buffers[0][:rows]

    def forward(self, step: StepArrays) -> None:
        rows = len(step.positions)
        if not 0 < rows <= self._rows:
            raise ValueError(f"the step has {rows} tokens, reserved are {self._rows}")
        self._rotary.cover(int(step.positions.max()) + 1)
        cos, sin = self._rotary.cos, self._rotary.sin
        self._native.set_rotary(cos.data_ptr(), sin.data_ptr(), cos.shape[0])
        self._native.forward(step_of(step))

    def logits(self, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._head is None or self._norm is None:
            raise ValueError("this stage has no head")
        rows, n = hidden.shape
        if n != self._hidden or hidden.dtype is not self._dtype or not hidden.is_contiguous():
            raise ValueError(f"expected contiguous {self._dtype} rows of {self._hidden} values")
        if rows > len(self._logits):
            self._logits = np.empty((max(rows, 2 * len(self._logits)), self._head.n), np.float32)
        normed = torch.empty_like(hidden)
        is_bf16 = self._dtype is torch.bfloat16
        _native.rms_norm(
            self._team,
            hidden.data_ptr(),
            self._norm.data_ptr(),
            normed.data_ptr(),
            rows,
            n,
            self._eps,
            is_bf16,
        )
        _native.linear(
            self._team,
            normed.data_ptr(),
            *self._head.addresses,
            self._logits.ctypes.data,
            rows,
            n,
            self._head.n,
            _native.FLOAT,
            is_bf16,
        )
        return self._logits[:rows]

    def _set_layer(self, index: int, layer: Layer, arena: Arena) -> None:
        """Packs one layer's weights and tells the kernels where they are."""
        norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        vectors = [None if norm is None else norm.clone() for norm in norms]
        weights = (
            pack(layer.qkv, arena),
            pack(layer.o, arena),
            pack_gate_up(layer.gate_up, arena),
            pack(layer.down, arena),
        )
        for tensor in (*vectors, *(w.weight for w in weights), *(w.bias for w in weights)):
            if tensor is not None and (tensor.dtype is not self._dtype or not tensor.is_contiguous()):
                raise ValueError(f"a weight of layer {index} is not contiguous {self._dtype}")
        heads, kv_heads = (n * self._kv.head_dim for n in (self._heads, self._kv.kv_heads))
        wanted = (
            (heads + 2 * kv_heads, self._hidden),
            (self._hidden, heads),
            (self._intermediate, self._hidden),
            (self._hidden, self._intermediate),
        )
        if tuple((w.n, w.k) for w in weights) != wanted:
            raise ValueError(f"the weights of layer {index} do not fit the stage's sizes")
        self._kept += [*vectors, *weights]
        attention_norm, mlp_norm, q_norm, k_norm = (0 if v is None else v.data_ptr() for v in vectors)
        self._native.set_layer(
            index,
            attention_norm,
            mlp_norm,
            q_norm,
            k_norm,
            [w.addresses for w in weights],
            layer.window or 0,
        )
