"""The KV cache of one stage: one contiguous array of blocks.

Own blocks, borrowed blocks and replicas share it and its layout, so promoting a replica changes a block table
and copies nothing. Torch is not needed here: transport and replication work on bytes."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from kernels.memory import huge_zeros

KvDtype = Literal["float32", "bfloat16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}


class KVCache:
    """Blocks of `block_size` positions over all `layers` of the stage.

    A block is one contiguous range of `block_bytes`: [layers, 2, kv_heads, ...] where V is [block_size, head_dim]
    and K is [head_dim, block_size] (so that sixteen keys are one vector), in bfloat16 [head_dim / 2, block_size, 2]
    (so that two products of sixteen keys are one instruction). bfloat16 is stored as its 16 bits.
    Blocks start as zeros. `shared`: with processes that are forked from now on. Raises ValueError for sizes that make
    no sense, MemoryError."""

    def __init__(
        self,
        num_blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: KvDtype,
        shared: bool = False,
    ) -> None:
        if min(num_blocks, layers, kv_heads, block_size, head_dim) < 1:
            raise ValueError("every size of a KV cache must be at least 1")
        if dtype not in get_args(KvDtype):
            raise ValueError(f"dtype {dtype!r} is not one of {get_args(KvDtype)}")
        self.num_blocks, self.layers, self.kv_heads = num_blocks, layers, kv_heads
        self.block_size, self.head_dim = block_size, head_dim
        self.dtype: KvDtype = dtype
        self.device = "cpu"  # kernels/cuda/cache.py is the one on a GPU
        self.block_bytes = layers * 2 * kv_heads * block_size * head_dim * ITEM_BYTES[dtype]
        self._blocks = huge_zeros(num_blocks * self.block_bytes, shared).reshape(num_blocks, self.block_bytes)

    @property
    def address(self) -> int:
        """Where block 0 begins. The memory lives as long as this object."""
        return self._blocks.ctypes.data

    @property
    def array(self) -> npt.NDArray[np.generic]:
        """[num_blocks, layers, 2, kv_heads, block_size * head_dim], float32 or uint16; shares the memory."""
        item = np.float32 if self.dtype == "float32" else np.uint16
        shape = (self.num_blocks, self.layers, 2, self.kv_heads, self.block_size * self.head_dim)
        return self._blocks.view(item).reshape(shape)

    @property
    def pool(self) -> npt.NDArray[np.uint8]:
        """[num_blocks, block_bytes]; shares the memory."""
        return self._blocks

    def view(self, block: int) -> memoryview:
        """The bytes of a block: writable, no copy. Raises IndexError."""
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} is not one of {self.num_blocks}")
        return memoryview(self._blocks[block])

    def write(self, block: int, data: Buffer) -> None:
        """Replaces a block. Raises IndexError, and ValueError unless data has block_bytes bytes."""
        source = memoryview(data).cast("B")
        if source.nbytes != self.block_bytes:
            raise ValueError(f"a block has {self.block_bytes} bytes, not {source.nbytes}")
        self.view(block)[:] = source
