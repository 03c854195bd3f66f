"""How many KV blocks a device has room for, once everything else is on it."""

from dataclasses import dataclass

import torch

from kernels.base import CannotCompute

CONTEXT_BYTES = 768 << 20  # CUDA's context, loaded kernels and graphs: not torch's, so torch cannot tell
SLOTS_MAX = (1 << 31) - 1  # kernels number positions in 32 bits


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. `reserved`: by this process's allocator, at the most that a step has needed."""

    total: int
    free: int
    reserved: int

    @classmethod
    def measure(cls, device: torch.device) -> "DeviceMemory":
        """After a step of the largest shape has run."""
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_reserved(device))


def blocks_that_fit(
    memory: DeviceMemory, share: float, block_bytes: int, block_size: int, blocks_min: int
) -> int:
    """KV blocks for a process that may use `share` of the device, its weights and its largest step included.

    Never more than is free: others may have taken more than theirs. Raises CannotCompute, with the figures, if fewer
    than `blocks_min` fit."""
    mine = memory.reserved + CONTEXT_BYTES
    room = min(int(memory.total * share) - mine, memory.free - CONTEXT_BYTES)
    blocks = min(room // block_bytes, SLOTS_MAX // block_size)
    if blocks < blocks_min:
        gib = 1 << 30
        raise CannotCompute(
            f"no room for {blocks_min} KV blocks of {block_bytes} bytes: of the device's {memory.total / gib:.2f} GiB"
            f" this process may use {memory.total * share / gib:.2f}, {memory.free / gib:.2f} are free, weights and a"
            f" step of the largest size take {mine / gib:.2f}; use more stages, a smaller engine.max_batch_tokens, or a"
            " larger engine.memory_utilization"
        )
    return blocks
