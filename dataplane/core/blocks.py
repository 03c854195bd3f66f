"""Which KV block belongs to whom on one node: own, borrowed, cached and copied blocks share one pool and one layout.

A block that is full has a name (prefix.py), and whoever needs that content has this very block: requests of one or of
several pipelines that begin alike, copies for others, and what is kept for requests to come. To take a copy into
service changes tables; no byte is read or copied. What is kept of a pipeline that is served here its scheduler decides.
What others only have copied to us makes room when served KV needs it: first what belongs to no request any more, then
requests' copies, least recently written first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from controlplane.contract.ids import PipelineId
from dataplane._fast.blocktable import BlockTable, Rows, lookup
from dataplane.core.checksums import Check, Checksums

Key = tuple[PipelineId, int]  # pipeline, rid


class KvStore:
    """How many positions of a request are valid, from 0 on, is in the block table with its blocks."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_blocks_per_row: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.table = BlockTable(max_rows, max_blocks_per_row, block_size)
        # Served: rid -> row of the table.
        self.own: defaultdict[PipelineId, dict[int, int]] = defaultdict(dict)
        # Served by nobody now, by name; kept until the scheduler evicts it.
        self.kept: defaultdict[PipelineId, OrderedDict[bytes, int]] = defaultdict(OrderedDict)
        self.replicas: OrderedDict[Key, int] = OrderedDict()  # copies of requests: row of the table
        self.spare: OrderedDict[bytes, tuple[int, PipelineId]] = OrderedDict()  # copies of what others keep
        self.replicas_evicted = 0
        # Pipelines that are down: what is served of them makes room, too.
        self.idle: frozenset[PipelineId] = frozenset()
        self.missing = 0  # blocks that the last `begin` which found no room would have needed more
        self.evicted: list[Key] = []  # copies whose sources do not know yet: for the replicator to take
        self.gone: list[bytes] = []  # names that are not here any more: for the replicator to take
        self.checksums = Checksums()
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._more: dict[int, int] = {}  # holders of a block besides the first: rows and names that are kept
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
        self._written(table_rows, rows)
        return table_rows

    def commit(self, table_rows: npt.NDArray[np.int32], rows: Rows, names: Sequence[bytes] = ()) -> list[int]:
        """The step has run, its positions are valid, and `names` are those of the blocks that it has filled, in the
        order of rows and positions. Returns the indices of rows that have filled a block."""
        # Again: who has copied a part-filled block since `begin` has read what is no longer there.
        self._written(table_rows, rows)
        filled = self.table.commit(table_rows, rows.starts, rows.counts)
        if names:
            size, coming = self.block_size, iter(names)
            for i in filled:
                start, row = int(rows.starts[i]), int(table_rows[i])
                for index in range(start // size, (start + int(rows.counts[i])) // size):
                    self._seal(row, index, next(coming))
        return filled

    def fills(self, rows: Rows) -> int:
        """How many blocks these rows fill."""
        size = self.block_size
        return int(((rows.starts + rows.counts) // size - rows.starts // size).sum())

    def resume(self, pipeline: PipelineId, rid: int, names: Sequence[bytes], tail: int) -> bool:
        """A request goes on behind these full blocks, and behind `tail` positions of an open one that it has here. What
        else it had is void. False: something of that is not here."""
        blocks = [self._named.get(name) for name in names]
        row = self.own[pipeline].get(rid)
        valid = len(names) * self.block_size + tail
        if tail:
            had = () if row is None else self.table.blocks(row)
            last = had[len(names)] if len(had) > len(names) else None
            if row is None or last is None or last in self._names or self.table.valid(row) < valid:
                return False
            blocks.append(last)
        found = [block for block in blocks if block is not None]
        if len(found) < len(blocks) or (row is None and not self._make_row()):
            return False
        if row is None:
            row = self.own[pipeline][rid] = self._new_row()
        self._set_row(row, found, valid)
        return True

    def serves(self, key: Key) -> bool:
        return key[1] in self.own[key[0]]

    def tokens(self, key: Key) -> int:
        """Valid positions of a served request; 0 for one that is not."""
        row = self.own[key[0]].get(key[1])
        return self.table.valid(row) if row is not None else 0

    def has(self, name: bytes) -> bool:
        """Whether a block of that name is here, whoever has it."""
        return name in self._named

    def name_of(self, block: int) -> bytes:
        """Its name, b"" if it has none."""
        return self._names.get(block, b"")

    def names_of(self, row: int) -> list[bytes]:
        """Names of the row's blocks, b"" for one that has none."""
        return [self._names.get(block, b"") for block in self.table.blocks(row)]

    def release(self, key: Key) -> None:
        """The request has ended or makes room: what is named of it is kept."""
        row = self.own[key[0]].pop(key[1], None)
        if row is not None:
            self._keep(key[0], self._give_row_back(row))

    def drop(self, key: Key) -> None:
        """Nothing counts that is here of the request."""
        row = self.own[key[0]].pop(key[1], None)
        if row is not None:
            self._drop_all(self._give_row_back(row))

    def release_pipeline(self, pipeline: PipelineId, keep: Iterable[int] = ()) -> None:
        """Release everything served for `pipeline` but the requests to keep."""
        kept = set(keep)
        for rid in [rid for rid in self.own[pipeline] if rid not in kept]:
            self.release((pipeline, rid))

    def evict(self, pipeline: PipelineId, names: Iterable[bytes]) -> None:
        """The scheduler has no use for these any more."""
        kept = self.kept[pipeline]
        for name in names:
            block = kept.pop(name, None)
            if block is not None:
                self._drop(block)

    def leave(self, pipeline: PipelineId, demote: bool) -> None:
        """Another node serves the stage now. `demote`: what is here becomes its copies.

        Nothing is read: what has no checksum is given back. It was never copied out, so that the other node does not
        count on it."""
        for rid, row in list(self.own.pop(pipeline, {}).items()):
            tokens = self._covered(row) if demote and (pipeline, rid) not in self.replicas else 0
            if tokens == 0:
                self._drop_all(self._give_row_back(row))
                continue
            self._drop_all(self.table.truncate(row, -(-tokens // self.block_size)))
            self.table.set_valid(row, tokens)
            self.replicas[(pipeline, rid)] = row
        for name, block in self.kept.pop(pipeline, {}).items():
            if demote and self.checksums.of(block) is not None and name not in self.spare:
                self.spare[name] = block, pipeline
            else:
                self._drop(block)

    # ------------------------------------------------------------------ after a change of fence

    def take_up(self, pipeline: PipelineId, rid: int, names: Sequence[bytes]) -> int:
        """Take into service what is here of a request: its full blocks `names`, whoever has them, and the open one
        behind them that it has had here, or its copy. Returns how many positions that are.

        What it has had here under other names was computed where other things decided the bits."""
        row = self.own[pipeline].get(rid)
        if row is None and (pipeline, rid) in self.replicas:
            row = self.own[pipeline][rid] = self.replicas.pop((pipeline, rid))
        blocks = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            blocks.append(block)
        tokens = len(blocks) * self.block_size
        had = () if row is None else self.table.blocks(row)
        valid = 0 if row is None else self.table.valid(row)
        if valid // self.block_size == len(blocks) < len(had) and had[len(blocks)] not in self._names:
            tokens = valid
            blocks.append(had[len(blocks)])
        if row is None and (not blocks or not self._make_row()):
            return 0
        if row is None:
            row = self.own[pipeline][rid] = self._new_row()
        self._set_row(row, blocks, tokens)
        return tokens

    def settle(self, pipeline: PipelineId, rids: Iterable[int]) -> None:
        """No request of the pipeline is alive but these. What is named of the others is kept, copies included."""
        self.release_pipeline(pipeline, keep=rids)
        for key in [key for key in self.replicas if key[0] == pipeline]:
            self._keep(pipeline, self._give_row_back(self.replicas.pop(key)))

    def keeps(self, pipeline: PipelineId) -> list[bytes]:
        """Names of all that is kept of a pipeline that is served here from now on, least recently used first."""
        for name, (block, owner) in list(self.spare.items()):
            if owner == pipeline:
                del self.spare[name]
                self._keep(pipeline, [block])
        return list(self.kept[pipeline])

    # ------------------------------------------------------------------ copies for others

    def replica_block(self, key: Key, index: int, tokens: int) -> int | None:
        """The block to write copy `index` of a request into, `tokens` being valid once it is written.

        None when it makes no sense, would leave a gap or there is no room: served KV is never evicted for a
        copy, nor is another request's copy, since each of them is somebody's only one.
        """
        row = self._replica_row(key, index, tokens)
        if row is None or (index == self.table.num_blocks(row) and not self._room_for_copy()):
            self._forget_empty(key)
            return None
        if index == self.table.num_blocks(row):
            self.table.extend(row, [self._free.pop()])
        elif self.table.block(row, index) in self._names:  # others may have it, and it does not change
            if not self._room_for_copy():
                return None
            self._replace(row, index, self._free.pop())
        return self.table.block(row, index)

    def replica_written(self, key: Key, index: int, tokens: int, checksum: int, name: bytes = b"") -> None:
        """The block of `replica_block` is written, or will be before anybody looks. `name`: of a full block."""
        row, size = self.replicas[key], self.block_size
        block = self.table.block(row, index)
        self.checksums.arrived(block, checksum, tokens - index * size, size)
        self.table.set_valid(row, tokens)
        self.replicas.move_to_end(key)
        if name and name not in self._named:
            self._named[name], self._names[block] = block, name

    def share_with_replica(self, key: Key, index: int, tokens: int, name: bytes, checksum: int) -> bool:
        """Copy `index` of a request is the block of this name, if that is here. False: it is not, or makes no sense."""
        block = self._named.get(name)
        if block is None or tokens != (index + 1) * self.block_size:
            return False
        known = self.checksums.of(block)
        if known is not None and known != checksum:
            return False
        row = self._replica_row(key, index, tokens)
        if row is None:
            return False
        self._add(block)
        if index == self.table.num_blocks(row):
            self.table.extend(row, [block])
        else:
            self._replace(row, index, block)
        if known is None:
            self.checksums.copied(block, checksum, self.block_size, self.block_size)
        self.table.set_valid(row, tokens)
        self.replicas.move_to_end(key)
        return True

    def spare_block(self, pipeline: PipelineId, name: bytes, checksum: int) -> int | None:
        """The block to write a copy of what `pipeline` keeps into; None: it is here already, or there is no room."""
        if name in self._named or not self._free:
            return None
        block = self._free.pop()
        self._named[name], self._names[block] = block, name
        self.spare[name] = block, pipeline
        self.checksums.arrived(block, checksum, self.block_size, self.block_size)
        return block

    def replica_tokens(self, key: Key) -> int:
        """Valid positions of a copy; 0 without one."""
        row = self.replicas.get(key)
        return self.table.valid(row) if row is not None else 0

    def drop_replica(self, key: Key, keep: bool = True) -> None:
        """The request has ended: what is named of its copy is spare, if that is to be kept."""
        row = self.replicas.pop(key, None)
        if row is None:
            return
        for block in reversed(self._give_row_back(row)):
            name = self._names.get(block)
            if name is None or name in self.spare or not keep:
                self._drop(block)
            else:
                self.spare[name] = block, key[0]

    def drop_replicas(self, pipeline: PipelineId) -> None:
        """Nobody copies this pipeline's KV to us any more."""
        for key in [k for k in self.replicas if k[0] == pipeline]:
            self._drop_all(self._give_row_back(self.replicas.pop(key)))
        self.evict_spare([name for name, (_, owner) in self.spare.items() if owner == pipeline])

    def evict_spare(self, names: Iterable[bytes]) -> None:
        """Their original is kept no longer."""
        for name in names:
            block, _ = self.spare.pop(name, (None, None))
            if block is not None:
                self._drop(block)

    # ------------------------------------------------------------------ checking

    def straddled(self, pipeline: PipelineId, rows: Rows) -> list[Check]:
        """What has to be looked at before `begin` for these rows: open blocks whose beginning they keep."""
        if not self.checksums.unverified:
            return []
        size, table_rows = self.block_size, lookup(self.own[pipeline], rows.rids)[0].tolist()
        blocks = [
            self.table.block(row, start // size)
            for row, start in zip(table_rows, rows.starts.tolist(), strict=True)
            if row >= 0 and start % size and self.table.num_blocks(row) > start // size
        ]
        return self.checksums.checks(blocks)

    def unverified(self, table_rows: Iterable[int]) -> list[Check]:
        """What has to be looked at before anything that is computed with these rows leaves the node."""
        if not self.checksums.unverified:
            return []
        return self.checksums.checks(chain.from_iterable(map(self.table.blocks, table_rows)))

    def looked_at(self, checks: Sequence[Check], sums: npt.NDArray[np.uint32]) -> set[int]:
        """What the blocks of `checks` have. Returns served rows of which one is not as it ought to be: from it on,
        their positions are no longer valid."""
        return self.damaged(self.checksums.looked_at(checks, sums))

    def damaged(self, blocks: Sequence[int]) -> set[int]:
        """These have changed in memory: nobody finds them any more, and whoever has one has nothing from there on."""
        if not blocks:
            return set()
        bad, found = set(blocks), set()
        for block in bad:
            name = self._names.pop(block, None)
            if name is not None:
                del self._named[name]
                self.gone.append(name)
                for kept in self.kept.values():
                    if kept.pop(name, None) is not None:
                        self._drop(block)
                self.evict_spare([name])
        own = {row for held in self.own.values() for row in held.values()}
        for row in (*own, *self.replicas.values()):
            for index, block in enumerate(self.table.blocks(row)):
                if block in bad:
                    self.table.set_valid(row, min(self.table.valid(row), index * self.block_size))
                    if row in own:
                        found.add(row)
                    break
        for key, row in list(self.replicas.items()):
            if bad.intersection(self.table.blocks(row)):  # its source is told, and sends it again
                del self.replicas[key]
                self.evicted.append(key)
                self._drop_all(self._give_row_back(row))
        return found

    def copied(self, block: int, checksum: int, tokens: int) -> bool:
        """The block was read to be copied, with so many valid positions. False: it is not as it was when it was read
        before, and no longer valid."""
        if self.checksums.copied(block, checksum, tokens, self.block_size):
            return True
        self.damaged([block])
        return False

    def verified_tokens(self, key: Key) -> int:
        """Valid positions of a served request that may be copied to others: nobody hands on what may be damaged."""
        row = self.own[key[0]].get(key[1])
        if row is None:
            return 0
        valid = self.table.valid(row)
        if self.checksums.unverified:
            for index, block in enumerate(self.table.blocks(row)):
                if block in self.checksums.unverified:
                    return min(valid, index * self.block_size)
        return valid

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
        """Blocks that are only others' copies."""
        return len(self._only_of(self.replicas.values(), [block for block, _ in self.spare.values()]))

    @property
    def blocks_kept(self) -> int:
        """Blocks that no request has now, kept for those to come."""
        return len(self._only_of((), chain.from_iterable(kept.values() for kept in self.kept.values())))

    def check(self) -> None:
        """Every block is free or has as many holders as are counted. Raises AssertionError (tests, sampled in
        production)."""
        holders = Counter(block for block, _ in self.spare.values())
        for kept in self.kept.values():
            holders.update(kept.values())
        own = [row for held in self.own.values() for row in held.values()]
        for row in (*own, *self.replicas.values()):
            blocks = self.table.blocks(row)
            holders.update(blocks)
            assert len(set(blocks)) == len(blocks), "a request has a block twice"
            assert self.table.valid(row) <= len(blocks) * self.block_size, "tokens without blocks"
        assert not holders.keys() & set(self._free), "a block is free and somebody's"
        assert sorted([*holders, *self._free]) == list(range(self.num_blocks)), "a block is lost"
        assert {b: n - 1 for b, n in holders.items() if n > 1} == self._more, "holders are miscounted"
        assert {name: block for block, name in self._names.items()} == self._named
        for keeps in (*self.kept.values(), {name: block for name, (block, _) in self.spare.items()}):
            assert keeps.items() <= self._named.items(), "what is kept is not what its name says"
        assert self._names.keys() <= holders.keys(), "a free block has a name"
        assert self.checksums.unverified.keys() <= holders.keys(), "a free block waits to be looked at"

    # ------------------------------------------------------------------ rows

    def _new_row(self) -> int:
        self._rows_left -= 1
        return self.table.new_row()

    def _give_row_back(self, row: int) -> list[int]:
        """Its blocks, which still count it as a holder."""
        self._rows_left += 1
        blocks: list[int] = self.table.free_row(row)
        return blocks

    def _set_row(self, row: int, blocks: Sequence[int], valid: int) -> None:
        """The row has these blocks, which are here and in service from now on, and no others."""
        for block in blocks:
            self._add(block)
            self.checksums.in_service(block)
        self._drop_all(self.table.truncate(row, 0))
        self.table.extend(row, blocks)
        self.table.set_valid(row, valid)

    def _replace(self, row: int, index: int, block: int) -> None:
        before = self.table.block(row, index)
        self.table.set_block(row, index, block)
        self._drop(before)

    def _replica_row(self, key: Key, index: int, tokens: int) -> int | None:
        """The row of a copy that is to have `tokens` once its block `index` is there."""
        if self.serves(key) or not 0 <= index < self.table.max_blocks_per_row:
            return None
        if not 0 < tokens - index * self.block_size <= self.block_size:
            return None
        row = self.replicas.get(key)
        if row is None:
            if index != 0 or self._rows_left == 0:
                return None
            row = self.replicas[key] = self._new_row()
        full = self.table.valid(row) // self.block_size
        return None if index > full or index > self.table.num_blocks(row) else row

    def _forget_empty(self, key: Key) -> None:
        row = self.replicas.get(key)
        if row is not None and self.table.num_blocks(row) == 0:
            del self.replicas[key]
            self._give_row_back(row)

    # ------------------------------------------------------------------ blocks

    def _seal(self, row: int, index: int, name: bytes) -> None:
        """The block is full. If that content is here already, the row has that block from now on; unless it is a copy
        that nobody has looked at, which is no better than what was just computed."""
        block = self.table.block(row, index)
        other = self._named.get(name)
        if other is None or (other != block and self.checksums.is_copy(other)):
            if other is not None:
                self._supersede(name, other, block)
            self._named[name], self._names[block] = block, name
        elif other != block:
            self._add(other)
            self._replace(row, index, other)

    def _supersede(self, name: bytes, other: int, block: int) -> None:
        """Who keeps `name` keeps `block` from now on; rows that have `other` have it still."""
        del self._names[other]
        for kept in self.kept.values():
            if name in kept:
                kept[name] = block
                self._add(block)
                self._drop(other)
        if name in self.spare:
            self.spare[name] = block, self.spare[name][1]
            self._add(block)
            self._drop(other)

    def _written(self, table_rows: npt.NDArray[np.int32], rows: Rows) -> None:
        """A step writes to these rows: the checksum of an open block that it goes on in is over."""
        if not self.checksums.part_filled:
            return
        for row, start in zip(table_rows.tolist(), rows.starts.tolist(), strict=True):
            self.checksums.written(self.table.block(row, start // self.block_size))

    def _covered(self, row: int) -> int:
        """Valid positions of the row, from 0 on, that have checksums."""
        size, valid, tokens = self.block_size, self.table.valid(row), 0
        for block in self.table.blocks(row):
            covered = self.checksums.tokens(block, size)
            tokens += covered
            if covered < size:
                break
        return min(tokens, valid)

    def _keep(self, pipeline: PipelineId, blocks: Sequence[int]) -> None:
        """No row has these any more: what is named of them is kept, the last one as the first to go."""
        kept = self.kept[pipeline]
        for block in reversed(blocks):
            name = self._names.get(block)
            if name is None or name in kept:
                self._drop(block)
            else:
                kept[name] = block

    def _add(self, block: int) -> None:
        self._more[block] = self._more.get(block, 0) + 1

    def _drop(self, block: int) -> None:
        """One holder less."""
        more = self._more.get(block, 0)
        if more > 1:
            self._more[block] = more - 1
        elif more:
            del self._more[block]
        else:
            name = self._names.pop(block, None)
            if name is not None:
                del self._named[name]
                self.gone.append(name)
            self.checksums.written(block)
            self._free.append(block)

    def _drop_all(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._drop(block)

    # ------------------------------------------------------------------ room

    def _make_row(self) -> bool:
        while self._rows_left == 0 and (self.replicas or self._evictable()):
            self._evict()
        return self._rows_left > 0

    def _make_room(self, blocks: int) -> bool:
        """Free that many blocks more; nothing is evicted if that would not do."""
        goal = len(self._free) + blocks
        idle = [self.own[pipeline][rid] for pipeline, rid in self._evictable()]
        kept = chain.from_iterable(self.kept[pipeline].values() for pipeline in self.idle)
        spare = [block for block, _ in self.spare.values()]
        self.missing = max(0, blocks - len(self._only_of([*self.replicas.values(), *idle], [*kept, *spare])))
        if self.missing:
            return False
        while len(self._free) < goal:
            self._evict()
        return True

    def _room_for_copy(self) -> bool:
        """A copy of a running request goes before what belongs to none."""
        while not self._free and self.spare:
            self._evict()
        return bool(self._free)

    def _only_of(self, rows: Iterable[int], blocks: Iterable[int]) -> set[int]:
        """Blocks that have no holder but these rows and these."""
        holders = Counter(blocks)
        for row in rows:
            holders.update(self.table.blocks(row))
        return {block for block, count in holders.items() if count == 1 + self._more.get(block, 0)}

    def _evictable(self) -> list[Key]:
        """Served, but of pipelines that are down: nobody waits for it, and it can be computed again. Oldest first."""
        return [(pipeline, rid) for pipeline in sorted(self.idle) for rid in self.own.get(pipeline, ())]

    def _evict(self) -> None:
        """What is spare; then the copy least recently written; then what is kept, and then the youngest request, of a
        pipeline that is down."""
        if self.spare:
            self.evict_spare([next(iter(self.spare))])
        elif self.replicas:
            key, row = self.replicas.popitem(last=False)
            self.replicas_evicted += 1
            self.evicted.append(key)
            self._drop_all(self._give_row_back(row))
        elif idle := [pipeline for pipeline in sorted(self.idle) if self.kept.get(pipeline)]:
            self.evict(idle[0], [next(iter(self.kept[idle[0]]))])
        else:
            pipeline, rid = self._evictable()[-1]
            self._drop_all(self._give_row_back(self.own[pipeline].pop(rid)))
