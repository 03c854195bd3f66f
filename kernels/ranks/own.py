"""Which of a stage's weights are cut over ranks, and where."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.base import Mlp, StageSpec
from kernels.quantised import Quantised
from kernels.ranks.cuts import Ends, ffn_ends
from kernels.ranks.layout import Layout, Shape

PANEL = 64  # tokens of the vocabulary that go together: outputs in one panel of a packed weight


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


def check_dense(spec: StageSpec) -> None:
    """Raises ValueError for a stage whose weights ranks of a host cannot have in parts."""
    check_cuttable(spec)
    for index, layer in enumerate(spec.layers):
        assert isinstance(layer.mlp, Mlp)  # check_cuttable() has seen to it
        if any(isinstance(linear.weight, Quantised) for linear in (layer.qkv, layer.mlp.gate_up)):
            raise ValueError(f"layer {index} has quantised weights, which ranks cannot cut")
    if spec.head is not None and isinstance(spec.head.weight, Quantised):
        raise ValueError("the head has quantised weights, which ranks cannot cut")


def shard_widths(ends: Ends, own: Sequence[int]) -> list[int]:
    """Inputs of these shards."""
    return [int(ends[shard]) - (int(ends[shard - 1]) if shard else 0) for shard in own]


def vocabulary_of(layout: Layout, rank: int, vocabulary: int) -> range:
    """The tokens of which a rank computes logits. May be empty."""
    index, count, panels = layout.ranks.index(rank), len(layout.ranks), -(-vocabulary // PANEL)
    begin, end = (min(vocabulary, at * panels // count * PANEL) for at in (index, index + 1))
    return range(begin, end)
