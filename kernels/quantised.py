"""Quantised weights, before the kernels of a device put them into an order of their own.

A value is scale * (q - offset) + min, with scale and min for each output and each group of 32 inputs, for some groups
together, or for all of them. The formats are those of kernels/cpu/qformats.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

GROUP = 32  # inputs: KF_QGROUP
K_GROUPS = 8  # groups that share two scales of Q4_K


class Format(IntEnum):
    """kf_format of kernels/cpu/kernels.h."""

    DENSE = 0
    INT8_ROW = 1
    INT8_F16 = 2
    INT4_F16 = 3
    INT4_F16_MIN = 4
    INT4_F32_MIN = 5
    INT4_K = 6

    @property
    def bits(self) -> int:
        return 8 if self in (Format.INT8_ROW, Format.INT8_F16) else 4

    @property
    def offset(self) -> int:
        return {Format.INT8_ROW: 128, Format.INT8_F16: 128, Format.INT4_F16: 8}.get(self, 0)


@dataclass(frozen=True, slots=True)
class Plane:
    """One number for each output and each `every` groups: [n, ceil(groups / every)]."""

    values: torch.Tensor
    every: int

    def each(self, groups: int) -> torch.Tensor:
        """float32 [n, groups]."""
        return self.values.float().repeat_interleave(self.every, 1)[:, :groups]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight [n, k]. q: uint8 [n, groups * 32], beyond k anything.

    planes: INT8_ROW: a float32 scale. INT8_F16, INT4_F16: a float16 scale. INT4_F16_MIN: float16 scale and min.
    INT4_F32_MIN: float32 scale and min. INT4_K: two float16 for eight groups, uint8 scale and min beside
    them."""

    format: Format
    q: torch.Tensor
    planes: tuple[Plane, ...]
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q), self.k

    @property
    def groups(self) -> int:
        return self.q.shape[1] // GROUP

    @property
    def span(self) -> int:
        """Groups that share a scale and a min, where the format leaves it open."""
        return self.planes[0].every if self.format is Format.INT4_F32_MIN else 1

    def like(self, other: Quantised) -> bool:
        """Whether the outputs of both can be one weight's."""
        mine, others = ((w.format, w.k, [(p.values.dtype, p.every) for p in w.planes]) for w in (self, other))
        return mine == others

    def rows(self, index: torch.Tensor) -> Quantised:
        """The outputs of `index`, in its order."""
        planes = tuple(Plane(plane.values[index], plane.every) for plane in self.planes)
        return Quantised(self.format, self.q[index], planes, self.k)

    def scale_and_min(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n, groups] each."""
        each = [plane.each(self.groups) for plane in self.planes]
        if self.format is Format.INT4_K:
            d, d_min, scale, low = each
            return d * scale, -(d_min * low)
        return each[0], each[1] if len(each) > 1 else torch.zeros_like(each[0])

    def dense(self) -> torch.Tensor:
        """float32 [n, k]: rounded once, as the kernels do."""
        scale, low = (values[:, :, None].double() for values in self.scale_and_min())
        q = self.q.view(len(self.q), self.groups, GROUP).double() - self.format.offset
        return (q * scale + low).flatten(1)[:, : self.k].float()


Weight = torch.Tensor | Quantised


def joined(weights: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """The outputs of all, one after another: quantised if all are in the same way, else dense in `dtype`."""
    first = weights[0]
    if isinstance(first, Quantised):
        alike = [w for w in weights if isinstance(w, Quantised) and w.like(first)]
        if len(alike) == len(weights):
            planes = tuple(
                Plane(torch.cat([w.planes[i].values for w in alike]), plane.every)
                for i, plane in enumerate(first.planes)
            )
            return Quantised(first.format, torch.cat([w.q for w in alike]), planes, first.k)
    return torch.cat([(w.dense() if isinstance(w, Quantised) else w).to(dtype) for w in weights])


def int8_rows(weight: torch.Tensor) -> Quantised:
    """Eight bits with one scale for each output: to the nearest, the largest becomes 127. A row with a number that is
    not finite keeps none."""
    n, k = weight.shape
    wide = weight.float()
    largest = wide.abs().amax(1, keepdim=True)
    scale = largest / torch.full_like(largest, 127.0)  # a division: torch makes a product of one by a number
    q = torch.where(largest > 0, wide / scale, 0.0).nan_to_num().round().clamp(-127, 127)
    padded = torch.full((n, -(-k // GROUP) * GROUP), Format.INT8_ROW.offset, dtype=torch.uint8)
    padded[:, :k] = (q + Format.INT8_ROW.offset).to(torch.uint8)
    return Quantised(Format.INT8_ROW, padded, (Plane(scale, padded.shape[1] // GROUP),), k)
