"""Copies of others' KV on one node: of requests that run elsewhere, and of what is kept there for requests to come.

They take what room there is and give it back when served KV needs it: first what belongs to no request any more, then
requests' copies, least recently written first. A copy's source learns of that (`evicted`)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from controlplane.contract.ids import PipelineId
from dataplane._fast.blocktable import BlockTable
from dataplane.core.pool import Pool

Key = tuple[PipelineId, int]  # pipeline, rid


class Copies:
    """`table`, `pool`: the node's, shared with what it serves."""

    def __init__(self, table: BlockTable, pool: Pool) -> None:
        self.rows: OrderedDict[Key, int] = OrderedDict()  # of requests, in the block table
        self.spare: OrderedDict[bytes, tuple[int, PipelineId]] = OrderedDict()  # of what others keep, by name
        self._also: dict[bytes, dict[PipelineId, None]] = {}  # who keeps a spare one besides that pipeline
        self.evictions = 0
        self.evicted: list[Key] = []  # copies whose sources do not know yet: for the replicator to take
        self._table = table
        self._pool = pool
        self._size: int = table.block_size

    # ------------------------------------------------------------------ storing

    def place(self, key: Key, index: int, tokens: int) -> int | None:
        """The block to write copy `index` of a request into, `tokens` being valid once it is written.

        None when it makes no sense, would leave a gap or there is no room: served KV is never evicted for a
        copy, nor is another request's copy, since each of them is somebody's only one.
        """
        row = self._row(key, index, tokens)
        if row is None:
            return None
        if index < self._table.num_blocks(row):
            block: int = self._table.block(row, index)
            if not self._pool.name_of(block):
                return block
        if not self._make_room():
            if self._table.num_blocks(row) == 0:
                self._table.free_row(self.rows.pop(key))
            return None
        # One that has a name others may have, too, and it does not change.
        block = self._pool.new_copy()
        self._set(row, index, block)
        return block

    def written(self, key: Key, index: int, tokens: int, checksum: int, name: bytes = b"") -> None:
        """The block of `place` is written, or will be before anybody looks. `name`: of a full block."""
        row = self.rows[key]
        block = self._table.block(row, index)
        self._pool.checksums.arrived(block, checksum, tokens - index * self._size, self._size)
        if name and self._pool.find(name) is None:
            self._pool.call(block, name)
        self._table.set_valid(row, tokens)
        self.rows.move_to_end(key)

    def share(self, key: Key, index: int, tokens: int, name: bytes, checksum: int) -> bool:
        """Copy `index` of a request is the block of this name, if that is here. False: it is not, or makes no sense."""
        block = self._pool.find(name)
        if block is None or tokens != (index + 1) * self._size:
            return False
        known = self._pool.checksums.of(block)
        row = self._row(key, index, tokens) if known in (None, checksum) else None
        if row is None:
            return False
        if known is None:
            self._pool.checksums.copied(block, checksum, self._size, self._size)
        self._pool.add_copy(block)
        self._set(row, index, block)
        self._table.set_valid(row, tokens)
        self.rows.move_to_end(key)
        return True

    def place_spare(self, pipeline: PipelineId, name: bytes, checksum: int) -> int | None:
        """The block to write a copy of what `pipeline` keeps into; None: it is here already, or there is no room."""
        block = self._pool.find(name)
        if block is not None:
            known = self._pool.checksums.of(block)
            if known in (None, checksum):
                if known is None:
                    self._pool.checksums.copied(block, checksum, self._size, self._size)
                self.keep_spare(pipeline, name)
            return None
        if not self._pool.free:
            return None
        block = self._pool.new_copy()
        self._pool.call(block, name)
        self._pool.checksums.arrived(block, checksum, self._size, self._size)
        self.spare[name] = block, pipeline
        return block

    def keep_spare(self, pipeline: PipelineId, name: bytes) -> None:
        """The pipeline keeps this block, which is here, whoever else has it."""
        if name not in self.spare:
            block = self._pool.find(name)
            assert block is not None
            self._pool.add_copy(block)
            self.spare[name] = block, pipeline
        elif self.spare[name][1] != pipeline:
            self._also.setdefault(name, {})[pipeline] = None

    # ------------------------------------------------------------------ who has what

    def tokens(self, key: Key) -> int:
        """Valid positions of a copy; 0 without one."""
        row = self.rows.get(key)
        return self._table.valid(row) if row is not None else 0

    def of(self, pipeline: PipelineId) -> list[int]:
        """Requests of the pipeline that have a copy here."""
        return [rid for owner, rid in self.rows if owner == pipeline]

    def owners(self) -> set[PipelineId]:
        """Pipelines of which something is here."""
        also = {owner for owners in self._also.values() for owner in owners}
        return also | {owner for owner, _ in self.rows} | {owner for _, owner in self.spare.values()}

    def spare_of(self, pipeline: PipelineId) -> list[bytes]:
        """Names of what the pipeline keeps, whether others do or not."""
        also = self._also
        return [n for n, (_, owner) in self.spare.items() if owner == pipeline or pipeline in also.get(n, ())]

    def holders(self) -> Counter[int]:
        """How often each block is held here."""
        found = Counter(block for block, _ in self.spare.values())
        for row in self.rows.values():
            found.update(self._table.blocks(row))
        return found

    # ------------------------------------------------------------------ giving back

    def drop(self, key: Key, keep: bool = True) -> list[bytes]:
        """The request has ended: what is named of its copy is spare, if that is to be kept. Returns those names."""
        row = self.rows.pop(key, None)
        if row is None:
            return []
        spared = []
        for block in reversed(self._table.free_row(row)):
            name = self._pool.name_of(block)
            if not keep or not name:
                self._pool.drop_copy(block)
                continue
            spared.append(name)
            if name in self.spare:
                self.keep_spare(key[0], name)
                self._pool.drop_copy(block)
            else:
                self.spare[name] = block, key[0]
        return spared

    def drop_pipeline(self, pipeline: PipelineId) -> None:
        """Nobody copies this pipeline's KV to us any more."""
        for rid in self.of(pipeline):
            self.drop((pipeline, rid), keep=False)
        self.evict_spare(self.spare_of(pipeline), pipeline)

    def evict_spare(self, names: Iterable[bytes], pipeline: PipelineId | None = None) -> None:
        """Their original is kept no longer by this pipeline. None: whoever keeps it, it goes."""
        for name in names:
            if name in self.spare and (pipeline is None or self._leaves(pipeline, name)):
                self._also.pop(name, None)
                self._pool.drop_copy(self.spare.pop(name)[0])

    def take(self, pipeline: PipelineId) -> Iterator[list[int]]:
        """The pipeline is served here: blocks of all that there is of it, as they stand in rows, which are in service
        and count as held by who takes them."""
        for rid in self.of(pipeline):
            yield self._served(self._table.free_row(self.rows.pop((pipeline, rid))))
        yield from self.take_spare(pipeline)

    def take_spare(self, pipeline: PipelineId) -> Iterator[list[int]]:
        for name in self.spare_of(pipeline):
            block, _ = self.spare[name]
            if self._leaves(pipeline, name):
                del self.spare[name]
                yield self._served([block])
            else:  # others keep it still
                self._pool.add(block)
                self._pool.checksums.claimed(block)
                yield [block]

    def take_row(self, key: Key) -> int | None:
        """The row of a request's copy, whose blocks are in service from now on; None: there is no copy."""
        row = self.rows.pop(key, None)
        if row is not None:
            self._served(self._table.blocks(row))
        return row

    def give_row(self, key: Key, row: int) -> None:
        """A row that was served is a copy from now on."""
        for block in self._table.blocks(row):
            self._pool.rest(block)
        self.rows[key] = row

    def give_spare(self, pipeline: PipelineId, name: bytes, block: int) -> None:
        """A block that was kept is spare from now on."""
        self._pool.rest(block)
        self.spare[name] = block, pipeline

    def evict(self) -> bool:
        """What goes first. False: there is nothing."""
        if self.spare:
            self.evict_spare([next(iter(self.spare))])
        elif self.rows:
            self.evict_row(next(iter(self.rows)))
        else:
            return False
        return True

    def evict_row(self, key: Key) -> None:
        """A request's copy makes room."""
        self._give_up(key)
        self.evictions += 1

    def damaged(self, blocks: set[int]) -> None:
        """These have changed in memory. Their sources are told, and send them again."""
        self.evict_spare([name for name, (block, _) in self.spare.items() if block in blocks])
        for key, row in list(self.rows.items()):
            if not blocks.isdisjoint(self._table.blocks(row)):
                self._give_up(key)

    def superseded(self, name: bytes, block: int) -> None:
        """Another block has the content of this name from now on."""
        found = self.spare.get(name)
        if found is None:
            return
        self.spare[name] = block, found[1]
        checksum = self._pool.checksums.of(found[0])
        if self._pool.checksums.of(block) is None and checksum is not None:  # equal names, equal bytes
            self._pool.checksums.copied(block, checksum, self._size, self._size)
        self._pool.add_copy(block)
        self._pool.drop_copy(found[0])

    # ------------------------------------------------------------------

    def _leaves(self, pipeline: PipelineId, name: bytes) -> bool:
        """The pipeline keeps a spare one no longer. Returns whether it was the last one that did."""
        block, owner = self.spare[name]
        also = self._also.get(name, {})
        if pipeline != owner:
            also.pop(pipeline, None)
        elif also:
            heir = next(iter(also))
            del also[heir]
            self.spare[name] = block, heir
        else:
            return True
        if not also:
            self._also.pop(name, None)
        return False

    def _row(self, key: Key, index: int, tokens: int) -> int | None:
        """The row of a copy that is to have `tokens` once its block `index` is there."""
        if (
            not 0 <= index < self._table.max_blocks_per_row
            or not 0 < tokens - index * self._size <= self._size
        ):
            return None
        row = self.rows.get(key)
        if row is None:
            if index != 0 or self._table.rows_in_use == self._table.max_rows:
                return None
            row = self.rows[key] = self._table.new_row()
        reached = min(self._table.valid(row) // self._size, self._table.num_blocks(row))
        return row if index <= reached else None

    def _set(self, row: int, index: int, block: int) -> None:
        if index == self._table.num_blocks(row):
            self._table.extend(row, [block])
        else:
            before = self._table.block(row, index)
            self._table.set_block(row, index, block)
            self._pool.drop_copy(before)

    def _make_room(self) -> bool:
        """A copy of a running request goes before what belongs to none."""
        while not self._pool.free and self.spare:
            self.evict()
        return bool(self._pool.free)

    def _give_up(self, key: Key) -> None:
        for block in self._table.free_row(self.rows.pop(key)):
            self._pool.drop_copy(block)
        self.evicted.append(key)

    def _served(self, blocks: list[int]) -> list[int]:
        for block in blocks:
            self._pool.serve(block)
            self._pool.checksums.claimed(block)
        return blocks
