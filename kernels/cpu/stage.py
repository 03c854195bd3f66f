"""A whole step in one call: the threads walk through all its operations without coming back to Python."""

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.base import DTYPES, Experts, Layer, Linear, Mlp, PagedCache, StageSpec, StepArrays, Sums
from kernels.cpu import _native
from kernels.cpu.ops import cache_of, step_of
from kernels.cpu.pack import Packed, pack, pack_gate_up
from kernels.memory import Arena
from kernels.ranks.cuts import ffn_ends, head_ends
from kernels.ranks.own import check_cuttable


class CpuStage:
    """See kernels.base.StageKernels. Threads sleep between steps; within one they wait for each other busily, but
    for microseconds only. Its maker must not fork afterwards."""

    def __init__(self, spec: StageSpec, kv: PagedCache, threads: int = 1, sums: Sums = "float") -> None:
        if sums == "fixed":
            check_cuttable(spec)
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
            kv.head_dim**-0.5 if spec.scale is None else spec.scale,
        )
        softcap = 0.0 if spec.head is None else spec.head.softcap
        self._native.set_ways(spec.activation == "gelu_tanh", spec.norm_wide, spec.embed_scale, softcap)
        self._mixtures = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, Experts)]
        for index, layer in enumerate(spec.layers):
            self._set_layer(index, layer, arena)
        if sums == "fixed":
            self._cuts = head_ends(kv.kv_heads, spec.heads * kv.head_dim), ffn_ends(spec.intermediate)
            for index in range(len(spec.layers)):
                self._native.set_cuts(index, *self._cuts)
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
        self._buffers.append(self._prepared(self._rows, max(hidden, heads, self._intermediate)))
        self._native.set_buffers(*(buffer.data_ptr() for buffer in self._buffers))
        if self._mixtures:
            self._routes = self._room_for_routes(self._rows)
            self._native.set_routes(*(buffer.data_ptr() for buffer in self._routes))

    def _prepared(self, rows: int, widest: int) -> torch.Tensor:
        prepared = _native.prepared_size(widest) if self._dtype is torch.bfloat16 else 0
        return torch.empty(rows, prepared, dtype=torch.uint8)

    def _room_for_routes(self, rows: int) -> list[torch.Tensor]:
        """See kf_routes."""
        experts = max(len(mixture.experts) for mixture in self._mixtures)
        chosen = max(mixture.chosen for mixture in self._mixtures)
        widest = max(mixture.experts[0].down.shape[1] for mixture in self._mixtures)
        sizes = (self._hidden, widest, self._hidden)
        return [
            torch.empty(rows, experts),
            torch.empty(rows, chosen),
            torch.empty(rows, chosen, dtype=torch.int32),
            torch.empty(rows, chosen, dtype=torch.int32),
            torch.empty(2 * experts + 1, dtype=torch.int32),
            *(torch.empty(rows * chosen, size, dtype=self._dtype) for size in sizes),
            self._prepared(rows * chosen, max(self._hidden, widest)),
        ]

    def _cover(self, positions: int) -> None:
        for index, rotary in enumerate(self._rotary):
            rotary.cover(positions)
            cos, sin = rotary.cos, rotary.sin
            self._positions = min(len(cos), rotary.max_positions)
            place = (cos.data_ptr(), sin.data_ptr())
            self._native.set_rotary(index, *place, self._positions, 2 * cos.shape[1])

    def _set_ends(self, spec: StageSpec, arena: Arena) -> int:
        """Embedding and head, where the stage has them. Returns how many logits a row has."""
        embed = 0
        if spec.embed is not None:
            table = self._checked(spec.embed, "the embedding")
            self._kept.append(table)
            embed = table.data_ptr()
        vocab = 0 if spec.embed is None else len(spec.embed)
        if spec.head is None:
            self._native.set_ends(vocab, embed, 0, (0, 0, 0, 1), 0)
            return 0
        norm = self._checked(spec.head.norm.clone(), "the last norm", torch.float32)
        head = pack(Linear(spec.head.weight), arena)
        self._kept += [norm, head]
        if spec.embed is not None and head.n != vocab:
            raise ValueError(f"the embedding has {vocab} tokens, the head {head.n}")
        self._native.set_ends(head.n, embed, norm.data_ptr(), head.place, head.n)
        return head.n

    def _checked(self, tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        wanted = self._dtype if dtype is None else dtype
        if tensor.dtype is not wanted or not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous {wanted}")
        return tensor

    def _set_layer(self, index: int, layer: Layer, arena: Arena) -> None:
        """Packs one layer's weights and tells the kernels where they are."""
        norms = (
            layer.attention_norm,
            layer.mlp_norm,
            layer.q_norm,
            layer.k_norm,
            layer.attention_out_norm,
            layer.mlp_out_norm,
        )
        vectors = [None if norm is None else norm.clone() for norm in norms]
        for tensor in vectors:
            if tensor is not None:
                self._checked(tensor, f"a norm of layer {index}", torch.float32)
        heads, kv_heads = (n * self._kv.head_dim for n in (self._heads, self._kv.kv_heads))
        qkv, o = pack(layer.qkv, arena), pack(layer.o, arena)
        self._fit(index, (qkv, (heads + 2 * kv_heads, self._hidden)), (o, (self._hidden, heads)))
        mlp: tuple[Packed | None, Packed | None] = (None, None)
        if isinstance(layer.mlp, Mlp):
            mlp = self._packed(index, layer.mlp, self._intermediate, arena)
        self._kept += [*vectors, qkv, o]
        self._native.set_layer(
            index,
            [0 if v is None else v.data_ptr() for v in vectors],
            [qkv.place, o.place, *(None if weight is None else weight.place for weight in mlp)],
            layer.window or 0,
            layer.rotary,
        )
        if isinstance(layer.mlp, Experts):
            self._set_experts(index, layer.mlp, arena)

    def _set_experts(self, index: int, mixture: Experts, arena: Arena) -> None:
        intermediate = mixture.experts[0].down.shape[1]
        router = pack(Linear(mixture.router), arena)
        self._fit(index, (router, (len(mixture.experts), self._hidden)))
        packed = [self._packed(index, expert, intermediate, arena) for expert in mixture.experts]
        self._kept.append(router)
        self._native.set_experts(
            index,
            router.place,
            [gate_up.place for gate_up, _ in packed],
            [down.place for _, down in packed],
            mixture.chosen,
            intermediate,
            mixture.normalised,
        )

    def _packed(self, index: int, mlp: Mlp, intermediate: int, arena: Arena) -> tuple[Packed, Packed]:
        gate_up, down = pack_gate_up(mlp.gate_up, arena), pack(mlp.down, arena)
        self._fit(index, (gate_up, (intermediate, self._hidden)), (down, (self._hidden, intermediate)))
        self._kept += [gate_up, down]
        return gate_up, down

    def _fit(self, index: int, *weights: tuple[Packed, tuple[int, int]]) -> None:
        for weight, shape in weights:
            if not weight.fits(self._dtype):
                raise ValueError(f"a weight of layer {index} is not {self._dtype}")
            if (weight.n, weight.k) != shape:
                raise ValueError(f"the weights of layer {index} do not fit the stage's sizes")
