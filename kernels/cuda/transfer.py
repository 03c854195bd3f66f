"""Blocks of a GPU's KV cache to and from host memory, and their sums, beside the steps: on a stream of its own."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from kernels.cuda.cache import DeviceCache, device_guard
from kernels.triton.blocks import gather_blocks, scatter_blocks, sum_blocks, sum_pieces

STAGING_BYTES = 8 << 20  # on the device, and pinned on the host
LAUNCH_BLOCKS_MAX = 65_535  # blocks are the third dimension of a grid, of which CUDA takes no more


class BlockTransfer:
    """For one thread, which waits for the device by an event and holds nobody else up. Steps and transfers of the same
    blocks take turns (dataplane/worker.py): a transfer starts after the steps that were launched, and its effects are
    there when a call returns.

    A sum is that of kernels/triton/blocks.py, computed where the block is."""

    def __init__(self, cache: DeviceCache) -> None:
        self.block_bytes = cache.block_bytes
        self._cache = cache.planes.view(cache.layers * 2, cache.num_blocks, -1)
        self._blocks = cache.num_blocks
        self._device = cache.planes.device
        # In one go:
        self.piece_blocks = min(LAUNCH_BLOCKS_MAX, max(1, STAGING_BYTES // cache.block_bytes))
        self.at_once_bytes = -1  # all of them wait for the device
        planes, _, size = self._cache.shape
        self._wire = torch.empty(
            self.piece_blocks, planes, size, dtype=cache.planes.dtype, device=self._device
        )
        self._host = torch.empty_like(self._wire, device="cpu", pin_memory=self._wire.is_cuda)
        self._bytes: memoryview = self._host.view(torch.uint8).view(-1).numpy().data
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        if self._wire.is_cuda:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def warm_up(self) -> None:
        """Compiles and loads every kernel, so that no copy waits for it while requests are served or taken over. Block
        0 goes there and back."""
        data, _ = self.gather([0])
        self.sums_of(data)
        self.scatter([0], data, [0])

    def gather(self, blocks: Sequence[int]) -> tuple[bytearray, npt.NDArray[np.uint32]]:
        """Copies of blocks, one behind the other, and the sum of each. Raises IndexError."""
        self._check(blocks)
        size = self.block_bytes
        data = bytearray(len(blocks) * size)
        sums = []
        for first in range(0, len(blocks), self.piece_blocks):
            some = blocks[first : first + self.piece_blocks]
            with _On(self):
                where = self._indices(some)
                gather_blocks(self._cache, where, self._wire, self._indices(range(len(some))))
                self._host[: len(some)].copy_(self._wire[: len(some)], non_blocking=True)
                sums.append(self._sums_of_blocks(where))
            data[first * size : (first + len(some)) * size] = self._bytes[: len(some) * size]
        return data, _joined(sums)

    def sums(self, blocks: Sequence[int]) -> npt.NDArray[np.uint32]:
        """The sum of each block: nothing but the sums leaves the device. Raises IndexError."""
        self._check(blocks)
        with _On(self):
            sums = [
                self._sums_of_blocks(self._indices(blocks[first : first + LAUNCH_BLOCKS_MAX]))
                for first in range(0, len(blocks), LAUNCH_BLOCKS_MAX)
            ]
        return _joined(sums)

    def sums_of(self, payload: Buffer) -> npt.NDArray[np.uint32]:
        """The sum of each whole block in a message."""
        data = memoryview(payload).cast("B")
        count = data.nbytes // self.block_bytes
        sums = []
        for first in range(0, count, self.piece_blocks):
            some = min(self.piece_blocks, count - first)
            self._stage(data, range(first, first + some))
            with _On(self):
                self._wire[:some].copy_(self._host[:some], non_blocking=True)
                found = torch.zeros(some, dtype=torch.int32, device=self._device)
                sum_pieces(self._wire, self._indices(range(some)), found)
                sums.append(found.to("cpu", non_blocking=True))
        return _joined(sums)

    def scatter(self, blocks: Sequence[int], payload: Buffer, places: Sequence[int]) -> None:
        """Block blocks[i] becomes piece places[i] of a message. Raises IndexError, ValueError for a short message."""
        self._check(blocks)
        data = memoryview(payload).cast("B")
        if places and (max(places) + 1) * self.block_bytes > data.nbytes:
            raise ValueError(f"a message of {data.nbytes} bytes has no block {max(places)}")
        for first in range(0, len(blocks), self.piece_blocks):
            some = blocks[first : first + self.piece_blocks]
            self._stage(data, places[first : first + self.piece_blocks])
            with _On(self):
                self._wire[: len(some)].copy_(self._host[: len(some)], non_blocking=True)
                scatter_blocks(self._cache, self._indices(some), self._wire, self._indices(range(len(some))))

    # ------------------------------------------------------------------

    def _check(self, blocks: Sequence[int]) -> None:
        wrong = next((block for block in blocks if not 0 <= block < self._blocks), None)
        if wrong is not None:
            raise IndexError(f"block {wrong} is not one of {self._blocks}")

    def _stage(self, data: memoryview, places: Sequence[int]) -> None:
        """These pieces of a message, one behind the other, where the device reads them."""
        size = self.block_bytes
        for nth, place in enumerate(places):
            self._bytes[nth * size : (nth + 1) * size] = data[place * size : (place + 1) * size]

    def _sums_of_blocks(self, where: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(where), dtype=torch.int32, device=self._device)
        sum_blocks(self._cache, where, found)
        return found.to("cpu", non_blocking=True)

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32).to(self._device)


class _On:
    """Launches within go to the transfer's stream, behind the steps; they are over at the end."""

    def __init__(self, transfer: BlockTransfer) -> None:
        self._transfer = transfer
        self._guard = device_guard(transfer._device)
        self._stream = torch.cuda.stream(transfer._stream)

    def __enter__(self) -> None:
        self._guard.__enter__()  # type: ignore[no-untyped-call]
        stream = self._transfer._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream(self._transfer._device))
        self._stream.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *failure: object) -> None:
        done, stream = self._transfer._done, self._transfer._stream
        if done is not None and stream is not None:
            done.record(stream)
            done.synchronize()
        self._stream.__exit__(*failure)
        self._guard.__exit__(*failure)


def _joined(sums: Sequence[torch.Tensor]) -> npt.NDArray[np.uint32]:
    if not sums:
        return np.zeros(0, np.uint32)
    return torch.cat(list(sums)).numpy().view(np.uint32)
