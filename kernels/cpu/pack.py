"""Weights in the order in which the kernels read them."""

import math
from dataclasses import dataclass

import torch

from kernels.base import Linear
from kernels.memory import Arena

PANEL = 64  # outputs in one panel: KF_PANEL in kernels.h


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [n, k] as [ceil(n / 64), k, 64] in float32 and [ceil(n / 64), k / 2, 64, 2] in bfloat16 (pairs of
    inputs side by side), zeros beyond n; and its bias [n]. A panel is read from front to back."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    n: int
    k: int

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the weight and of the bias (0: none)."""
        return self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()


def pack(linear: Linear, arena: Arena) -> Packed:
    """The weight, packed in memory of the arena. Raises ValueError for bfloat16 with an odd number of inputs."""
    n, k = linear.weight.shape
    bias = None if linear.bias is None else linear.bias.clone()
    return Packed(_panels(linear.weight, arena), bias, n, k)


def pack_gate_up(linear: Linear, arena: Arena) -> Packed:
    """All gates, then all ups [2 n, k]: packed by turns, 32 columns of each in a panel. `n` is that of the product."""
    rows, k = linear.weight.shape
    n = rows // 2
    half = PANEL // 2
    turns = linear.weight.new_zeros(-(-n // half), 2, half, k)
    for i, part in enumerate((linear.weight[:n], linear.weight[n:])):
        whole = n // half
        turns[:whole, i] = part[: whole * half].view(whole, half, k)
        if n % half:
            turns[whole, i, : n % half] = part[whole * half :]
    bias = None if linear.bias is None else linear.bias.clone()
    return Packed(_panels(turns.view(-1, k), arena), bias, n, k)


def _panels(weight: torch.Tensor, arena: Arena) -> torch.Tensor:
    n, k = weight.shape
    group = 2 if weight.dtype is torch.bfloat16 else 1
    if k % group:
        raise ValueError(f"bfloat16 kernels need an even number of inputs, not {k}")
    panels = -(-n // PANEL)
    shape = (panels, k // group, PANEL, group)
    memory = torch.from_numpy(arena.zeros(math.prod(shape) * weight.itemsize))
    packed = memory.view(weight.dtype).view(shape)
    full = n // PANEL
    packed[:full] = weight[: full * PANEL].view(full, PANEL, k // group, group).transpose(1, 2)
    if n % PANEL:
        packed[full, :, : n % PANEL] = weight[full * PANEL :].view(-1, k // group, group).transpose(0, 1)
    return packed
