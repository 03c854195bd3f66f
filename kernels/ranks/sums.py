"""Sums over shards with the same bits in any order and grouping, on any number of ranks.

The inputs of a product are cut into shards at places that depend on the model alone. A shard's partial sum, a float32,
counts as a whole number of 2^-32; whole numbers are added without rounding, so nobody sees who added what first. The
total is rounded to float64 and then to float32, once, at the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.ranks import _native

BITS = 32  # behind the point
SHARDS_MAX = 256


def limit_of(shards: int) -> float:
    """What a partial sum must stay below, so that no sum of so many can wrap. Raises ValueError."""
    if not 1 <= shards <= SHARDS_MAX:
        raise ValueError(f"a sum of {shards} shards: 1 to {SHARDS_MAX} are possible")
    return float(2 ** (63 - BITS) // shards)


def add(sums: npt.NDArray[np.int64], partials: npt.NDArray[np.float32], limit: float) -> int:
    """Add float32 partial sums [n] to whole ones [n], both contiguous. Returns how many are not below `limit` in
    absolute value or are no numbers: those are left out, and the sum is not to be used. Raises ValueError for other
    sizes."""
    return _native.add(sums, partials, limit)


def to_float(sums: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The sums [n] as float32."""
    out = np.empty(sums.shape, np.float32)
    _native.to_float(sums, out)
    return out
