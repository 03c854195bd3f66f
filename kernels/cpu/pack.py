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
    packed = room(n, k, linear.weight.dtype, arena)
    put_outputs(units(packed), 0, units(linear.weight))
    return Packed(packed, bias, n, k)


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
    packed = room(-(-n // half) * PANEL, k, linear.weight.dtype, arena)
    for place, part in zip(gates_and_ups(units(packed)), (linear.weight[:n], linear.weight[n:]), strict=True):
        put_outputs(place, 0, units(part))
    return Packed(packed, bias, n, k)


def room(n: int, k: int, dtype: torch.dtype, arena: Arena) -> torch.Tensor:
    """Zeros, for a weight [n, k] as `Packed` has it. Raises ValueError for bfloat16 with an odd number of inputs."""
    group = 2 if dtype is torch.bfloat16 else 1
    if k % group:
        raise ValueError(f"bfloat16 kernels need an even number of inputs, not {k}")
    shape = (-(-n // PANEL), k // group, PANEL, group)
    memory = torch.from_numpy(arena.zeros(math.prod(shape) * dtype.itemsize))
    return memory.view(dtype).view(shape)


def units(weight: torch.Tensor) -> torch.Tensor:
    """Four bytes at a time, which stay together when a weight is packed: [n, k / group] of a weight [n, k], and
    [panels, k / group, 64] of a packed one."""
    whole = weight.view(torch.int32)
    return whole.squeeze(3) if weight.dim() == 4 else whole


def gates_and_ups(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the gates go, and where the ups: [panels, units, 32]."""
    halves = packed.view(packed.shape[0], packed.shape[1], 2, PANEL // 2)
    return halves[:, :, 0], halves[:, :, 1]


def put_outputs(packed: torch.Tensor, at: int, weight: torch.Tensor) -> None:
    """Packs the outputs [n, units] as those from `at` on. packed [panels, units, outputs of a panel]."""
    lanes, done = packed.shape[2], 0
    while done < len(weight):
        panel, lane = divmod(at + done, lanes)
        count = min(len(weight) - done, lanes - lane)
        packed[panel, :, lane : lane + count] = weight[done : done + count].t()
        done += count


def copy_outputs(packed: torch.Tensor, at: int, source: torch.Tensor, begin: int, count: int) -> None:
    """As put_outputs(), of those from `begin` on of a packed weight."""
    lanes, done = packed.shape[2], 0
    while done < count:
        (panel, lane), (from_panel, from_lane) = divmod(at + done, lanes), divmod(begin + done, lanes)
        some = min(count - done, lanes - lane, lanes - from_lane)
        packed[panel, :, lane : lane + some] = source[from_panel, :, from_lane : from_lane + some]
        done += some


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
