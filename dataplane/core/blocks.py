"""Which KV block belongs to whom on one node: own, borrowed, cached and copied blocks share one pool and one layout.

A full block has a name, and whoever needs that content has this very block (pool.py): requests of one or of several
pipelines that begin alike, copies for others (copies.py), and what is kept for requests to come. To take a copy into
service changes tables; no byte is read or copied. What is kept of a pipeline that is served here its scheduler decides.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt

from controlplane.contract.ids import PipelineId
from dataplane._fast.blocktable import BlockTable, Rows, lookup
from dataplane.core.checksums import Check
from dataplane.core.copies import Copies, Key
from dataplane.core.pool import Pool


class KvStore:
    """How many positions of a request are valid, from 0 on, is in the block table with its blocks."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_blocks_per_row: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.table = BlockTable(max_rows, max_blocks_per_row, block_size)
        self.pool = Pool(num_blocks)
        self.checksums = self.pool.checksums
        self.copies = Copies(self.table, self.pool)
        # Served: rid -> row of the table.
        self.own: defaultdict[PipelineId, dict[int, int]] = defaultdict(dict)
        # Served, and of no request now, by name: until the scheduler evicts it.
        self.kept: defaultdict[PipelineId, OrderedDict[bytes, int]] = defaultdict(OrderedDict)
        # Pipelines that are down: what is served of them makes room, too.
        self.idle: frozenset[PipelineId] = frozenset()
        self.lost: list[tuple[PipelineId, bytes]] = []  # of what is kept, damaged: schedulers do not know yet
        # Blocks that the last `resume`, or `begin` that found no room, would have needed more.
        self.missing = 0

    # ------------------------------------------------------------------ steps

    def resume(self, pipeline: PipelineId, rid: int, names: Sequence[bytes], tail: int) -> bool:
        """A request goes on behind these full blocks, and behind `tail` positions of the next one that it has here.
        That one may be full, and others may have it: the positions are computed again, with the same bits. What else
        the request had is void. False: something of that is not here (`missing` is 0), or nothing is free.
        """
        self.missing = 0
        blocks = [self.pool.find(name) for name in names]
        row = self.own[pipeline].get(rid)
        valid = len(names) * self.block_size + tail
        if tail:
            if row is None or self.table.valid(row) < valid:
                return False
            blocks.append(self.table.block(row, len(names)))
        found = [block for block in blocks if block is not None]
        if len(found) < len(blocks):
            return False
        if row is None and not self._make_row():
            self.missing = 1  # those of any request that ends would do: its row goes with them
            return False
        if row is None:
            row = self.own[pipeline][rid] = self.table.new_row()
        self._set_row(row, found, valid)
        return True

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
            table_rows[index] = held[int(rows.rids[index])] = self.table.new_row()
        missing = self.table.grow(table_rows, rows.starts, rows.counts, self.pool.free)
        if missing:
            if not self._make_room(missing):
                return None
            self.table.grow(table_rows, rows.starts, rows.counts, self.pool.free)
        self._written(table_rows, rows)
        return table_rows

    def commit(self, table_rows: npt.NDArray[np.int32], rows: Rows, names: Sequence[bytes] = ()) -> list[int]:
        """The step has run, its positions but for drafts are valid, and `names` are those of the blocks that it has
        filled, in the order of rows and positions. Returns the indices of rows that have filled a block."""
        # Again: who has copied a part-filled block since `begin` has read what is no longer there.
        self._written(table_rows, rows)
        before = self.table.valid_of(table_rows) if names else ()
        filled = self.table.commit(table_rows, rows.starts, rows.counts, rows.drafts)
        if names:
            size, coming = self.block_size, iter(names)
            for i in filled:
                row = int(table_rows[i])
                for index in range(int(before[i]) // size, self.table.valid(row) // size):
                    self._seal(row, index, next(coming))
        return filled

    def fills(self, table_rows: npt.NDArray[np.int32], rows: Rows) -> int:
        """How many blocks these rows, which have begun, fill with what their commit makes valid."""
        before, after = self.table.valid_of(table_rows), rows.starts + rows.counts - rows.drafts
        return int((after // self.block_size - before // self.block_size).sum())

    def release(self, key: Key) -> None:
        """The request has ended or makes room: what is named of it is kept."""
        row = self.own[key[0]].pop(key[1], None)
        if row is not None:
            self._keep(key[0], self.table.free_row(row))

    def drop(self, key: Key) -> None:
        """Nothing counts that is here of the request."""
        row = self.own[key[0]].pop(key[1], None)
        if row is not None:
            self.pool.drop_all(self.table.free_row(row))

    def evict(self, pipeline: PipelineId, names: Iterable[bytes]) -> None:
        """The scheduler has no use for these any more."""
        kept = self.kept[pipeline]
        for name in names:
            block = kept.pop(name, None)
            if block is not None:
                self.pool.drop(block)

    # ------------------------------------------------------------------ changes of duty

    def take_up(self, pipeline: PipelineId, rid: int, names: Sequence[bytes]) -> int:
        """Take into service what is here of a request: its full blocks `names`, whoever has them, and the next one that
        it has had here behind these very blocks, or its copy. Returns how many positions that are.

        The next one may be full: whoever had the request before knew more of its tokens. What it has had here under
        other names was computed where other things decided the bits."""
        row = self.own[pipeline].get(rid)
        if row is None and (row := self.copies.take_row((pipeline, rid))) is not None:
            self.own[pipeline][rid] = row
        blocks = []
        for name in names:
            block = self.pool.find(name)
            if block is None:
                break
            blocks.append(block)
        tokens = len(blocks) * self.block_size
        had = () if row is None else self.table.blocks(row)
        valid = 0 if row is None else self.table.valid(row)
        # One that is not full has no name and is known by those before it. Without any nothing says under which
        # numerics and salt it was computed: at most a block is computed again.
        if blocks and valid > tokens and list(had[: len(blocks)]) == blocks:
            last = had[len(blocks)]
            full = valid >= tokens + self.block_size or bool(self.pool.name_of(last))
            # Of a full one these names do not say whether it is what follows them, unless it comes behind the last.
            if not full or len(blocks) == len(names):
                blocks.append(last)
                tokens = min(valid, tokens + self.block_size)
        if row is None and (not blocks or not self._make_row()):
            return 0
        if row is None:
            row = self.own[pipeline][rid] = self.table.new_row()
        self._set_row(row, blocks, tokens)
        return tokens

    def settle(self, pipeline: PipelineId, rids: Iterable[int]) -> None:
        """No request of the pipeline is alive but these. What is named of the others is kept, copies included."""
        alive = set(rids)
        for rid in [rid for rid in self.own[pipeline] if rid not in alive]:
            self.release((pipeline, rid))
        for blocks in self.copies.take(pipeline):
            self._keep(pipeline, blocks)

    def keeps(self, pipeline: PipelineId) -> list[bytes]:
        """Names of all that is kept of a pipeline that is served here from now on, least recently used first."""
        for blocks in self.copies.take_spare(pipeline):
            self._keep(pipeline, blocks)
        return list(self.kept[pipeline])

    def leave(self, pipeline: PipelineId, demote: bool) -> None:
        """Another node serves the stage now. `demote`: what is here becomes its copies.

        Nothing is read: what has no checksum is given back. It was never copied out, so that the other node does not
        count on it."""
        copies = self.copies
        for rid, row in self.own.pop(pipeline, {}).items():
            tokens = self._covered(row) if demote and (pipeline, rid) not in copies.rows else 0
            if tokens == 0:
                self.pool.drop_all(self.table.free_row(row))
                continue
            self.pool.drop_all(self.table.truncate(row, -(-tokens // self.block_size)))
            self.table.set_valid(row, tokens)
            copies.give_row((pipeline, rid), row)
        for name, block in self.kept.pop(pipeline, {}).items():
            demoted = demote and self.checksums.of(block) is not None
            if demoted and name not in copies.spare:
                copies.give_spare(pipeline, name, block)
                continue
            if demoted:
                copies.keep_spare(pipeline, name)
            self.pool.drop(block)

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

    def copied(self, block: int, checksum: int, tokens: int) -> bool:
        """The block was read to be copied, with so many valid positions. False: it is not as it was when it was read
        before, and no longer valid."""
        if self.checksums.copied(block, checksum, tokens, self.block_size):
            return True
        self.damaged([block])
        return False

    def damaged(self, blocks: Sequence[int]) -> set[int]:
        """These have changed in memory: nobody finds them any more, and whoever has one has nothing from there on."""
        bad, found = set(blocks), set()
        for block in bad:
            name = self.pool.forget(block)
            for pipeline, kept in self.kept.items() if name else ():
                if kept.pop(name, None) is not None:
                    self.lost.append((pipeline, name))
                    self.pool.drop(block)
        if bad:
            self.copies.damaged(bad)
            for row in chain.from_iterable(held.values() for held in self.own.values()):
                at = next((i for i, block in enumerate(self.table.blocks(row)) if block in bad), None)
                if at is not None:
                    self.table.set_valid(row, min(self.table.valid(row), at * self.block_size))
                    found.add(row)
        return found

    # ------------------------------------------------------------------ counting

    def serves(self, key: Key) -> bool:
        return key[1] in self.own[key[0]]

    def tokens(self, key: Key) -> int:
        """Valid positions of a served request; 0 for one that is not."""
        row = self.own[key[0]].get(key[1])
        return self.table.valid(row) if row is not None else 0

    def verified_tokens(self, key: Key) -> int:
        """Valid positions of a served request that may be copied to others: nobody hands on what may be damaged."""
        row = self.own[key[0]].get(key[1])
        if row is None:
            return 0
        valid: int = self.table.valid(row)
        if self.checksums.unverified:
            for index, block in enumerate(self.table.blocks(row)):
                if block in self.checksums.unverified:
                    return min(valid, index * self.block_size)
        return valid

    def names_of(self, row: int) -> list[bytes]:
        """Names of the row's blocks, b"" for one that has none."""
        return [self.pool.name_of(block) for block in self.table.blocks(row)]

    @property
    def checksum_failures(self) -> int:
        """Blocks here that were found to have changed."""
        return self.checksums.failures

    @property
    def blocks_free(self) -> int:
        return len(self.pool.free)

    @property
    def blocks_for_copies(self) -> int:
        """Blocks that copies of running requests could have; too many where a request has a spare one, too."""
        return self.blocks_free + len(self.copies.spare)

    @property
    def blocks_used(self) -> int:
        """Blocks of requests that are served here."""
        return len(self._blocks_of(chain.from_iterable(held.values() for held in self.own.values())))

    @property
    def blocks_replica(self) -> int:
        """Blocks of copies of requests that are served elsewhere, and of none that is served here."""
        served = self._blocks_of(chain.from_iterable(held.values() for held in self.own.values()))
        return len(self._blocks_of(self.copies.rows.values()) - served)

    @property
    def blocks_kept(self) -> int:
        """Blocks that no request has now, kept for those to come, or copies of such."""
        served = self._blocks_of(chain.from_iterable(held.values() for held in self.own.values()))
        return self.num_blocks - self.blocks_free - len(served | self._blocks_of(self.copies.rows.values()))

    def check(self) -> None:
        """Every block is free or has as many holders as are counted. Raises AssertionError (tests, sampled in
        production)."""
        holders, copies = self.copies.holders(), self.copies.holders()
        rows = [*chain.from_iterable(held.values() for held in self.own.values()), *self.copies.rows.values()]
        for row in rows:
            blocks = self.table.blocks(row)
            assert len(set(blocks)) == len(blocks), "a request has a block twice"
            assert self.table.valid(row) <= len(blocks) * self.block_size, "tokens without blocks"
        for row in chain.from_iterable(held.values() for held in self.own.values()):
            holders.update(self.table.blocks(row))
        for kept in self.kept.values():
            holders.update(kept.values())
        self.pool.check(holders, copies)
        assert self.table.rows_in_use == len(rows), "a row is lost"
        spare = [(name, block) for name, (block, _) in self.copies.spare.items()]
        for name, block in (*spare, *chain.from_iterable(kept.items() for kept in self.kept.values())):
            assert self.pool.find(name) == block, "what is kept is not what its name says"

    def _blocks_of(self, rows: Iterable[int]) -> set[int]:
        return set(chain.from_iterable(map(self.table.blocks, rows)))

    # ------------------------------------------------------------------ rows

    def _set_row(self, row: int, blocks: Sequence[int], valid: int) -> None:
        """The row has these blocks, which are here and in service from now on, and no others."""
        for block in blocks:
            self.pool.add(block)
            self.checksums.in_service(block)
        self.pool.drop_all(self.table.truncate(row, 0))
        self.table.extend(row, blocks)
        self.table.set_valid(row, valid)

    def _seal(self, row: int, index: int, name: bytes) -> None:
        """The block is full. If that content is here already, the row has that block from now on; unless it is a copy
        that nobody has looked at, which is no better than what was just computed."""
        block = self.table.block(row, index)
        other = self.pool.find(name)
        if other is None:
            self.pool.call(block, name)
        elif other != block and not self.checksums.is_copy(other):
            self.pool.add(other)
            self.table.set_block(row, index, other)
            self.pool.drop(block)
        elif other != block:
            self.pool.call(block, name)  # rows that have the other one have it still
            for kept in self.kept.values():
                if name in kept:
                    kept[name] = block
                    self.pool.add(block)
                    self.pool.drop(other)
            self.copies.superseded(name, block)

    def _written(self, table_rows: npt.NDArray[np.int32], rows: Rows) -> None:
        """A step writes to these rows: the checksum of an open block that it goes on in is over."""
        if not self.checksums.part_filled:
            return
        size, valid = self.block_size, self.table.valid_of(table_rows).tolist()
        for row, first, start in zip(table_rows.tolist(), valid, rows.starts.tolist(), strict=True):
            for index in range(first // size, start // size + 1):  # more than one where drafts become valid
                self.checksums.written(self.table.block(row, index))

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
        """No row has these any more: what is named of them is kept, the last one as the first to go.

        In the place of one whose name another block got meanwhile that one is kept: the scheduler counts on it."""
        kept = self.kept[pipeline]
        for block in reversed(blocks):
            name, former = self.pool.name_of(block), self.pool.former_name_of(block)
            if name and name not in kept:
                kept[name] = block
                continue
            if former and former not in kept:
                other = self.pool.find(former)
                if other is None:
                    self.lost.append((pipeline, former))
                else:
                    self.pool.add(other)
                    kept[former] = other
            self.pool.drop(block)

    # ------------------------------------------------------------------ room

    def room(self, needed: Container[bytes], enough: int | None = None) -> int:
        """How many blocks could be free for KV of running requests, see `make_room`; not counted any further once that
        is `enough`."""
        return self._plan(needed, self.num_blocks if enough is None else enough)[0]

    def make_room(self, blocks: int, needed: Container[bytes]) -> None:
        """Have so many blocks free for KV of running requests, if that can be done without what is served of
        pipelines that are up, and without blocks of the names `needed`."""
        for give_back in self._plan(needed, blocks)[1]:
            give_back()

    def _plan(self, needed: Container[bytes], enough: int) -> tuple[int, list[Callable[[], object]]]:
        """How many blocks are free once this is given back. It looks at no more than that takes: a pool is large, most
        of it makes room, and this is asked for with every turn while blocks are restored."""
        free, plan, counts = self.blocks_free, list[Callable[[], object]](), Counter[int]()
        spared = self._spared(needed)
        while free < enough and (found := next(spared, None)) is not None:
            blocks, give_back = found
            plan.append(give_back)
            counts.update(blocks)
            free += sum(counts[block] == self.pool.holders(block) for block in blocks)
        return free, plan

    def _spared(self, needed: Container[bytes]) -> Iterator[tuple[Sequence[int], Callable[[], object]]]:
        """What makes room, in that order: blocks of copies and of pipelines that are down, and what gives them back.
        Nothing may change meanwhile."""
        copies = self.copies
        for name, (block, _) in copies.spare.items():
            if name not in needed:
                yield (block,), partial(copies.evict_spare, (name,))
        for key, row in copies.rows.items():
            if not any(name in needed for name in self.names_of(row)):
                yield self.table.blocks(row), partial(copies.evict_row, key)
        for pipeline in sorted(self.idle):
            for name, block in self.kept.get(pipeline, {}).items():
                if name not in needed:
                    yield (block,), partial(self.evict, pipeline, (name,))
        for pipeline, rid in reversed(self._evictable()):
            row = self.own[pipeline][rid]
            if not any(name in needed for name in self.names_of(row)):
                yield self.table.blocks(row), partial(self.drop, (pipeline, rid))

    def _make_row(self) -> bool:
        while self.table.rows_in_use == self.table.max_rows and (self.copies.rows or self._evictable()):
            self._evict()
        return bool(self.table.rows_in_use < self.table.max_rows)

    def _make_room(self, blocks: int) -> bool:
        """Free that many blocks more. If that cannot be done no request loses anything for it, nor its copy."""
        goal = self.blocks_free + blocks
        # Nearly always enough: spare blocks fill what is free.
        while self.copies.spare and self.blocks_free < goal:
            self.copies.evict()
        if self.blocks_free >= goal:
            return True
        holders = self.copies.holders()
        for pipeline, rid in self._evictable():
            holders.update(self.table.blocks(self.own[pipeline][rid]))
        for pipeline in self.idle:
            holders.update(self.kept[pipeline].values())
        self.missing = max(0, goal - self.blocks_free - len(self.pool.only(holders)))
        while not self.missing and self.blocks_free < goal:
            self._evict()
        return not self.missing

    def _evictable(self) -> list[Key]:
        """Served, but of pipelines that are down: nobody waits for it, and it can be computed again. Oldest first."""
        return [(pipeline, rid) for pipeline in sorted(self.idle) for rid in self.own.get(pipeline, ())]

    def _evict(self) -> None:
        """Copies; then what is kept, and then the youngest request, of a pipeline that is down."""
        if self.copies.evict():
            return
        kept = next((self.kept[pipeline] for pipeline in sorted(self.idle) if self.kept[pipeline]), None)
        if kept is not None:
            self.pool.drop(kept.popitem(last=False)[1])
        else:
            self.drop(self._evictable()[-1])
