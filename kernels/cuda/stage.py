"""All layers of one stage on a GPU, as one call a step."""

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.base import Layer, Mlp, StageSpec, StepArrays
from kernels.cuda.cache import DeviceCache, device_guard
from kernels.cuda.experts import Routes
from kernels.cuda.graphs import DecodeGraphs, powers_to
from kernels.cuda.step import DeviceStep, query_tiles, splits_needed
from kernels.cuda.weights import DeviceWeights
from kernels.triton.attention import Partials, attention, attention_tiles, keys_of, splits_of
from kernels.triton.jit import ceil_div, power_of_two
from kernels.triton.linear import linear
from kernels.triton.rope import rope_write
from kernels.triton.rows import add_rms_norm, gated_mul
from kernels.xformers import PagedAttention

GRAPH_ROWS_MAX = 256
PARTIAL_BYTES = 64 << 20  # room for attention's unmerged splits; longer prefills take several turns


class Activations:
    """What a step computes between its layers: [rows, ...] each."""

    def __init__(self, spec: StageSpec, rows: int, cache: DeviceCache) -> None:
        def room(width: int) -> torch.Tensor:
            return cache.planes.new_zeros(rows, width)

        heads, kv_heads = (n * cache.head_dim for n in (spec.heads, cache.kv_heads))
        self.rows = rows
        self.residual, self.x, self.normed = room(spec.hidden), room(spec.hidden), room(spec.hidden)
        self.qkv, self.q, self.attended = room(heads + 2 * kv_heads), room(heads), room(heads)
        self.gate_up, self.activated = room(2 * spec.intermediate), room(spec.intermediate)


