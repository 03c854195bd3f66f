"""A rank's own part of a stage's weights: those of its heads, of its shards of the FFN, and of its part of the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.base import Layer, Linear, Mlp, StageSpec
from kernels.quantised import Quantised
from kernels.ranks.cuts import Ends, ffn_ends
from kernels.ranks.layout import Layout, Shape

PANEL = 64  # tokens of the vocabulary that go together: outputs in one panel of a packed weight


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """qkv [(heads + 2 kv_heads) head_dim, hidden] and o [hidden, heads head_dim] of some KV heads, without o's bias."""

    qkv: Linear
    o: Linear


def shape_of(spec: StageSpec, kv_heads: int) -> Shape:
    """What a layout of this stage deals out."""
    return Shape(len(spec.layers), kv_heads, len(ffn_ends(spec.intermediate)))


def check_cuttable(spec: StageSpec) -> None:
    """Raises ValueError for a stage whose products are no sums over shards."""
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mlp, Mlp):
            raise ValueError(f"layer {index} is a mixture of experts, which has no fixed-point sums")
        if any(isinstance(linear.weight, Quantised) for linear in (layer.o, layer.mlp.down)):
            raise ValueError(f"layer {index} has quantised weights, which have no fixed-point sums")


def head_weights(layer: Layer, heads: int, kv_heads: int, own: Sequence[int]) -> HeadWeights:
    """heads, kv_heads: of the whole stage; own: KV heads, in the order in which they are kept."""
    width = layer.o.shape[1] // heads  # head_dim
    group = heads // kv_heads * width
    queries = _ranges([(head * group, (head + 1) * group) for head in own])
    kv = torch.cat(
        [
            _ranges([((first + head) * width, (first + head + 1) * width) for head in own])
            for first in (heads, heads + kv_heads)
        ]
    )
    return HeadWeights(_outputs(layer.qkv, torch.cat([queries, kv])), Linear(layer.o.tensor[:, queries]))


def ffn_weights(mlp: Mlp, ends: Ends, own: Sequence[int]) -> Mlp:
    """Of these shards, in order. `down` keeps its whole bias."""
    inputs = mlp.down.shape[1]
    columns = _ranges([(int(ends[shard - 1]) if shard else 0, int(ends[shard])) for shard in own])
    gate_up = _outputs(mlp.gate_up, torch.cat([columns, inputs + columns]))
    return Mlp(gate_up, Linear(mlp.down.tensor[:, columns], mlp.down.bias))


def shard_widths(ends: Ends, own: Sequence[int]) -> list[int]:
    """Inputs of these shards."""
    return [int(ends[shard]) - (int(ends[shard - 1]) if shard else 0) for shard in own]


def vocabulary_of(layout: Layout, rank: int, vocabulary: int) -> range:
    """The tokens of which a rank computes logits. May be empty."""
    index, count, panels = layout.ranks.index(rank), len(layout.ranks), -(-vocabulary // PANEL)
    begin, end = (min(vocabulary, at * panels // count * PANEL) for at in (index, index + 1))
    return range(begin, end)


def _outputs(linear: Linear, rows: torch.Tensor) -> Linear:
    return Linear(linear.tensor[rows], None if linear.bias is None else linear.bias[rows])


def _ranges(ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(begin, end) for begin, end in ranges)])
