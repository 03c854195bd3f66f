"""A rank's weights, packed: those of its heads, of its shards of the FFN, and of its part of the vocabulary.

A packed weight is made of pieces, one a head or a shard, so that a rank which goes on in another layout packs only what
it did not have before. The rest is copied in the order in which it is, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.base import Mlp, StageSpec
from kernels.cpu.pack import PANEL, Packed, copy_outputs, gates_and_ups, put_outputs, room, units
from kernels.memory import Arena
from kernels.ranks.cuts import ffn_ends


@dataclass(frozen=True, slots=True)
class _Head:
    """Where a KV head's weights begin: `outputs` of qkv, of its queries, keys and values, and inputs of o."""

    qkv: torch.Tensor
    o: torch.Tensor
    outputs: tuple[int, int, int]
    inputs: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """at: the first of its columns, among the rank's: outputs of gate and up, inputs of down."""

    gate_up: torch.Tensor
    down: torch.Tensor
    at: int


class RankWeights:
    """All that one rank has packed in one layout. `packed`: heads and shards, of all layers, that it had not before."""

    def __init__(self, spec: StageSpec, kv_heads: int, before: RankWeights | None = None) -> None:
        """before: of the same stage. To be given up with `settle` when all is packed."""
        self._spec, self._kv_heads = spec, kv_heads
        self._ends = [0, *ffn_ends(spec.intermediate).tolist()]
        self._arena = Arena()
        self._heads: dict[tuple[int, int], _Head] = {}
        self._shards: dict[tuple[int, int], _Shard] = {}
        self._vocabulary: tuple[range, torch.Tensor] | None = None
        self._before = before
        self.packed = 0

    def settle(self) -> None:
        self._before = None

    def heads(self, index: int, own: Sequence[int]) -> tuple[Packed, Packed]:
        """qkv and o of these KV heads of a layer, in the order in which they are kept; o without its bias."""
        layer, kv_heads = self._spec.layers[index], self._kv_heads
        width = layer.o.shape[1] // self._spec.heads  # head_dim
        group = self._spec.heads // kv_heads * width
        weight, o_weight = units(layer.qkv.tensor), units(layer.o.tensor)
        kind, step = layer.o.tensor.dtype, layer.o.shape[1] // o_weight.shape[1]  # inputs of a unit
        qkv = room(len(own) * (group + 2 * width), layer.qkv.shape[1], kind, self._arena)
        o = room(layer.o.shape[0], len(own) * group, kind, self._arena)
        into, o_into = units(qkv), units(o)
        sizes, taken = (group, width, width), []
        for place, head in enumerate(own):
            firsts = (
                head * group,
                (self._spec.heads + head) * width,
                (self._spec.heads + kv_heads + head) * width,
            )
            outputs = (
                place * group,
                len(own) * group + place * width,
                len(own) * (group + width) + place * width,
            )
            mine = o_into[:, place * group // step : (place + 1) * group // step]
            if old := self._before and self._before._heads.get((index, head)):
                for at, begin, size in zip(outputs, old.outputs, sizes, strict=True):
                    copy_outputs(into, at, units(old.qkv), begin, size)
                mine.copy_(units(old.o)[:, old.inputs // step : (old.inputs + group) // step])
            else:
                self.packed += 1
                for at, first, size in zip(outputs, firsts, sizes, strict=True):
                    put_outputs(into, at, weight[first : first + size])
                put_outputs(mine, 0, o_weight[:, head * group // step : (head + 1) * group // step])
            self._heads[index, head] = _Head(qkv, o, outputs, place * group)
            taken.append(firsts)
        bias = layer.qkv.bias
        if bias is not None:
            bias = torch.cat([
                bias[firsts[part] : firsts[part] + size] for part, size in enumerate(sizes) for firsts in taken
            ])  # fmt: skip
        return (
            Packed(qkv, bias, len(own) * (group + 2 * width), layer.qkv.shape[1]),
            Packed(o, None, layer.o.shape[0], len(own) * group),
        )

    def shards(self, index: int, own: Sequence[int]) -> tuple[Packed, Packed]:
        """gate and up, and down, of these shards of a layer's FFN, ascending; down without its bias."""
        mlp, ends = self._spec.layers[index].mlp, self._ends
        assert isinstance(mlp, Mlp)  # check_cuttable() has seen to it
        hidden, inputs = mlp.down.shape
        columns = sum(ends[shard + 1] - ends[shard] for shard in own)
        kind = mlp.down.tensor.dtype
        gate_up = room(-(-columns // (PANEL // 2)) * PANEL, hidden, kind, self._arena)
        down = room(hidden, columns, kind, self._arena)
        weight, down_weight = units(mlp.gate_up.tensor), units(mlp.down.tensor)
        step = inputs // down_weight.shape[1]
        into, down_into = units(gate_up), units(down)
        halves = gates_and_ups(into)
        at = 0
        for shard in own:
            begin, end = ends[shard], ends[shard + 1]
            # All but the last shard of a layer are whole halves of panels, so this one begins with one.
            panels = slice(at // (PANEL // 2), -(-(at + end - begin) // (PANEL // 2)))
            mine = down_into[:, at // step : (at + end - begin) // step]
            if old := self._before and self._before._shards.get((index, shard)):
                first = old.at // (PANEL // 2)
                into[panels] = units(old.gate_up)[first : first + panels.stop - panels.start]
                mine.copy_(units(old.down)[:, old.at // step : (old.at + end - begin) // step])
            else:
                self.packed += 1
                for half, offset in zip(halves, (0, inputs), strict=True):
                    put_outputs(half, at, weight[offset + begin : offset + end])
                put_outputs(mine, 0, down_weight[:, begin // step : end // step])
            self._shards[index, shard] = _Shard(gate_up, down, at)
            at += end - begin
        bias = mlp.gate_up.bias
        if bias is not None:
            bias = torch.cat([
                bias[offset + ends[shard] : offset + ends[shard + 1]] for offset in (0, inputs) for shard in own
            ])  # fmt: skip
        return Packed(gate_up, bias, columns, hidden), Packed(down, None, hidden, columns)

    def vocabulary(self, own: range) -> Packed:
        """The head of these tokens, which begin with a panel."""
        assert self._spec.head is not None
        head = self._spec.head.tensor[own.start : own.stop]
        packed = room(len(own), head.shape[1], head.dtype, self._arena)
        into, weight = units(packed), units(head)
        kept = range(own.start, own.start)
        if old := self._before and self._before._vocabulary:
            kept = range(max(own.start, old[0].start), min(own.stop, old[0].stop))
        if old and kept:
            at, begin = ((kept.start - tokens.start) // PANEL for tokens in (own, old[0]))
            panels = -(-len(kept) // PANEL)
            into[at : at + panels] = units(old[1])[begin : begin + panels]
        for begin, end in (
            ((own.start, kept.start), (kept.stop, own.stop)) if kept else ((own.start, own.stop),)
        ):
            put_outputs(into, begin - own.start, weight[begin - own.start : end - own.start])
        self._vocabulary = own, packed
        return Packed(packed, None, len(own), head.shape[1])
