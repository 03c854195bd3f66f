"""Steps over a cache with random contents, for the tests of this folder."""

from typing import Any

import numpy as np
import torch

from dataplane._fast.blocktable import BlockTable, StepArrays
from kernels.base import DTYPES
from kernels.cuda.cache import DeviceCache
from kernels.cuda.step import DeviceStep, query_tiles, splits_needed
from kernels.triton.attention import Partials, attention_tiles

TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2}


def random(*shape: int, dtype: str, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DTYPES[dtype]).to(device)


def close(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(
        got.cpu().float(), want.cpu().float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


class Rows:
    """Sequences with shuffled blocks in one cache; step() makes the arrays of any work on them."""

    def __init__(self, lengths: list[int], cache: DeviceCache) -> None:
        self.cache = cache
        order = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        need = [-(-n // cache.block_size) for n in lengths]
        self._table = BlockTable(len(lengths), max(need), cache.block_size)
        self._rows = [self._table.new_row() for _ in lengths]
        for row, n in zip(self._rows, need, strict=True):
            self._table.extend(row, [order.pop() for _ in range(n)])

    def step(self, *work: tuple[int, int, int]) -> StepArrays:
        """One row for each (sequence, first position, count)."""
        columns = np.array([(self._rows[i], start, count) for i, start, count in work], np.int32).T
        return self._table.fill(*(np.ascontiguousarray(column) for column in columns), StepArrays())


def make_cache(device: torch.device, dtype: Any, *, blocks: int = 60, kv_heads: int = 2, head_dim: int = 24,
               block_size: int = 16, layers: int = 2) -> DeviceCache:  # fmt: skip
    """A cache full of random values."""
    cache = DeviceCache(blocks, layers, kv_heads, block_size, head_dim, dtype, str(device))
    cache.planes.copy_(random(*cache.planes.shape, dtype=dtype, device=device, seed=head_dim))
    return cache


def on_device(step: StepArrays, cache: DeviceCache, heads: int, room: int = 1 << 20) -> DeviceStep:
    """`step` with exactly its own shape; attention's partial results have room for `room` queries x splits."""
    sizes = attention_tiles(cache.planes.dtype, cache.head_dim, heads // cache.kv_heads)
    tiles = query_tiles(step.cu_q, sizes.queries)
    partials = Partials(room, 1, heads, cache.head_dim, cache.planes.device)
    made = DeviceStep(len(step.positions), *step.tables.shape, len(tiles), partials, cache.planes.device)
    made.fill(step, tiles)
    made.plan(splits_needed(step), tiles[:, 1], len(step.positions))
    return made
