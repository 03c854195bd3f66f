"""A whole step in one call: the threads walk through all its operations without coming back to Python."""

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.base import DTYPES, Layer, Linear, PagedCache, StageSpec, StepArrays
from kernels.cpu import _native
from kernels.cpu.ops import cache_of, step_of
from kernels.cpu.pack import Packed, pack, pack_gate_up
from kernels.memory import Arena


class CpuStage:
    """See kernels.base.StageKernels. Threads sleep between steps; within one they wait for each other busily, but
    for microseconds only. Its maker must not fork afterwards."""

    def __init__(self, spec: StageSpec, kv: PagedCache, threads: int = 1) -> None:
        self._hidden, self._heads, self._intermediate = spec.hidden, spec.heads, spec.intermediate
        self._rotary = spec.rotary
        self._kv = kv  # keeps the memory alive
        self._dtype = DTYPES[kv.dtype]
        self.suspect = False
        self._kept: list[Packed | torch.Tensor | None] = []  # likewise
        arena = Arena()
        self.team = _native.Team(threads)  # others may use it between two calls of forward()
        self._native = _native.Stage(
            self.team,
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
        self._vocab = self._set_ends(spec, arena)
        self._logits = np.empty((0, self._vocab), np.float32)
        self._rows = self._positions = 0
        self._make_room(16)

    def forward(
        self, source: npt.NDArray[np.int64] | Buffer, step: StepArrays, picked: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.generic]:
        native = step_of(step)
        rows = native.tokens
        if rows < 1:
            raise ValueError("a step needs at least one token")
        if rows > self._rows:
            self._make_room(rows)
        if native.context > self._positions:
            self._cover(native.context)
        if not self._vocab:
            out = np.empty((rows, self._hidden), np.uint16 if self._dtype is torch.bfloat16 else np.float32)
            self.suspect = self._native.forward(native, source, picked, out.ctypes.data)
            return out
        if len(picked) > len(self._logits):
            self._logits = np.empty((max(len(picked), 2 * len(self._logits)), self._vocab), np.float32)
        self._native.forward(native, source, picked, self._logits.ctypes.data)
        return self._logits[: len(picked)]

    def warm_up(self) -> None:
        """Nothing is compiled or captured on a CPU."""

    def beats(self) -> int:
        return self.team.beats()

    def _make_room(self, rows: int) -> None:
        self._rows = max(rows, 2 * self._rows)
        heads, kv_heads = (n * self._kv.head_dim for n in (self._heads, self._kv.kv_heads))
        hidden = self._hidden
        sizes = (hidden, hidden, heads + 2 * kv_heads, heads, heads, self._intermediate, hidden)
        self._buffers = [torch.empty(self._rows, size, dtype=self._dtype) for size in sizes]
        widest = max(hidden, heads, self._intermediate)
        prepared = _native.prepared_size(widest) if self._dtype is torch.bfloat16 else 0
        self._buffers.append(torch.empty(self._rows, prepared, dtype=torch.uint8))
        self._native.set_buffers(*(buffer.data_ptr() for buffer in self._buffers))

    def _cover(self, positions: int) -> None:
        self._rotary.cover(positions)
        cos, sin = self._rotary.cos, self._rotary.sin
        self._positions = min(len(cos), self._rotary.max_positions)
        self._native.set_rotary(cos.data_ptr(), sin.data_ptr(), self._positions)

    def _set_ends(self, spec: StageSpec, arena: Arena) -> int:
        """Embedding and head, where the stage has them. Returns how many logits a row has."""
        embed = 0
        if spec.embed is not None:
            table = self._checked(spec.embed, "the embedding")
            self._kept.append(table)
            embed = table.data_ptr()
        vocab = 0 if spec.embed is None else len(spec.embed)
        if spec.head is None:
            self._native.set_ends(vocab, embed, 0, (0, 0, 0, 1))
            return 0
        norm, head = (
            self._checked(spec.head.norm.clone(), "the last norm"),
            pack(Linear(spec.head.weight), arena),
        )
        self._kept += [norm, head]
        if spec.embed is not None and head.n != vocab:
            raise ValueError(f"the embedding has {vocab} tokens, the head {head.n}")
        self._native.set_ends(head.n, embed, norm.data_ptr(), head.place)
        return head.n

    def _checked(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if tensor.dtype is not self._dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous {self._dtype}")
        return tensor

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
        for tensor in vectors:
            if tensor is not None:
                self._checked(tensor, f"a norm of layer {index}")
        if not all(weight.fits(self._dtype) for weight in weights):
            raise ValueError(f"a weight of layer {index} is not {self._dtype}")
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
            [w.place for w in weights],
            layer.window or 0,
        )
