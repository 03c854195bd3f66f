"""A stage on a GPU from its weights on, with as many KV blocks as were asked for or as the device has room for."""

import gc
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.base import DTYPES, StageSpec
from kernels.cuda.cache import DeviceCache
from kernels.cuda.memory import DeviceMemory, blocks_that_fit
from kernels.cuda.stage import CudaStage
from kernels.cuda.weights import DeviceWeights
from kernels.dispatch import CacheShape

BLOCKS_MIN = 4

Attention = Literal["triton", "xformers"]


@dataclass(frozen=True, slots=True)
class Room:
    """rows_max: tokens of a step. num_blocks: KV blocks; 0: as many as `memory_share` of the device leaves."""

    rows_max: int
    num_blocks: int
    memory_share: float


def build(
    spec: StageSpec,
    shape: CacheShape,
    device: torch.device,
    room: Room,
    attention: Attention,
) -> CudaStage:
    """Raises CannotCompute where it does not fit, XformersMissing is one."""
    context_max = min(rotary.max_positions for rotary in spec.rotary)
    if room.num_blocks:
        context_max = min(context_max, room.num_blocks * shape.block_size)
    weights = DeviceWeights.load(spec, device, context_max, DTYPES[shape.dtype])
    blocks = room.num_blocks or _measured(spec, shape, device, room, attention, weights)
    return CudaStage(spec, _cache(shape, blocks, device), room.rows_max, attention, weights)


def _measured(
    spec: StageSpec,
    shape: CacheShape,
    device: torch.device,
    room: Room,
    attention: Attention,
    weights: DeviceWeights,
) -> int:
    """Warms a stage up over a cache of hardly any blocks, with the graphs of the longest contexts, and sees what is
    left. The graphs are captured twice for it: they have the addresses of their cache."""
    cache = _cache(shape, BLOCKS_MIN, device)
    stage = CudaStage(spec, cache, room.rows_max, attention, weights, context_max=len(weights.cos[0]))
    stage.warm_up()
    memory = DeviceMemory.measure(device)
    blocks = blocks_that_fit(memory, room.memory_share, cache.block_bytes, shape.block_size, BLOCKS_MIN)
    del stage, cache
    gc.collect()  # its graphs refer to it
    torch.cuda.empty_cache()
    return blocks


def _cache(shape: CacheShape, blocks: int, device: torch.device) -> DeviceCache:
    return DeviceCache(
        blocks, shape.layers, shape.kv_heads, shape.block_size, shape.head_dim, shape.dtype, str(device)
    )
