"""A whole stage in one call: the threads walk through all its layers without coming back to Python."""

import numpy as np
import numpy.typing as npt
import torch

from kernels.base import DTYPES, Layer, Linear, PagedCache, StageSpec, StepArrays
from kernels.cpu import _native
from kernels.cpu.ops import cache_of, step_of
from kernels.cpu.pack import Packed, pack, pack_gate_up


class CpuStage:
    """See kernels.base.StageKernels. Threads sleep between steps; within one they wait for each other busily, but
    for microseconds only. Its maker must not fork afterwards."""

    def __init__(self, spec: StageSpec, kv: PagedCache, threads: int = 1) -> None:
        self._spec = spec
        self._kv = kv  # keeps the memory alive
        self._dtype = DTYPES[kv.dtype]
        self._team = _native.Team(threads)
        self._packed: list[tuple[Layer, tuple[Packed, ...]]] = []  # likewise
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
            self._set_layer(index, layer)
        self._head = None if spec.head is None else pack(Linear(spec.head.weight))
        self._norm = None if spec.head is None else spec.head.norm.clone()
        self._logits = np.empty((0, 0 if self._head is None else self._head.n), np.float32)
        self._rows = 0
        self.reserve(16)

    def reserve(self, rows: int) -> torch.Tensor:
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            s, kv = self._spec, self._kv
            heads = s.heads * kv.head_dim
            sizes = (s.hidden, s.hidden, heads + 2 * kv.kv_heads * kv.head_dim, heads, heads, s.intermediate)
            self._buffers = [torch.empty(self._rows, size, dtype=self._dtype) for size in sizes]
            self._native.set_buffers(*(buffer.data_ptr() for buffer in self._buffers))
        return self._buffers[0][:rows]

    def forward(self, step: StepArrays, cos: torch.Tensor, sin: torch.Tensor) -> None:
        if len(step.positions) > self._rows:
            raise ValueError(f"the step has {len(step.positions)} tokens, reserved are {self._rows}")
        for table in (cos, sin):
            if table.dtype is not torch.float32 or table.shape != cos.shape or not table.is_contiguous():
                raise ValueError("cos and sin must be contiguous float32 of one shape")
        if cos.shape[1] * 2 != self._kv.head_dim:
            raise ValueError("the rotary table is for another head size")
        self._native.set_rotary(cos.data_ptr(), sin.data_ptr(), cos.shape[0])
        self._native.forward(step_of(step))

    def logits(self, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._head is None or self._norm is None:
            raise ValueError("this stage has no head")
        rows, n = hidden.shape
        if n != self._spec.hidden or hidden.dtype is not self._dtype or not hidden.is_contiguous():
            raise ValueError(f"expected contiguous {self._dtype} rows of {self._spec.hidden} values")
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
            self._spec.eps,
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

    def _set_layer(self, index: int, layer: Layer) -> None:
        """Packs one layer's weights and tells the kernels where they are."""
        vectors = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        weights = (pack(layer.qkv), pack(layer.o), pack_gate_up(layer.gate_up), pack(layer.down))
        for tensor in (*vectors, *(w.weight for w in weights), *(w.bias for w in weights)):
            if tensor is not None and (tensor.dtype is not self._dtype or not tensor.is_contiguous()):
                raise ValueError(f"a weight of layer {index} is not contiguous {self._dtype}")
        s, kv = self._spec, self._kv
        heads = s.heads * kv.head_dim
        wanted = (
            (heads + 2 * kv.kv_heads * kv.head_dim, s.hidden),
            (s.hidden, heads),
            (s.intermediate, s.hidden),
            (s.hidden, s.intermediate),
        )
        if tuple((w.n, w.k) for w in weights) != wanted:
            raise ValueError(f"the weights of layer {index} do not fit the stage's sizes")
        kept = [None if vector is None else vector.clone() for vector in vectors]
        self._packed.append((layer, weights))
        self._vectors = [*getattr(self, "_vectors", []), *kept]
        self._native.set_layer(
            index,
            *(0 if vector is None else vector.data_ptr() for vector in kept),
            [w.addresses for w in weights],
            layer.window or 0,
        )
