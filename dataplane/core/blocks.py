"""Which KV block belongs to whom on one node: own, borrowed and replica blocks share one pool and one layout.

Serving a request of a lent-out pipeline and serving an own one are the same thing here; the key names the
pipeline. Promoting a replica moves its block-table row from one dictionary to the other; no byte is read or copied.
Replicas are evicted, least recently written first, when a serving request needs room.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from controlplane.contract.ids import PipelineId
from dataplane._fast.blocktable import BlockTable, Rows, lookup
from dataplane.core.checksums import Check, Checksums

Key = tuple[PipelineId, int]  # pipeline, rid


@dataclass(slots=True)
class Replica:
    """A copy: its row of the block table, and the CRC-32 that came with each block."""

    row: int
    checksums: list[int] = field(default_factory=list)


class KvStore:
    """How many positions of a request are valid, from 0 on, is in the block table with its blocks."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_blocks_per_row: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.table = BlockTable(max_rows, max_blocks_per_row, block_size)
        self.own: defaultdict[PipelineId, dict[int, int]] = defaultdict(
            dict
        )  # served: rid -> row of the table
        self.replicas: OrderedDict[Key, Replica] = OrderedDict()
        self.replicas_evicted = 0
        self.idle: frozenset[PipelineId] = (
            frozenset()
        )  # that are down: what is served of them makes room, too
        self.missing = 0  # blocks that the last `begin` which found no room would have needed more
        self.evicted: list[Key] = []  # whose sources do not know yet: for the replicator to take
        self.checksums = Checksums(self.table)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._rows_left = max_rows

    # ------------------------------------------------------------------ serving

    def begin(self, pipeline: PipelineId, rows: Rows) -> npt.NDArray[np.int32] | None:
        """Make room for the rows of a step, whose positions are not valid until `commit`: nobody may copy or
        count what is being computed.

        Returns their rows of the block table; None when the pool is full of served KV. Raises KvGap when the
        KV before a row is not here.
        """
        held = self.own[pipeline]
        table_rows, unknown = lookup(held, rows.rids)
        for index in np.flatnonzero(table_rows < 0) if unknown else ():  # requests that begin here
            if not self._make_row():
                self.missing = 1
                return None
            table_rows[index] = held[int(rows.rids[index])] = self._new_row()
        missing = self.table.grow(table_rows, rows.starts, rows.counts, self._free)
        if missing:
            if not self._make_room(missing):
                return None
            self.table.grow(table_rows, rows.starts, rows.counts, self._free)
        self.checksums.written(table_rows, rows.starts, rows.counts)
        return table_rows

    def commit(self, table_rows: npt.NDArray[np.int32], rows: Rows) -> list[int]:
        """The step has run, its positions are valid. Returns the indices of rows that have filled a block with it."""
        # Again: who has copied a part-filled block since `begin` has read what is no longer there.
        self.checksums.written(table_rows, rows.starts, rows.counts)
        return self.table.commit(table_rows, rows.starts, rows.counts)

    def serves(self, key: Key) -> bool:
        return key[1] in self.own[key[0]]

    def tokens(self, key: Key) -> int:
        """Valid positions of a served request; 0 for one that is not."""
        row = self.own[key[0]].get(key[1])
        return self.table.valid(row) if row is not None else 0

    def release(self, key: Key) -> None:
        row = self.own[key[0]].pop(key[1], None)
        if row is not None:
            self._give_back(row)

    def release_pipeline(self, pipeline: PipelineId, keep: Iterable[int] = ()) -> None:
        """Give back everything served for `pipeline` but the requests to keep."""
        kept = set(keep)
        for rid in [rid for rid in self.own[pipeline] if rid not in kept]:
            self.release((pipeline, rid))

    # ------------------------------------------------------------------ replicas

    def replica_block(self, key: Key, index: int, tokens: int) -> int | None:
        """The block to write copy `index` of a request into, `tokens` being valid once it is written.

        None when it makes no sense, would leave a gap or there is no room: served KV is never evicted for a
        copy, nor is another replica, since each of them is somebody's only one.
        """
        if self.serves(key) or not 0 <= index < self.table.max_blocks_per_row:
            return None
        if not 0 < tokens - index * self.block_size <= self.block_size:
            return None
        copy = self.replicas.get(key)
        if copy is None:
            if index != 0 or self._rows_left == 0 or not self._free:
                return None
            copy = self.replicas[key] = Replica(self._new_row())
        count = self.table.num_blocks(copy.row)
        if index > self.table.valid(copy.row) // self.block_size or index > count:
            return None
        if index == count:
            if not self._free:
                return None
            self.table.extend(copy.row, [self._free.pop()])
        return self.table.block(copy.row, index)

    def replica_written(self, key: Key, index: int, tokens: int, checksum: int) -> None:
        copy = self.replicas[key]
        del copy.checksums[index:]
        copy.checksums.append(checksum)
        self.table.set_valid(copy.row, tokens)
        self.replicas.move_to_end(key)

    def replica_tokens(self, key: Key) -> int:
        """Valid positions of a copy; 0 without one."""
        copy = self.replicas.get(key)
        return self.table.valid(copy.row) if copy is not None else 0

    def drop_replica(self, key: Key) -> None:
        copy = self.replicas.pop(key, None)
        if copy is not None:
            self._give_back(copy.row)

    def drop_replicas(self, pipeline: PipelineId) -> None:
        for key in [k for k in self.replicas if k[0] == pipeline]:
            self.drop_replica(key)

    def promote(self, key: Key) -> int:
        """A replica becomes served KV, unread (see `checksums`); returns how many tokens it has."""
        copy = self.replicas.pop(key, None)
        if copy is None:
            return 0
        self.own[key[0]][key[1]] = copy.row
        self.checksums.promoted(copy.row, copy.checksums)
        return self.table.valid(copy.row)

    def demote(self, key: Key) -> None:
        """Served KV becomes a replica: the pipeline has moved on to another node, which this one protects.

        Nothing is read: what has no checksum is given back. It was never copied out, so that the other node does not
        count on it."""
        row = self.own[key[0]].pop(key[1], None)
        if row is None:
            return
        checksums, covered = self.checksums.of(row)
        tokens = min(self.table.valid(row), covered)
        if tokens == 0 or key in self.replicas:
            self._give_back(row)
            return
        blocks = -(-tokens // self.block_size)
        self._free.extend(self.table.truncate(row, blocks))
        self.table.set_valid(row, tokens)
        self.checksums.forget(row)
        self.replicas[key] = Replica(row, checksums[:blocks])

    # ------------------------------------------------------------------ checking

    def straddled(self, pipeline: PipelineId, rows: Rows) -> list[Check]:
        """What has to be looked at before `begin` for these rows."""
        if not self.checksums.unverified:
            return []
        table_rows, _ = lookup(self.own[pipeline], rows.rids)
        return self.checksums.straddled(table_rows.tolist(), rows.starts.tolist())

    def verified_tokens(self, key: Key) -> int:
        """Valid positions of a served request that may be copied to others: nobody hands on what may be damaged."""
        row = self.own[key[0]].get(key[1])
        return self.checksums.verified(row, self.table.valid(row)) if row is not None else 0

    # ------------------------------------------------------------------ counting

    @property
    def checksum_failures(self) -> int:
        """Blocks here that were found to have changed."""
        return self.checksums.failures

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    @property
    def blocks_replica(self) -> int:
        return sum(self.table.num_blocks(copy.row) for copy in self.replicas.values())

    def check(self) -> None:
        """Every block is free or in exactly one row. Raises AssertionError (tests, sampled in production)."""
        seen = list(self._free)
        rows = [row for held in self.own.values() for row in held.values()]
        for row in (*rows, *(copy.row for copy in self.replicas.values())):
            seen.extend(self.table.blocks(row))
            room = self.table.num_blocks(row) * self.block_size
            assert self.table.valid(row) <= room, "tokens without blocks"
        assert self.checksums.unverified.keys() <= set(rows), "a row that is not served waits to be looked at"
        assert sorted(seen) == list(range(self.num_blocks)), "a block is lost or held twice"

    def _make_row(self) -> bool:
        while self._rows_left == 0 and (self.replicas or self._evictable()):
            self._evict()
        return self._rows_left > 0

    def _make_room(self, blocks: int) -> bool:
        """Free that many blocks more; nothing is evicted if that would not do."""
        evictable = [self.table.num_blocks(self.own[p][rid]) for p, rid in self._evictable()]
        self.missing = max(0, blocks - self.blocks_replica - sum(evictable))
        if self.missing:
            return False
        goal = len(self._free) + blocks
        while len(self._free) < goal:
            self._evict()
        return True

    def _evictable(self) -> list[Key]:
        """Served, but of pipelines that are down: nobody waits for it, and it can be computed again. Oldest first."""
        return [(pipeline, rid) for pipeline in sorted(self.idle) for rid in self.own.get(pipeline, ())]

    def _evict(self) -> None:
        """The copy least recently written; if there is none, the youngest request of a pipeline that is down."""
        if not self.replicas:
            self.release(self._evictable()[-1])
            return
        key, copy = self.replicas.popitem(last=False)
        self.replicas_evicted += 1
        self.evicted.append(key)
        self._give_back(copy.row)

    def _new_row(self) -> int:
        self._rows_left -= 1
        return self.table.new_row()

    def _give_back(self, row: int) -> None:
        self.checksums.forget(row)
        self._free.extend(self.table.free_row(row))
        self._rows_left += 1
