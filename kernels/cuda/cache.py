"""The KV cache of one stage on a GPU."""

from typing import Literal

import torch

from kernels.base import DTYPES


class DeviceCache:
    """Blocks of `block_size` positions over all layers of a stage, in [layers, 2, num_blocks, block_size, kv_heads,
    head_dim]: one layer's keys are one contiguous tensor over all blocks, which paged attention reads in place (the
    form that xFormers takes, too).

    On the wire a block is one piece, [layers, 2, block_size, kv_heads, head_dim]. That is not the CPU cache's layout,
    and need not be: nodes of a group are of one kind, since two kinds would not have equal bits anyway. What goes there
    and back is in kernels/cuda/transfer.py."""

    def __init__(
        self,
        num_blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: Literal["float32", "bfloat16"],
        device: str,
    ) -> None:
        if min(num_blocks, layers, kv_heads, block_size, head_dim) < 1:
            raise ValueError("every size of a KV cache must be at least 1")
        self.num_blocks, self.layers, self.kv_heads = num_blocks, layers, kv_heads
        self.block_size, self.head_dim = block_size, head_dim
        self.dtype, self.device = dtype, device
        self.planes = torch.zeros(
            layers, 2, num_blocks, block_size, kv_heads, head_dim, dtype=DTYPES[dtype], device=device
        )
        self.block_bytes = layers * 2 * block_size * kv_heads * head_dim * self.planes.element_size()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer: [num_blocks, block_size, kv_heads, head_dim] each, sharing the memory."""
        return self.planes[index, 0], self.planes[index, 1]


def device_guard(device: torch.device) -> torch.cuda.device:
    """Makes `device` the current one, where Triton launches. Does nothing for a CPU (the interpreter)."""
    return torch.cuda.device(device.index or 0 if device.type == "cuda" else -1)
