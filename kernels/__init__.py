"""Compute kernels behind one dispatch. Importing this is silent and needs no GPU."""

import torch

from kernels.base import Kernels, PackedWeight, PagedCache, StepArrays, pack_weight
from kernels.cpu import CpuKernels

__all__ = [
    "Kernels",
    "PackedWeight",
    "PagedCache",
    "StepArrays",
    "pack_weight",
    "paged_attention",
    "step_kernels",
]


def step_kernels(kv: PagedCache, step: StepArrays) -> Kernels:
    """The operations of one step on the device of `kv`. Valid while `step` keeps its contents."""
    match kv.device:
        case "cpu":
            return CpuKernels(kv, step)
        case device:
            raise ValueError(f"no kernels for device {device!r}")


def paged_attention(
    q: torch.Tensor,
    kv: PagedCache,
    layer: int,
    step: StepArrays,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """out [T, heads, head_dim] = softmax(scale q K) V over the cache, causal, last `window` keys only if given.

    For several operations of one step, take step_kernels() once instead."""
    step_kernels(kv, step).attention(layer, q, scale, window, out)
