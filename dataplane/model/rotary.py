"""Rotary embedding tables, equal to those of transformers."""

import math

import numpy as np
import numpy.typing as npt
import torch

from dataplane.model.ropes import RopeConfig

Floats = npt.NDArray[np.float32]

CHUNK_POSITIONS = 1024


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Floats:
    """float32 [rotated / 2]; the steps and roundings of transformers. Of the kind "dynamic": those of
    positions that the model was trained with."""
    dims = rope.rotated(head_dim)
    theta = np.float64(rope.theta)
    if rope.kind == "dynamic":
        original = rope.original_max_positions
        stretch = rope.factor * original / original - (rope.factor - 1)
        theta = np.float64(rope.theta * stretch ** (dims / (dims - 2)))
    powers = np.power(theta, _exponents(dims)).astype(np.float32)
    inv: Floats = np.reciprocal(powers)
    match rope.kind:
        case "default" | "dynamic":
            return inv
        case "linear":
            return np.asarray(inv / np.float32(rope.factor), np.float32)
        case "llama3":
            return _llama3(rope, inv)
        case "yarn":
            return _yarn(rope, powers, dims)
        case "longrope":
            return np.asarray(1 / (np.asarray(rope.factors, np.float32) * powers), np.float32)


def _exponents(dims: int) -> Floats:
    return np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)


def _llama3(rope: RopeConfig, inv: Floats) -> Floats:
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


def _yarn(rope: RopeConfig, powers: Floats, dims: int) -> Floats:
    """High frequencies are kept, low ones slowed by `factor`, those between blended along a ramp."""

    def dimension(turns: float) -> float:
        """Of the frequency that turns so often over the positions that the model was trained with."""
        wavelength = rope.original_max_positions / (turns * 2 * math.pi)
        return dims * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    at = np.arange(dims // 2, dtype=np.float32)
    ramp = np.clip((at - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
    kept = np.float32(1) - ramp
    slowed = np.reciprocal(np.float32(rope.factor) * powers)
    return np.asarray(slowed * (np.float32(1) - kept) + np.reciprocal(powers) * kept, np.float32)


def _dynamic(rope: RopeConfig, dims: int, lengths: npt.NDArray[np.int64]) -> Floats:
    """float32 [n, dims / 2] of sequences of these lengths, all of them beyond what the model was trained with."""
    longer = np.float32(rope.factor) * lengths.astype(np.float32) / np.float32(rope.original_max_positions)
    stretch = (longer - np.float32(rope.factor - 1)).astype(np.float64)
    powers = np.power(stretch, np.float32(dims / (dims - 2))).astype(np.float32)
    thetas = (np.float32(rope.theta) * powers).astype(np.float64)
    return np.reciprocal(np.power(thetas[:, None], _exponents(dims)[None, :]).astype(np.float32))


class RotaryTable:
    """cos and sin, float32 [positions, rotated / 2], grown by doubling up to `max_positions`.

    A position's values have the same bits however far the table has grown: chunks of a fixed size are computed
    whole, so that no library's handling of the tail of an array can matter. They depend on nothing but the position:
    where "dynamic" stretches with the length of a sequence, that is the one that ends with the position, as if it were
    decoded token by token (docs/decisions/models.md)."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int) -> None:
        self._rope, self._dims = rope, rope.rotated(head_dim)
        self._inv = inverse_frequencies(rope, head_dim)
        self.max_positions = max_positions
        self.cos = torch.empty(0, self._dims // 2)
        self.sin = torch.empty(0, self._dims // 2)
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
            angles = self._angles(chunk * CHUNK_POSITIONS).astype(np.float64)
            for parts, function in ((cos, np.cos), (sin, np.sin)):
                values = function(angles).astype(np.float32) * np.float32(self._rope.attention_factor)
                parts.append(torch.from_numpy(values))
        self.cos, self.sin = torch.cat(cos), torch.cat(sin)

    def _angles(self, first: int) -> Floats:
        """Of a whole chunk of positions."""
        at = np.arange(first, first + CHUNK_POSITIONS)
        inv = np.broadcast_to(self._inv, (CHUNK_POSITIONS, len(self._inv)))
        if self._rope.kind == "dynamic" and first + CHUNK_POSITIONS > self._rope.original_max_positions:
            beyond = _dynamic(self._rope, self._dims, np.maximum(at + 1, self._rope.original_max_positions))
            inv = np.where((at >= self._rope.original_max_positions)[:, None], beyond, inv)
        return at[:, None].astype(np.float32) * inv
