"""Weights in the order in which the kernels read them."""

import math
from dataclasses import dataclass

import torch

from kernels.base import Linear
from kernels.cpu import _native
from kernels.memory import Arena
from kernels.quantised import GROUP, Format, Quantised

PANEL = 64  # outputs in one panel: KF_PANEL in kernels.h


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [n, k] as [ceil(n / 64), k, 64] in float32 and [ceil(n / 64), k / 2, 64, 2] in bfloat16 (pairs of
    inputs side by side), zeros beyond n; or a quantised one as uint8 [ceil(n / 64), bytes of a panel], see qformats.h;
    and its bias [n]. A panel is read from front to back."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    n: int
    k: int
    format: Format = Format.DENSE
    span: int = 1

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Address of the weight and of the bias (0: none), format and span."""
        return (
            self.weight.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.format,
            self.span,
        )

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether it takes and makes values of this type."""
        bias = self.bias is None or self.bias.dtype is dtype
        return bias and (self.format is not Format.DENSE or self.weight.dtype is dtype)


def pack(linear: Linear, arena: Arena) -> Packed:
    """The weight, packed in memory of the arena. Raises ValueError for bfloat16 with an odd number of inputs."""
    n, k = linear.weight.shape
    bias = None if linear.bias is None else linear.bias.clone()
    if isinstance(linear.weight, Quantised):
        order = torch.arange(-(-n // PANEL) * PANEL).clamp_(max=n)
        return _quantised(linear.weight, order, bias, n, arena)
    return Packed(_panels(linear.weight, arena), bias, n, k)


def pack_gate_up(linear: Linear, arena: Arena) -> Packed:
    """All gates, then all ups [2 n, k]: packed by turns, 32 columns of each in a panel. `n` is that of the product."""
    rows, k = linear.weight.shape
    n = rows // 2
    half = PANEL // 2
    bias = None if linear.bias is None else linear.bias.clone()
    if isinstance(linear.weight, Quantised):
        column = torch.arange(-(-n // half) * half).view(-1, 1, half)
        order = torch.cat([column, column + n], 1).masked_fill_(column >= n, rows).flatten()
        return _quantised(linear.weight, order, bias, n, arena)
    turns = linear.weight.new_zeros(-(-n // half), 2, half, k)
    for i, part in enumerate((linear.weight[:n], linear.weight[n:])):
        whole = n // half
        turns[:whole, i] = part[: whole * half].view(whole, half, k)
        if n % half:
            turns[whole, i, : n % half] = part[whole * half :]
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


def _quantised(
    weight: Quantised, order: torch.Tensor, bias: torch.Tensor | None, n: int, arena: Arena
) -> Packed:
    """The outputs in `order`, of which the one beyond the last is zeros."""
    groups, panels = weight.groups, len(order) // PANEL
    size = _native.panel_size(weight.format, weight.k, weight.span)
    packed = torch.from_numpy(arena.zeros(panels * size)).view(panels, size)

    def placed(values: torch.Tensor) -> torch.Tensor:
        """[panels, 64, ...]"""
        end = values.new_zeros(1, *values.shape[1:])
        return torch.cat([values, end])[order].view(panels, PANEL, *values.shape[1:])

    quads = placed(weight.q).view(panels, PANEL, groups, 8, GROUP // 8)
    planes = [(placed(plane.values), plane.every) for plane in weight.planes]
    at = 0
    for group in range(groups):
        pieces = [values[:, :, group // every] for values, every in planes if group % every == 0]
        values = quads[:, :, group].transpose(1, 2)  # [panels, quad, output, input]
        if weight.format.bits == 4:
            values = values[:, 0::2] | values[:, 1::2] << 4
        for piece in (*pieces, values.flatten(1)):
            raw = piece.contiguous().view(torch.uint8).view(panels, -1)
            packed[:, at : at + raw.shape[1]] = raw
            at += raw.shape[1]
    assert at == size
    return Packed(packed, bias, n, weight.k, weight.format, weight.span)
