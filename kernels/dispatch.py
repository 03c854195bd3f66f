"""Which kernels run a stage: those of its KV cache's device."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal, cast

import torch

from kernels.base import PagedCache, StageKernels, StageSpec
from kernels.cpu.stage import CpuStage

if TYPE_CHECKING:
    from kernels.cuda.cache import DeviceCache


def build_stage(
    spec: StageSpec,
    kv: PagedCache | DeviceCache,
    threads: int = 1,
    attention: Literal["exact", "xformers"] = "exact",
) -> StageKernels:
    """The stage's layers on the device of `kv`. The weights are converted to what its kernels read, and may be let go.

    threads: on a CPU. attention: "exact" is ours, with equal bits on every path; "xformers" is for GPUs only and does
    without that. Raises ValueError for sizes or a device that there are no kernels for."""
    match kv.device:
        case "cpu":
            if attention != "exact":
                raise ValueError(f"attention {attention!r} has no kernel for CPUs")
            return CpuStage(spec, cast("PagedCache", kv), threads)
        case _:
            from kernels.cuda.stage import CudaStage  # not above: it imports triton

            by: Literal["triton", "xformers"] = "triton" if attention == "exact" else "xformers"
            return CudaStage(spec, cast("DeviceCache", kv), attention_by=by)


def device_cache(
    num_blocks: int,
    layers: int,
    kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: Literal["float32", "bfloat16"],
    device: str,
) -> DeviceCache:
    """The KV cache of a stage on a GPU. Raises ValueError for sizes, or a device that cannot be used here."""
    if torch.device(device).type != "cuda":
        raise ValueError(f"no kernels for device {device!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r} cannot be used: torch sees no CUDA device")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"device {device!r} needs triton: pip install 'kevlarflow[gpu]'")
    from kernels.cuda.cache import DeviceCache  # not above: it imports triton

    return DeviceCache(num_blocks, layers, kv_heads, block_size, head_dim, dtype, device)
