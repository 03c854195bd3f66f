"""Work on the bytes of KV: copied, written and checked, in a thread of its own, a piece at a time.

The event loop never reads or writes a block: a gigabyte takes a tenth of a second, in which no heartbeat would leave.
A call is a piece of bounded size, so that a step waits behind one piece and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dataplane._fast.checksum import block_sums, crc32, gather_blocks, piece_sums, scatter_blocks
from dataplane.kvcache import KVCache

if TYPE_CHECKING:
    from kernels.cuda.cache import DeviceCache

PIECE_BYTES = 4 << 20  # about a millisecond of copying

T = TypeVar("T")
Sums = npt.NDArray[np.uint32]  # CRC-32 of blocks


class RunInThread(Protocol):
    """Runs a call elsewhere; what it returns or raises comes back to who awaits it."""

    async def __call__(self, call: Callable[..., T], /, *arguments: object) -> T: ...


class KvThread:
    """One thread, calls one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kv")

    async def __call__(self, call: Callable[..., T], /, *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class KvBytes:
    """The blocks of a cache as bytes. Every method but the constructor is for the KV thread."""

    def __init__(self, cache: KVCache | DeviceCache) -> None:
        self.block_bytes = cache.block_bytes
        self.piece_blocks = max(1, PIECE_BYTES // cache.block_bytes)
        self._cache = cache
        self._pool = cache.pool if isinstance(cache, KVCache) else None

    def gather(self, blocks: Sequence[int]) -> tuple[bytearray, Sums]:
        """Copies of blocks, one behind the other, and the checksum of each."""
        size = self.block_bytes
        data = bytearray(len(blocks) * size)
        if self._pool is not None:
            return data, gather_blocks(self._pool, np.array(blocks, np.int64), data)
        for place, block in enumerate(blocks):
            data[place * size : (place + 1) * size] = self._cache.view(block)
        return data, piece_sums(data, size)

    def sums(self, blocks: Sequence[int]) -> Sums:
        """The checksum of each block."""
        if self._pool is not None:
            return block_sums(self._pool, np.array(blocks, np.int64))
        return np.array([crc32(self._cache.view(block)) for block in blocks], np.uint32)

    def sums_of(self, payload: memoryview) -> Sums:
        """The checksum of each whole block in a message."""
        return piece_sums(payload, self.block_bytes)

    def scatter(self, blocks: Sequence[int], payload: memoryview, places: Sequence[int]) -> None:
        """Block blocks[i] becomes piece places[i] of a message."""
        size = self.block_bytes
        if self._pool is not None:
            scatter_blocks(self._pool, np.array(blocks, np.int64), payload, np.array(places, np.int64))
            return
        for block, place in zip(blocks, places, strict=True):
            self._cache.write(block, payload[place * size : (place + 1) * size])