class CudaStage:
    """See kernels.base.StageKernels. Decode steps run as CUDA graphs, all others kernel by kernel.

    rows_max: tokens of a step; all room that steps need is there from the start, and stays where it is. context_max:
    tokens of a request, if not what the cache holds.
    attention_by: "triton" keeps equal bits between prefill and decode; "xformers" is a library's attention, which does
    not (kernels/xformers.py)."""

    def __init__(
        self,
        spec: StageSpec,
        kv: DeviceCache,
        rows_max: int,
        attention_by: Literal["triton", "xformers"] = "triton",
        weights: DeviceWeights | None = None,
        context_max: int = 0,
    ) -> None:
        self.kv = kv
        self.suspect = True  # nobody has looked at them here
        self._spec, self._device = spec, kv.planes.device
        if weights is None:
            weights = DeviceWeights.load(spec, self._device, kv.num_blocks * kv.block_size, kv.planes.dtype)
        self._layers, self._embed, self._head = weights.layers, weights.embed, weights.head
        self._mixtures = weights.mixtures
        self._cos, self._sin = weights.cos, weights.sin
        self._positions = len(self._cos[0])
        self._scale = kv.head_dim**-0.5 if spec.scale is None else spec.scale
        sizes = attention_tiles(kv.planes.dtype, kv.head_dim, spec.heads // kv.kv_heads)
        self._tile_queries = sizes.queries
        self._context = min(self._positions, context_max or kv.num_blocks * kv.block_size)
        splits_max = splits_of(self._context)
        split_bytes = spec.heads * (kv.head_dim + 2) * 4
        queries = max(sizes.queries, PARTIAL_BYTES // (splits_max * split_bytes))
        self._partials = Partials(queries, splits_max, spec.heads, kv.head_dim, self._device)
        self._library = PagedAttention(kv.planes) if attention_by == "xformers" else None
        self._eager = DeviceStep(16, 16, 16, 16, self._partials, self._device)
        self._rows_max = rows_max
        graph_rows = min(rows_max, GRAPH_ROWS_MAX)
        room = max(rows_max, power_of_two(graph_rows))
        self._activations = Activations(spec, room, kv)
        first = next((mixture for mixture in self._mixtures if mixture is not None), None)
        self._routes = None if first is None else Routes(first, room)
        self._graphs = DecodeGraphs(
            self._run,
            self._activations.residual,
            graph_rows,
            splits_max,
            kv.block_size,
            self._partials,
        )

    def warm_up(self) -> None:
        """Compiles and loads every kernel, and captures every graph, the smallest first: nothing of it is left for a
        request to wait for. Steps of padding only: the cache stays as it is."""
        with torch.inference_mode(), device_guard(self._device):
            self.rehearse()
            if self._library is None:
                self._graphs.capture_all()
            else:
                widths = powers_to(ceil_div(self._context, self.kv.block_size))
                self._library.warm_up(
                    self._spec.heads, self._scale, powers_to(self._graphs.rows_max), widths,
                    min(self._rows_max, self._context),
                )  # fmt: skip

    def rehearse(self) -> None:
        """Runs the largest step there is, of padding only: all kernels are compiled then, and all memory is taken."""
        rows, width = self._rows_max, ceil_div(keys_of(1), self.kv.block_size)
        tiles = query_tiles(np.array([0, rows], np.int32), self._tile_queries)
        with torch.inference_mode(), device_guard(self._device):
            step = DeviceStep(rows, 1, width, len(tiles), self._partials, self._device)
            step.fill(None, np.empty((0, 3), np.int32))
            step.plan(1, tiles[:, 1], rows)
            residual = self._activations.residual[:rows].zero_()
            self._run(step)
            if self._head is not None:
                self._logits(residual)

    def beats(self) -> None:
        return None  # the device says nothing until a step has ended

    def forward(
        self, source: npt.NDArray[np.int64] | Buffer, step: StepArrays, picked: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.generic]:
        with torch.inference_mode(), device_guard(self._device):
            rows = len(step.positions)
            self._check(step, picked)
            residual = self._activations.residual[:rows]
            self._load(source, residual)
            if self._library is None and self._graphs.takes(step):
                self._graphs.run(step)
            else:
                self._run(self._eager_step(step), step)
            if self._head is None:
                return to_host(residual)
            at = torch.from_numpy(picked.astype(np.int64)).to(self._device)
            return self._logits(residual.index_select(0, at))

    def _load(self, source: npt.NDArray[np.int64] | Buffer, target: torch.Tensor) -> None:
        if self._embed is not None:
            tokens = np.asarray(source)
            if tokens.shape != (len(target),) or tokens.dtype != np.int64:
                raise ValueError(f"the first stage needs {len(target)} tokens as int64")
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self._embed):
                raise IndexError(f"a token is outside the vocabulary of {len(self._embed)}")
            torch.index_select(self._embed, 0, torch.from_numpy(tokens).to(self._device), out=target)
            if self._spec.embed_scale != 1.0:
                target.mul_(self._spec.embed_scale)
            return
        data = memoryview(cast("Buffer", source))
        if data.nbytes != target.nbytes or not data.c_contiguous:
            raise ValueError(f"expected {target.nbytes} bytes of activations, got {data.nbytes}")
        here = torch.empty_like(target, device="cpu")
        here.view(torch.uint8).numpy()[:] = np.frombuffer(data.cast("B"), np.uint8).reshape(len(target), -1)
        target.copy_(here)

    def _logits(self, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
        assert self._head is not None
        norm, weight = self._head.norm, self._head.tensor
        rows = len(hidden)
        out = torch.empty(rows, len(weight), dtype=torch.float32, device=self._device)
        if rows:
            normed = torch.empty_like(hidden)
            add_rms_norm(None, hidden, norm, self._spec.eps, normed, rows)
            linear(normed, weight, None, out, rows)
            if cap := self._head.softcap:
                out.div_(cap).tanh_().mul_(cap)
        return out.cpu().numpy()

    def _check(self, step: StepArrays, picked: npt.NDArray[np.int32]) -> None:
        rows, cache = len(step.positions), self.kv
        if rows < 1:
            raise ValueError("a step needs at least one token")
        if rows > self._rows_max:
            raise ValueError(f"a step of {rows} tokens, and there is room for {self._rows_max}")
        if picked.size and not 0 <= picked.min() <= picked.max() < rows:
            raise IndexError("logits are asked of a row that this step does not have")
        slots = cache.num_blocks * cache.block_size
        if int(step.slots.min()) < 0 or int(step.slots.max()) >= slots:
            raise IndexError(f"a slot is outside the cache's {slots}")
        if int(step.tables.min()) < 0 or int(step.tables.max()) >= cache.num_blocks:
            raise IndexError(f"a block is outside the cache's {cache.num_blocks}")
        longest = int(step.context_lens.max())
        if longest > min(self._positions, step.tables.shape[1] * cache.block_size):
            raise IndexError(f"a context of {longest} tokens has no blocks or no rotary table")

    def _eager_step(self, step: StepArrays) -> DeviceStep:
        tiles = query_tiles(step.cu_q, self._tile_queries)
        if not self._eager.fits(step, len(tiles)):
            need = (len(step.positions), *step.tables.shape, len(tiles))
            tokens, rows, width, count = (
                power_of_two(max(n, have)) for n, have in zip(need, self._eager.capacity, strict=True)
            )
            self._eager = DeviceStep(tokens, rows, width, count, self._partials, self._device)
        self._eager.fill(step, tiles)
        self._eager.plan(splits_needed(step), tiles[:, 1], len(step.positions))
        return self._eager

    def _run(self, step: DeviceStep, source: StepArrays | None = None) -> None:
        """The layers over a step on the device; only kernel launches, so that a graph can capture it."""
        w, rows, eps = self._activations, step.tokens, self._spec.eps
        mask = None
        if self._library is not None and source is not None:
            mask = self._library.mask(source, step.tables)
        x: torch.Tensor | None = None
        x_norm: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            keys, values = self.kv.layer(index)
            add_rms_norm(x, w.residual, layer.attention_norm, eps, w.normed, rows, x_norm)
            linear(w.normed, layer.qkv.tensor, layer.qkv.bias, w.qkv, rows)
            rope_write(
                w.qkv, step.positions, step.slots, self._cos[layer.rotary], self._sin[layer.rotary],
                layer.q_norm, layer.k_norm, eps, w.q, keys, values,
            )  # fmt: skip
            if not self._attend_by_library(index, layer, mask):
                attention(
                    w.q, keys, values, step.positions, step.tables, step.tiles, step.slabs, step.partials,
                    step.splits, self._scale, layer.window, w.attended,
                )  # fmt: skip
            linear(w.attended, layer.o.tensor, layer.o.bias, w.x, rows)
            add_rms_norm(w.x, w.residual, layer.mlp_norm, eps, w.normed, rows, layer.attention_out_norm)
            self._mlp(index, layer, rows)
            x, x_norm = w.x, layer.mlp_out_norm
        add_rms_norm(x, w.residual, None, eps, None, rows, x_norm)

    def _mlp(self, index: int, layer: Layer, rows: int) -> None:
        """x = what the layer's MLP, or its mixture of experts, makes of normed."""
        w, activation = self._activations, self._spec.activation
        mixture = self._mixtures[index]
        if mixture is not None and self._routes is not None:
            self._routes.run(mixture, w.normed, w.x, rows, activation)
            return
        assert isinstance(layer.mlp, Mlp)
        gate_up, down = layer.mlp.gate_up, layer.mlp.down
        linear(w.normed, gate_up.tensor, gate_up.bias, w.gate_up, rows)
        gated_mul(w.gate_up, w.activated, rows, activation)
        linear(w.activated, down.tensor, down.bias, w.x, rows)

    def _attend_by_library(self, index: int, layer: Layer, mask: Any) -> bool:
        """Whether a library has computed this layer's attention: if one was chosen and can."""
        if self._library is None or mask is None or layer.window is not None:
            return False
        w, rows = self._activations, int(mask.q_seqinfo.seqstart_py[-1])
        return self._library.attend(index, w.q[:rows], mask, self._scale, w.attended[:rows])


def to_host(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """A copy that the caller may keep; bfloat16 as uint16."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.to("cpu", copy=True).numpy()
