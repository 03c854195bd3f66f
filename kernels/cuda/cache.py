"""The KV cache of one stage on a GPU."""

from typing import Literal

import torch
from typing_extensions import Buffer

from kernels.base import DTYPES
from kernels.triton.blocks import gather_block, scatter_block


class DeviceCache:
    """Blocks of `block_size` positions over all layers of a stage, in [layers, 2, num_blocks, block_size, kv_heads,
    head_dim]: one layer's keys are one contiguous tensor over all blocks, which paged attention reads in place (the
    form that xFormers takes, too).

    On the wire a block is one piece, [layers, 2, block_size, kv_heads, head_dim]. That is not the CPU cache's layout,
    and need not be: nodes of a group are of one kind, since two kinds would not have equal bits anyway.

    Not thread-safe, like the CPU's. Work is ordered by the device's default stream: reads see finished steps."""

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
        self._flat = self.planes.view(layers * 2, num_blocks, -1)
        self._wire = torch.empty(layers * 2, self._flat.shape[2], dtype=DTYPES[dtype], device=device)
        self._host = torch.empty_like(self._wire, device="cpu", pin_memory=self._wire.is_cuda)
        self._bytes: memoryview = self._host.view(torch.uint8).view(-1).numpy().data
        self.block_bytes = self._wire.nbytes

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer: [num_blocks, block_size, kv_heads, head_dim] each, sharing the memory."""
        return self.planes[index, 0], self.planes[index, 1]

    def view(self, block: int) -> memoryview:
        """The bytes of a block, read-only: a copy, good until the next call of view() or write(). IndexError."""
        with device_guard(self._wire.device):
            gather_block(self._flat, block, self._wire)
            self._host.copy_(self._wire)  # waits for the device
        return self._bytes.toreadonly()

    def write(self, block: int, data: Buffer) -> None:
        """Replaces a block. Raises IndexError, and ValueError unless data has block_bytes bytes."""
        source = memoryview(data).cast("B")
        if source.nbytes != self.block_bytes:
            raise ValueError(f"a block has {self.block_bytes} bytes, not {source.nbytes}")
        self._bytes[:] = source
        with device_guard(self._wire.device):
            self._wire.copy_(self._host)  # has read the host's copy when it returns
            scatter_block(self._flat, block, self._wire)


def device_guard(device: torch.device) -> torch.cuda.device:
    """Makes `device` the current one, where Triton launches. Does nothing for a CPU (the interpreter)."""
    return torch.cuda.device(device.index or 0 if device.type == "cuda" else -1)
