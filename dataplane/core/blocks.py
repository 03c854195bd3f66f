"""Which KV block belongs to whom on one node: own, borrowed and replica blocks share one pool and one layout.

Serving a request of a lent-out pipeline and serving an own one are the same thing here; the key names the
pipeline. Promoting a replica moves its block-table row from one dictionary to the other and copies nothing.
Replicas are evicted, least recently written first, when a serving request needs room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from controlplane.contract.ids import PipelineId
from dataplane._fast.blocktable import BlockTable

Key = tuple[PipelineId, int]  # pipeline, rid


@dataclass(slots=True)
class Kv:
    """KV of one request on this node: `tokens` positions from 0 are valid in the blocks of `row`."""

    row: int
    tokens: int = 0
    checksums: list[int] = field(default_factory=list)  # replicas only: CRC-32 of each block


class KvStore:
    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_blocks_per_row: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.table = BlockTable(max_rows, max_blocks_per_row, block_size)
        self.own: dict[Key, Kv] = {}
        self.replicas: OrderedDict[Key, Kv] = OrderedDict()
        self.replicas_evicted = 0
        self.checksum_failures = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._rows_left = max_rows

    # ------------------------------------------------------------------ serving

    def grow(self, key: Key, tokens: int) -> bool:
        """Make room for `tokens` positions of a served request. False when the pool is full of served KV."""
        kv = self.own.get(key)
        if kv is None:
            if not self._make_row():
                return False
            kv = self.own[key] = Kv(self._new_row())
        need = -(-tokens // self.block_size) - self.table.num_blocks(kv.row)
        if need > 0:
            if not self._make_room(need):
                return False
            self.table.extend(kv.row, [self._free.pop() for _ in range(need)])
        return True

    def release(self, key: Key) -> None:
        self._give_back(self.own.pop(key, None))

    def release_pipeline(self, pipeline: PipelineId, keep: Iterable[int] = ()) -> None:
        """Give back everything served for `pipeline` but the requests to keep."""
        kept = set(keep)
        for key in [k for k in self.own if k[0] == pipeline and k[1] not in kept]:
            self.release(key)

    # ------------------------------------------------------------------ replicas

    def replica_block(self, key: Key, index: int, tokens: int) -> int | None:
        """The block to write copy `index` of a request into, `tokens` being valid once it is written.

        None when it makes no sense, would leave a gap or there is no room: served KV is never evicted for a
        copy, nor is another replica, since each of them is somebody's only one.
        """
        if key in self.own or not 0 <= index < self.table.max_blocks_per_row:
            return None
        if not 0 < tokens - index * self.block_size <= self.block_size:
            return None
        kv = self.replicas.get(key)
        if kv is None:
            if index != 0 or self._rows_left == 0 or not self._free:
                return None
            kv = self.replicas[key] = Kv(self._new_row())
        count = self.table.num_blocks(kv.row)
        if index > kv.tokens // self.block_size or index > count:
            return None
        if index == count:
            if not self._free:
                return None
            self.table.extend(kv.row, [self._free.pop()])
        return int(self.table.blocks(kv.row)[index])

    def replica_written(self, key: Key, index: int, tokens: int, checksum: int) -> None:
        kv = self.replicas[key]
        del kv.checksums[index:]
        kv.checksums.append(checksum)
        kv.tokens = tokens
        self.replicas.move_to_end(key)

    def drop_replica(self, key: Key) -> None:
        self._give_back(self.replicas.pop(key, None))

    def drop_replicas(self, pipeline: PipelineId) -> None:
        for key in [k for k in self.replicas if k[0] == pipeline]:
            self.drop_replica(key)

    def promote(self, key: Key, checksum: Callable[[int], int]) -> int:
        """A replica becomes served KV; returns how many tokens of it are sound.

        Each block is held against the checksum that came with it: from the first that differs on, the
        copy is not used, and those positions are recomputed.
        """
        kv = self.replicas.pop(key, None)
        if kv is None:
            return 0
        blocks = self.table.blocks(kv.row)
        for index, expected in enumerate(kv.checksums):
            if checksum(blocks[index]) != expected:
                self.checksum_failures += 1
                kv.tokens = min(kv.tokens, index * self.block_size)
                break
        kv.checksums.clear()
        self.own[key] = kv
        return kv.tokens

    def demote(self, key: Key, checksum: Callable[[int], int]) -> None:
        """Served KV becomes a replica: the pipeline has moved on to another node, which this one protects."""
        kv = self.own.pop(key)
        if kv.tokens == 0 or key in self.replicas:
            self._give_back(kv)
            return
        used = -(-kv.tokens // self.block_size)
        self._free.extend(self.table.truncate(kv.row, used))
        kv.checksums = [checksum(block) for block in self.table.blocks(kv.row)]
        self.replicas[key] = kv

    # ------------------------------------------------------------------ counting

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    @property
    def blocks_replica(self) -> int:
        return sum(self.table.num_blocks(kv.row) for kv in self.replicas.values())

    def check(self) -> None:
        """Every block is free or in exactly one row. Raises AssertionError (tests, sampled in production)."""
        seen = list(self._free)
        for kv in (*self.own.values(), *self.replicas.values()):
            seen.extend(self.table.blocks(kv.row))
            assert kv.tokens <= self.table.num_blocks(kv.row) * self.block_size, "tokens without blocks"
        assert sorted(seen) == list(range(self.num_blocks)), "a block is lost or held twice"

    def _make_row(self) -> bool:
        while self._rows_left == 0 and self.replicas:
            self._evict()
        return self._rows_left > 0

    def _make_room(self, blocks: int) -> bool:
        while len(self._free) < blocks and self.replicas:
            self._evict()
        return len(self._free) >= blocks

    def _evict(self) -> None:
        _, kv = self.replicas.popitem(last=False)
        self.replicas_evicted += 1
        self._give_back(kv)

    def _new_row(self) -> int:
        self._rows_left -= 1
        return int(self.table.new_row())

    def _give_back(self, kv: Kv | None) -> None:
        if kv is not None:
            self._free.extend(self.table.free_row(kv.row))
            self._rows_left += 1
