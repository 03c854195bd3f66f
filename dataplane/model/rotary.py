"""Rotary embedding tables, equal to transformers' for the types default, linear and llama3."""

import math

import numpy as np
import numpy.typing as npt
import torch

from dataplane.model.config import RopeConfig

CHUNK_POSITIONS = 1024


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float32]:
    """float32 [head_dim / 2]; the steps and roundings of transformers."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(rope.theta), exponents).astype(np.float32)
    inv: npt.NDArray[np.float32] = np.reciprocal(powers)
    match rope.kind:
        case "default":
            return inv
        case "linear":
            return np.asarray(inv / np.float32(rope.factor), np.float32)
        case "llama3":
            return _llama3(rope, inv)


def _llama3(rope: RopeConfig, inv: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    original = rope.original_max_positions
    wavelength = (np.float32(2 * math.pi) / inv).astype(np.float32)
    slowed = (inv / np.float32(rope.factor)).astype(np.float32)
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = ((1 - smooth) * slowed + smooth * inv).astype(np.float32)
    out = np.where(wavelength > original / rope.low_freq_factor, slowed, inv)
    between = (wavelength <= original / rope.low_freq_factor) & (
        wavelength >= original / rope.high_freq_factor
    )
    return np.where(between, blended, out).astype(np.float32)


class RotaryTable:
    """cos and sin, float32 [positions, head_dim / 2], grown by doubling up to `max_positions`.

    A position's values have the same bits however far the table has grown: chunks of a fixed size are computed
    whole, so that no library's handling of the tail of an array can matter."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int) -> None:
        self._inv = inverse_frequencies(rope, head_dim)
        self.max_positions = max_positions
        self.cos = torch.empty(0, head_dim // 2)
        self.sin = torch.empty(0, head_dim // 2)
        self.cover(1)

    def cover(self, positions: int) -> None:
        """Makes rows 0 .. positions - 1 present. Raises ValueError beyond max_positions."""
        have = self.cos.shape[0]
        if positions > self.max_positions:
            raise ValueError(f"position {positions - 1} is beyond the model's {self.max_positions} positions")
        if positions <= have:
            return
        want = -(-max(positions, 2 * have) // CHUNK_POSITIONS)
        cos, sin = [self.cos], [self.sin]
        for chunk in range(have // CHUNK_POSITIONS, want):
            at = np.arange(chunk * CHUNK_POSITIONS, (chunk + 1) * CHUNK_POSITIONS, dtype=np.float32)
            angles = (at[:, None] * self._inv[None, :]).astype(np.float64)
            cos.append(torch.from_numpy(np.cos(angles).astype(np.float32)))
            sin.append(torch.from_numpy(np.sin(angles).astype(np.float32)))
        self.cos, self.sin = torch.cat(cos), torch.cat(sin)
