"""Work on the bytes of KV: copied, written and checked, in a thread of its own, a piece at a time.

The event loop never reads or writes a block: a gigabyte takes a tenth of a second, in which no heartbeat would leave.
A call is a piece of bounded size, so that a step waits behind one piece and no more. Of a few small blocks it is over
before a thread would have begun, and is made at once: handing over was half of what copies cost a small model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dataplane._fast.checksum import block_sums, gather_blocks, piece_sums, scatter_blocks
from dataplane.kvcache import KVCache

if TYPE_CHECKING:
    from kernels.cuda.cache import DeviceCache

PIECE_BYTES = 4 << 20  # about a millisecond of copying
AT_ONCE_BYTES = 256 << 10  # a tenth of a millisecond, or less

T = TypeVar("T")
Sums = npt.NDArray[np.uint32]  # CRC-32 of blocks


class RunInThread(Protocol):
    """Runs a call elsewhere, or at once if it reads or writes few bytes (`size`; None: it may be many). What it returns
    or raises comes back to who awaits it."""

    async def __call__(self, call: Callable[..., T], /, *arguments: object, size: int | None = None) -> T: ...


class KvThread:
    """One thread, calls one after the other. `at_once_bytes`: of calls that need none; see BlockBytes."""

    def __init__(self, at_once_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kv")
        self._at_once_bytes = at_once_bytes
        self._under_way = 0

    async def __call__(self, call: Callable[..., T], /, *arguments: object, size: int | None = None) -> T:
        if size is not None and size <= self._at_once_bytes and not self._under_way:
            return call(*arguments)
        self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        finally:
            self._under_way -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class BlockBytes(Protocol):
    """The blocks of a cache as bytes; every method is for the KV thread. A checksum is the same for a block of the
    cache and for its copy in a message, on all nodes of one kind."""

    block_bytes: int
    piece_blocks: int  # of a call that nobody waits for too long
    at_once_bytes: int  # of a call that is over before a thread would have begun

    def warm_up(self) -> None:
        """Does whatever a first call would have to wait for. Once, before anything is in the cache."""
        ...

    def gather(self, blocks: Sequence[int]) -> tuple[bytearray, Sums]:
        """Copies of blocks, one behind the other, and the checksum of each."""
        ...

    def sums(self, blocks: Sequence[int]) -> Sums:
        """The checksum of each block."""
        ...

    def sums_of(self, payload: memoryview) -> Sums:
        """The checksum of each whole block in a message."""
        ...

    def scatter(self, blocks: Sequence[int], payload: memoryview, places: Sequence[int]) -> None:
        """Block blocks[i] becomes piece places[i] of a message."""
        ...


def blocks_as_bytes(cache: KVCache | DeviceCache) -> BlockBytes:
    """Of a CPU's cache, or of a GPU's, where sums are computed where the blocks are."""
    if isinstance(cache, KVCache):
        return KvBytes(cache)
    from kernels.cuda.transfer import BlockTransfer  # not above: it imports triton

    return BlockTransfer(cache)


class KvBytes:
    """Of a cache in host memory; its checksums are CRC-32."""

    def __init__(self, cache: KVCache) -> None:
        self.block_bytes = cache.block_bytes
        self.piece_blocks = max(1, PIECE_BYTES // cache.block_bytes)
        self.at_once_bytes = AT_ONCE_BYTES
        self._pool = cache.pool

    def warm_up(self) -> None:
        return None  # these are compiled

    def gather(self, blocks: Sequence[int]) -> tuple[bytearray, Sums]:
        data = bytearray(len(blocks) * self.block_bytes)
        return data, gather_blocks(self._pool, np.array(blocks, np.int64), data)

    def sums(self, blocks: Sequence[int]) -> Sums:
        return block_sums(self._pool, np.array(blocks, np.int64))

    def sums_of(self, payload: memoryview) -> Sums:
        return piece_sums(payload, self.block_bytes)

    def scatter(self, blocks: Sequence[int], payload: memoryview, places: Sequence[int]) -> None:
        scatter_blocks(self._pool, np.array(blocks, np.int64), payload, np.array(places, np.int64))
