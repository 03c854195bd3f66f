"""Where the inputs of a product are cut into shards. It depends on the model alone, so that any number of ranks adds up
the same partial sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Dealt out to 1 to 8 ranks, the rank with the most of 48 shards has at most 4.2 % more than the mean.
SHARDS_MAX = 48
SHARD_INPUTS_MIN = 128  # a shard costs a conversion of each output: below this it shows
GRANULE = 32  # inputs; a multiple of what one multiply-add takes

Ends = npt.NDArray[np.int64]  # of the shards, ascending; the last one is the number of inputs


def ffn_shards(inputs: int) -> int:
    """Shards of the FFN of a model with so many of them (its intermediate size)."""
    return min(SHARDS_MAX, max(1, inputs // SHARD_INPUTS_MIN))


def ffn_ends(inputs: int) -> Ends:
    """Cuts the inputs of "down" as evenly as whole granules can be."""
    shards = ffn_shards(inputs)
    granules = inputs // GRANULE
    ends = np.array([(i + 1) * granules // shards * GRANULE for i in range(shards)], np.int64)
    ends[-1] = inputs
    return ends


def head_ends(kv_heads: int, inputs: int) -> Ends:
    """Cuts the inputs of the attention's output by KV heads: those of the query heads that share one. Raises
    ValueError."""
    if inputs % kv_heads:
        raise ValueError(f"{inputs} inputs are not shared by {kv_heads} KV heads alike")
    return np.arange(1, kv_heads + 1, dtype=np.int64) * (inputs // kv_heads)
