"""One rank of a stage on the CPU: its heads, its shards of the FFN, and sums over all ranks' within a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.base import DTYPES, Layer, Mlp, PagedCache, StageSpec, StepArrays
from kernels.cpu import _native
from kernels.cpu.ops import step_of
from kernels.cpu.pack import Packed
from kernels.cpu.rank_weights import RankWeights
from kernels.ranks.cuts import ffn_ends, head_ends
from kernels.ranks.exchange import Exchange
from kernels.ranks.layout import Layout
from kernels.ranks.own import check_cuttable, shape_of, shard_widths, vocabulary_of

Place = tuple[int, int, int, int]  # see Packed.place
HeadsOfLayers = Sequence[Sequence[int]]
NOTHING: Place = (0, 0, 0, 1)
NO_TOKENS = np.zeros(0, np.int32)


class HeadMemory(Protocol):
    """Where a rank's heads have K and V: a rank's own memory, or a cache that all ranks of a host share."""

    num_blocks: int
    block_size: int
    head_dim: int

    @property
    def dtype(self) -> str: ...  # "float32" | "bfloat16"

    def cache(self, layout: Layout, rank: int, own: HeadsOfLayers) -> _native.Cache:
        """As the kernels take it, of these KV heads of each layer, as many in each."""
        ...


class SharedHeads:
    """Heads in the KV cache of the whole stage, which all its ranks have in common: when ranks go or come nothing is
    moved, and of which rows a rank computes the data-parallel heads is free to change from step to step."""

    def __init__(self, kv: PagedCache) -> None:
        self._kv = kv
        self.num_blocks, self.block_size, self.head_dim = kv.num_blocks, kv.block_size, kv.head_dim

    @property
    def dtype(self) -> str:
        return self._kv.dtype

    def cache(self, layout: Layout, rank: int, own: HeadsOfLayers) -> _native.Cache:
        """Raises ValueError for a layout of another stage."""
        kv = self._kv
        if (kv.layers, kv.kv_heads) != (layout.shape.layers, layout.shape.heads):
            raise ValueError(f"{kv.layers} layers of {kv.kv_heads} KV heads for a layout of {layout.shape}")
        table = np.array(
            [[layer * 2 * kv.kv_heads + head for head in heads] for layer, heads in enumerate(own)]
        )
        item = kv.block_size * kv.head_dim
        return planes_of(
            self, kv.address, table, item, kv.kv_heads * item, kv.layers * 2 * kv.kv_heads * item
        )


def planes_of(
    memory: HeadMemory,
    address: int,
    table: npt.NDArray[np.integer],
    plane_size: int,
    to_values: int,
    to_block: int,
) -> _native.Cache:
    """table [layers, heads]: where K of a head is in block 0, in units of plane_size values from `address`."""
    layers, heads = table.shape
    is_bf16 = DTYPES[memory.dtype] is torch.bfloat16
    cache = _native.Cache(
        address, memory.num_blocks, layers, heads, memory.block_size, memory.head_dim, is_bf16
    )
    cache.set_planes(np.ascontiguousarray(table, np.int32), plane_size, to_values, to_block)
    return cache


class CpuRank:
    """Computes what the layout gives to `rank`; a row's numbers have the bits that CpuStage has with fixed-point sums,
    on any number of ranks. All ranks take the same steps, each in its own process or thread.

    before: the same rank in another layout, of whose packed weights those are copied that it has in this one, too.
    Threads are as of CpuStage. Raises ValueError for a stage or a layout that does not fit."""

    def __init__(
        self,
        spec: StageSpec,
        layout: Layout,
        rank: int,
        memory: HeadMemory,
        exchange: Exchange,
        *,
        threads: int = 1,
        timeout_s: float = 10.0,
        before: CpuRank | None = None,
    ) -> None:
        check_cuttable(spec)
        kv_heads = layout.shape.heads
        if layout.shape != shape_of(spec, kv_heads) or spec.heads % kv_heads:
            raise ValueError(f"a layout of {layout.shape} does not fit the stage")
        self._spec, self._layout, self._rank = spec, layout, rank
        self._memory, self._exchange, self._timeout_s = memory, exchange, timeout_s
        self._dtype = DTYPES[memory.dtype]
        had = None if before is None else before.weights
        self.weights: RankWeights = RankWeights(spec, kv_heads, had)
        self._kept: list[object] = []  # what the kernels have addresses of
        self.suspect = False
        self.team = _native.Team(threads)
        scale = memory.head_dim**-0.5 if spec.scale is None else spec.scale
        # Of which the stage needs the type only: each part has its own.
        every = _native.Cache(
            0, memory.num_blocks, 1, kv_heads, memory.block_size, memory.head_dim, self._is_bf16
        )
        sizes = (len(spec.layers), spec.hidden, spec.intermediate, spec.heads)
        self._stage = _native.Stage(self.team, every, *sizes, spec.eps, scale)
        softcap = 0.0 if spec.head is None else spec.head.softcap
        self._stage.set_ways(spec.activation == "gelu_tanh", spec.norm_wide, spec.embed_scale, softcap)
        self._native = _native.Rank(self._stage, kv_heads, layout.shape.shards)
        self._native.set_exchange(exchange.address, int(timeout_s * 1e9))
        self._widest = 0
        for index, layer in enumerate(spec.layers):
            self._set_layer(index, layer)
        self._parts = [
            (data_parallel, count)
            for data_parallel, count in enumerate((layout.heads_per_rank, layout.heads_data_parallel))
            if count
        ]
        for data_parallel, count in self._parts:
            self._set_heads(bool(data_parallel), count)
        self.vocabulary = self._set_ends()  # of which this rank has logits
        self.weights.settle()
        self._rows = self._positions = 0
        self._make_room(16)

    @property
    def _is_bf16(self) -> bool:
        return self._dtype is torch.bfloat16

    def forward(
        self,
        source: npt.NDArray[np.int64] | Buffer,
        step: StepArrays,
        picked: npt.NDArray[np.int32],
        owned: StepArrays | None = None,
        places: npt.NDArray[np.int32] = NO_TOKENS,
    ) -> npt.NDArray[np.generic]:
        """As StageKernels.forward(), on every rank at once. Logits are those of `vocabulary`, and the caller's own.

        owned: the rows that this rank owns, with slots and tables of its data-parallel planes; places int32: which
        tokens of the step they are. Raises also ExchangeAborted or RankMissing: the step's KV may then be written in
        part."""
        native = step_of(step)
        own = step_of(owned) if owned is not None else _no_rows()
        if native.tokens < 1:
            raise ValueError("a step needs at least one token")
        if native.tokens * self._spec.hidden > self._exchange.numbers_max:
            raise ValueError(
                f"{native.tokens} rows of {self._spec.hidden} are more than the {self._exchange.numbers_max} numbers"
                " that the ranks' exchange has room for"
            )
        if native.tokens > self._rows:
            self._make_room(native.tokens)
        if native.context > self._positions:
            self._cover(native.context)
        out: npt.NDArray[np.generic]
        if self._spec.head is None:
            out = np.empty((native.tokens, self._spec.hidden), np.uint16 if self._is_bf16 else np.float32)
        else:
            out = np.empty((len(picked), len(self.vocabulary)), np.float32)
        outcome, suspect = self._native.forward(native, own, places, source, picked, out.ctypes.data)
        self._exchange.check(outcome, self._timeout_s)
        self.suspect = suspect and self._spec.head is None
        return out

    def _make_room(self, rows: int) -> None:
        self._rows = max(rows, 2 * self._rows)
        hidden, hd = self._spec.hidden, self._memory.head_dim
        group = self._spec.heads // self._layout.shape.heads
        self._buffers = [self._room(size) for size in (hidden, hidden, 0, 0, 0, self._widest, hidden, 0)]
        self._stage.set_buffers(*(buffer.data_ptr() for buffer in self._buffers))
        for data_parallel, count in self._parts:
            queries = count * group * hd
            sizes = (hidden * data_parallel, queries + 2 * count * hd, queries, queries)
            room = [self._room(size) for size in sizes]
            self._native.set_room(bool(data_parallel), *(buffer.data_ptr() for buffer in room))
            self._buffers += room

    def _room(self, size: int) -> torch.Tensor:
        return torch.empty(self._rows, size, dtype=self._dtype)

    def _cover(self, positions: int) -> None:
        for index, rotary in enumerate(self._spec.rotary):
            rotary.cover(positions)
            cos, sin = rotary.cos, rotary.sin
            self._positions = min(len(cos), rotary.max_positions)
            self._stage.set_rotary(index, cos.data_ptr(), sin.data_ptr(), self._positions, 2 * cos.shape[1])

    def _set_layer(self, index: int, layer: Layer) -> None:
        """All of a layer but its heads."""
        assert isinstance(layer.mlp, Mlp)  # check_cuttable() has seen to it
        norms = [
            None if norm is None else norm.clone()
            for norm in (
                layer.attention_norm,
                layer.mlp_norm,
                layer.q_norm,
                layer.k_norm,
                layer.attention_out_norm,
                layer.mlp_out_norm,
            )
        ]
        ends, own = ffn_ends(self._spec.intermediate), self._layout.shards_of(self._rank, index)
        o_bias = None if layer.o.bias is None else layer.o.bias.clone()
        down_bias = None if layer.mlp.down.bias is None else layer.mlp.down.bias.clone()
        gate_up, down = NOTHING, (0, _address(down_bias), 0, 1)
        widths = shard_widths(ends, own)
        if own:
            packed = [self._packed(each) for each in self.weights.shards(index, own)]
            gate_up, down = packed[0], (packed[1][0], *down[1:])
        self._kept += [norms, o_bias, down_bias]
        weights = [NOTHING, (0, _address(o_bias), 0, 1), gate_up, down]
        self._stage.set_layer(
            index, [_address(norm) for norm in norms], weights, layer.window or 0, layer.rotary
        )
        own_ends = np.cumsum(widths, dtype=np.int64)
        self._kept.append(own_ends)
        self._native.set_shards(index, sum(widths), own_ends)
        self._widest = max(self._widest, sum(widths))

    def _set_heads(self, data_parallel: bool, count: int) -> None:
        spec, layout = self._spec, self._layout
        every: list[Sequence[int]] = []
        places: list[Sequence[Place]] = []
        for index in range(len(spec.layers)):
            own = layout.data_parallel(index) if data_parallel else layout.heads_of(self._rank, index)
            every.append(own)
            places.append([self._packed(each) for each in self.weights.heads(index, own)])
        heads = count * spec.heads // layout.shape.heads
        ends = head_ends(count, heads * self._memory.head_dim)
        cache = self._memory.cache(layout, self._rank, every)
        self._kept += [cache, ends]
        self._native.set_heads(data_parallel, cache, heads, places, ends)

    def _set_ends(self) -> range:
        """Embedding and head, where the stage has them. Returns the tokens of which it has logits."""
        spec = self._spec
        embed = 0
        if spec.embed is not None:
            self._kept.append(spec.embed)
            embed = spec.embed.data_ptr()
        vocab = 0 if spec.embed is None else len(spec.embed)
        if spec.head is None:
            self._stage.set_ends(vocab, embed, 0, NOTHING, 0)
            return range(0)
        norm, head = spec.head.norm.clone(), spec.head.tensor
        own = vocabulary_of(self._layout, self._rank, len(head))
        place = NOTHING
        if own:
            place = self._packed(self.weights.vocabulary(own))
        self._kept.append(norm)
        self._stage.set_ends(vocab, embed, norm.data_ptr(), place, len(own))
        return own

    def _packed(self, packed: Packed) -> Place:
        if not packed.fits(self._dtype):
            raise ValueError(f"a weight is not {self._dtype}")
        self._kept.append(packed)
        return packed.place


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _no_rows() -> _native.Step:
    none = np.zeros(0, np.int64)
    return _native.Step(none, none, np.zeros(1, np.int32), NO_TOKENS, np.zeros((0, 0), np.int32))
