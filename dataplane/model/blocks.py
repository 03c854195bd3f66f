"""GGUF's blocks as quantised weights: uint8 [n, bytes of a row] to the same values in the kernels' formats.

A row is a sequence of blocks: scales, then the q of 32 or 256 inputs (ggml-common.h has their layouts)."""

from __future__ import annotations

import torch

from kernels.quantised import GROUP, K_GROUPS, Format, Plane, Quantised

KERNELS = ("q8_0", "q4_0", "q4_1", "q4_k")  # the others become dense


def from_blocks(kind: str, raw: torch.Tensor) -> Quantised:
    """`kind`: one of KERNELS."""
    match kind:
        case "q8_0":
            blocks = raw.view(len(raw), -1, 34)
            return _made(Format.INT8_F16, blocks[..., 2:] ^ 0x80, [(_halves(blocks, 0), 1)])
        case "q4_0":
            blocks = raw.view(len(raw), -1, 18)
            return _made(Format.INT4_F16, _nibbles(blocks[..., 2:]), [(_halves(blocks, 0), 1)])
        case "q4_1":
            blocks = raw.view(len(raw), -1, 20)
            planes = [(_halves(blocks, 0), 1), (_halves(blocks, 2), 1)]
            return _made(Format.INT4_F16_MIN, _nibbles(blocks[..., 4:]), planes)
        case "q4_k":
            return _from_q4_k(raw.view(len(raw), -1, 144))
        case _:
            raise ValueError(f"no kernel reads blocks of {kind}")


def _from_q4_k(blocks: torch.Tensor) -> Quantised:
    """Two scales in half precision, eight scales and mins of six bits in twelve bytes, 128 bytes of q."""
    n = len(blocks)
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6) << 4], -1)
    least = torch.cat([middle & 63, (high >> 4) | (middle >> 6) << 4], -1)
    q = _nibbles(blocks[..., 16:].view(n, -1, 4, GROUP))
    planes = [
        (_halves(blocks, 0), K_GROUPS),
        (_halves(blocks, 2), K_GROUPS),
        (scale.flatten(1), 1),
        (least.flatten(1), 1),
    ]
    return _made(Format.INT4_K, q, planes)


def _made(format: Format, q: torch.Tensor, planes: list[tuple[torch.Tensor, int]]) -> Quantised:
    flat = q.reshape(len(q), -1)
    return Quantised(
        format, flat, tuple(Plane(values.contiguous(), every) for values, every in planes), flat.shape[1]
    )


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """float16 [n, blocks]"""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """The low halves of the last dimension, then the high ones."""
    return torch.cat([data & 15, data >> 4], -1)
