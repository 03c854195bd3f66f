"""Which kernels run a stage: those of its KV cache's device."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kernels.base import CannotCompute, PagedCache, StageKernels, StageSpec, Sums
from kernels.cpu.stage import CpuStage

if TYPE_CHECKING:
    from kernels.cuda.stage import CudaStage

Attention = Literal["exact", "xformers"]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The KV of one stage, without the number of its blocks. block_size: tokens."""

    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: Literal["float32", "bfloat16"]


def build_cpu_stage(
    spec: StageSpec,
    kv: PagedCache,
    threads: int = 1,
    attention: Attention = "exact",
    sums: Sums = "float",
) -> StageKernels:
    """The stage's layers over `kv`. The weights are converted to what its kernels read, and may be let go.

    Raises ValueError for sizes, weights or an attention that there are no kernels for."""
    if attention != "exact":
        raise ValueError(f"attention {attention!r} has no kernel for CPUs")
    return CpuStage(spec, kv, threads, sums)


def build_cuda_stage(
    spec: StageSpec,
    shape: CacheShape,
    device: str,
    *,
    rows_max: int,
    num_blocks: int = 0,
    memory_share: float = 0.9,
    attention: Attention = "exact",
) -> CudaStage:
    """The stage's layers and its KV cache on a GPU ("cuda:2").

    rows_max: tokens of a step. num_blocks: of KV; 0: as many as fit into `memory_share` of the device once weights and
    the largest step have theirs. attention: "exact" is ours, with equal bits on every path; "xformers" does without.
    Raises CannotCompute for sizes that do not fit or a device that cannot be used here."""
    here = torch.device(device)
    if here.type != "cuda":
        raise CannotCompute(f"no kernels for device {device!r}")
    if not torch.cuda.is_available():
        raise CannotCompute(f"device {device!r} cannot be used: torch sees no CUDA device")
    if (here.index or 0) >= torch.cuda.device_count():
        raise CannotCompute(
            f"device {device!r} cannot be used: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if importlib.util.find_spec("triton") is None:
        raise CannotCompute(f"device {device!r} needs triton: pip install 'kevlarflow[gpu]'")
    from kernels.cuda.build import Room, build  # not above: it imports triton

    room = Room(rows_max, num_blocks, memory_share)
    return build(spec, shape, here, room, "triton" if attention == "exact" else "xformers")
