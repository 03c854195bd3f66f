"""The ranks of one stage as threads of this process, with the block tables that the data plane would keep."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.kvcache import KVCache
from kernels.base import Head, Layer, Linear, Mlp, StageSpec
from kernels.cpu import _native
from kernels.cpu.rank import CpuRank, HeadsOfLayers, planes_of
from kernels.cpu.stage import CpuStage
from kernels.ranks.exchange import Exchange, make_memory
from kernels.ranks.layout import DATA_PARALLEL, NO_PLANE, Layout, changes, first_layout
from kernels.ranks.own import shape_of

HIDDEN, HEAD_DIM, VOCAB, BLOCK, BLOCKS, ROWS_MAX = 40, 16, 150, 8, 40, 64
I32 = npt.NDArray[np.int32]


class Rotary:
    """As kernels.base.Rotary, of 256 positions."""

    def __init__(self) -> None:
        angles = torch.arange(256)[:, None] * 0.7 ** torch.arange(HEAD_DIM // 2)
        self.cos, self.sin, self.max_positions = angles.cos(), angles.sin(), len(angles)

    def cover(self, positions: int) -> None:
        assert positions <= self.max_positions


def random_spec(kv_heads: int, dtype: torch.dtype, layers: int = 3, intermediate: int = 1100) -> StageSpec:
    """Random weights, two query heads a KV head, biases and, in the last layer, all kinds of norms and a window."""
    generator = torch.Generator().manual_seed(kv_heads)

    def matrix(rows: int, columns: int, std: float = 0.3) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(dtype)

    def linear(rows: int, columns: int) -> Linear:
        return Linear(matrix(rows, columns, 1.5 / columns**0.5), matrix(1, rows)[0])

    def norm(size: int) -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(size, generator=generator)

    heads = 2 * kv_heads
    made = []
    for index in range(layers):
        last = index == layers - 1
        made.append(
            Layer(
                norm(HIDDEN),
                linear((heads + 2 * kv_heads) * HEAD_DIM, HIDDEN),
                norm(HEAD_DIM) if last else None,
                norm(HEAD_DIM) if last else None,
                linear(HIDDEN, heads * HEAD_DIM),
                norm(HIDDEN),
                Mlp(linear(2 * intermediate, HIDDEN), linear(HIDDEN, intermediate)),
                13 if last else None,
                norm(HIDDEN) if last else None,
                norm(HIDDEN) if last else None,
            )
        )
    head = Head(norm(HIDDEN), matrix(VOCAB, HIDDEN))
    return StageSpec(
        HIDDEN, intermediate, heads, 1e-5, (Rotary(),), tuple(made), matrix(VOCAB, HIDDEN, 1.0), head
    )


class Requests:
    """Rows of a block table, and a whole stage that computes them: what ranks are compared with."""

    def __init__(self, spec: StageSpec, kv_heads: int, dtype: str, count: int) -> None:
        self.spec, self.dtype = spec, dtype
        kv = KVCache(BLOCKS, len(spec.layers), kv_heads, BLOCK, HEAD_DIM, dtype)
        self.alone = CpuStage(spec, kv, sums="fixed")
        self.table = BlockTable(count, BLOCKS, BLOCK)
        self.rows = [self.table.new_row() for _ in range(count)]
        self.lengths = dict.fromkeys(self.rows, 0)
        self.free = np.random.default_rng(0).permutation(BLOCKS).tolist()
        self.tokens = np.random.default_rng(1)

    def step(self, counts: dict[int, int]) -> tuple[npt.NDArray[np.int64], I32, I32, I32]:
        """So many random tokens more of these rows: tokens, rows, starts and counts."""
        rows = np.array(list(counts), np.int32)
        starts = np.array([self.lengths[row] for row in counts], np.int32)
        for row, count in counts.items():
            self.lengths[row] += count
            need = -(-self.lengths[row] // BLOCK) - self.table.num_blocks(row)
            self.table.extend(row, [self.free.pop() for _ in range(need)])
        tokens = self.tokens.integers(0, VOCAB, sum(counts.values()))
        return tokens, rows, starts, np.array(list(counts.values()), np.int32)


class PlanePool:
    """K and V of a rank in memory of its own, as a device has it: planes [num_blocks, K and V, block_size * head_dim],
    each of a head of a layer, where the layout says."""

    def __init__(self, planes: int, num_blocks: int, block_size: int, head_dim: int, dtype: str) -> None:
        self.planes, self.num_blocks = planes, num_blocks
        self.block_size, self.head_dim, self.dtype = block_size, head_dim, dtype
        item = np.uint16 if dtype == "bfloat16" else np.float32
        self.array: npt.NDArray[np.generic] = np.zeros((planes, num_blocks, 2, block_size * head_dim), item)

    def cache(self, layout: Layout, rank: int, own: HeadsOfLayers) -> _native.Cache:
        planes = layout.planes_of(rank)
        table = np.array([[planes[layer][head] for head in heads] for layer, heads in enumerate(own)])
        assert table.min() >= 0
        assert table.max() < self.planes
        item = self.block_size * self.head_dim
        size = self.num_blocks * 2 * item
        return planes_of(self, self.array.ctypes.data, table, size, item, 2 * item)


class RankGroup:
    """Threads are the ranks: a step releases the interpreter, and the exchange does not care who has its memory."""

    def __init__(self, requests: Requests, kv_heads: int, ranks: int, threads: int = 1) -> None:
        self.requests, self.threads = requests, threads
        self.layout = first_layout(shape_of(requests.spec, kv_heads), ranks)
        self.pools: dict[int, PlanePool] = {}
        self.ranks: dict[int, CpuRank] = {}
        self.owners: dict[int, int] = {}
        self.assign({row: row % ranks for row in requests.rows})
        for rank in self.layout.ranks:
            self.pools[rank] = self._pool(self.layout, rank)
        self._start()

    def assign(self, owners: dict[int, int]) -> None:
        """Which rank owns which row."""
        self.owners = owners

    def _pool(self, layout: Layout, rank: int) -> PlanePool:
        pool = PlanePool(layout.planes_needed(rank), BLOCKS, BLOCK, HEAD_DIM, self.requests.dtype)
        pool.array.view(np.uint8)[:] = 0xFF  # no number at all: what nobody brings is seen
        return pool

    def _start(self) -> None:
        count = len(self.layout.ranks)
        memory = make_memory(count, ROWS_MAX * HIDDEN)
        try:
            ends = [Exchange(memory, count, i, ROWS_MAX * HIDDEN) for i in range(count)]
        finally:
            os.close(memory)
        before = self.ranks
        self.ranks = {
            rank: CpuRank(
                self.requests.spec,
                self.layout,
                rank,
                self.pools[rank],
                end,
                threads=self.threads,
                timeout_s=60.0,
                before=before.get(rank),
            )
            for rank, end in zip(self.layout.ranks, ends, strict=True)
        }

    def check_step(self, counts: dict[int, int]) -> None:
        """All ranks together give the whole stage's logits, of every token, to the bit."""
        requests = self.requests
        tokens, rows, starts, new = requests.step(counts)
        picked = np.arange(len(tokens), dtype=np.int32)
        step = requests.table.fill(rows, starts, new, StepArrays())
        want = requests.alone.forward(tokens, step, picked).copy()
        assert np.isfinite(want).all()

        def forward(rank: int) -> npt.NDArray[np.generic]:
            own = np.array([self.owners[int(row)] == rank for row in rows])
            owned = requests.table.fill(rows[own], starts[own], new[own], StepArrays())
            places = picked[np.repeat(own, new)]
            return self.ranks[rank].forward(tokens, step, picked, owned, places)

        with ThreadPoolExecutor(len(self.ranks)) as threads:
            parts = list(threads.map(forward, self.ranks))
        got = np.concatenate(parts, axis=1)
        assert got.tobytes() == want.tobytes(), (len(self.ranks), np.abs(got - want).max())

    def become(self, after: Layout, owners: dict[int, int]) -> None:
        """The group of the next layout. The pools of ranks that are gone stand for their backup; only what the changes
        and the owners say is brought anywhere."""
        before, old_pools, old_owners = self.layout, self.pools, self.owners
        self.layout, self.owners = after, owners
        self.pools = {rank: self._pool(after, rank) for rank in after.ranks}
        for rank in set(before.ranks) & set(after.ranks):
            for old, new in zip(before.planes_of(rank), after.planes_of(rank), strict=True):
                for plane in set(old) & set(new) - {NO_PLANE}:  # which stay where they are
                    self.pools[rank].array[plane] = old_pools[rank].array[plane]

        def bring(layer: int, head: int, row: int, source: int, target: int) -> None:
            blocks = self.requests.table.blocks(row)
            into = self.pools[target].array[after.planes_of(target)[layer][head]]
            into[blocks] = old_pools[source].array[before.planes_of(source)[layer][head]][blocks]

        moved = set()
        for move in changes(before, after).heads:
            moved.add((move.layer, move.head))
            for row in self.requests.rows:
                source = old_owners[row] if move.source == DATA_PARALLEL else move.source
                target = owners[row] if move.target == DATA_PARALLEL else move.target
                bring(move.layer, move.head, row, source, target)
        for layer in range(after.shape.layers):
            for head in after.data_parallel(layer):
                for row in self._of_new_owners(old_owners) if (layer, head) not in moved else ():
                    bring(layer, head, row, old_owners[row], owners[row])
        self._start()

    def _of_new_owners(self, old: dict[int, int]) -> Iterable[int]:
        return (row for row, owner in self.owners.items() if old[row] != owner)
