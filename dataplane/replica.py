"""Both ends of KV copies on one node: reading and sending blocks, and storing those of others.

What is decided here is decided on the event loop; what reads or writes blocks runs in the KV thread (kvwork.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.reports import LAG_UNKNOWN, TargetReport
from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import KvStore
from dataplane.core.copies import Key
from dataplane.core.messages import (
    KEPT,
    Block,
    Fence,
    HeldMeta,
    KvAckMeta,
    KvDropMeta,
    KvMeta,
    KvQueryMeta,
    Place,
    RejoinMeta,
)
from dataplane.core.placed import Placed, tokens_where
from dataplane.core.prefix import unpack_names
from dataplane.core.replication import Copy, ReplicaSource
from dataplane.core.stage import Stage
from dataplane.kvwork import RunInThread, Sums, blocks_as_bytes
from dataplane.transport.frames import Send

if TYPE_CHECKING:
    from dataplane.kvcache import KVCache
    from kernels.cuda.cache import DeviceCache

log = logging.getLogger(__name__)

# Of copies in one message: it costs both ends more than a block does, yet steps must not wait behind it for long.
COMPANY_BYTES = 1 << 19
LOOK_EVERY_S = 0.01  # for blocks to send: steps of a small model are shorter, and blocks go in company anyway
# A holder that had to refuse copies says that it has room once so much of its pool could be had for them since.
ROOM_PART = 16


@dataclass(slots=True)
class ReplicaStats:
    """Monotonic counts."""

    blocks_sent: int = 0
    blocks_shared: int = 0  # of which the holder was only told: it has a block of that content
    blocks_stored: int = 0
    blocks_refused: int = 0
    copies_refused: int = 0  # of ours, by a holder
    checksum_failures: int = 0
    queries_refused: int = 0  # of sources whose numerics are others


@dataclass(slots=True)
class _Protected:
    """A pipeline that this node serves a stage of, and where its KV goes."""

    fence: Fence
    sources: dict[Member, ReplicaSource] = field(default_factory=dict)
    # Who gets all requests; the others those that are placed there.
    full: set[Member] = field(default_factory=set)
    placed: Placed = field(default_factory=Placed)


def never() -> bool:
    return False


class Replicator:
    """Used by the worker only, between computations and one call at a time: no block changes while one is read."""

    def __init__(
        self,
        store: KvStore,
        kv: KVCache | DeviceCache,
        thread: RunInThread,
        send: Send,
        send_later: Send | None = None,
        block_wire_bytes: int = 0,
    ) -> None:
        """`send` is for what others wait for: acknowledgements and answers. Copies, and what must not overtake them, go
        with `send_later` if it is given. `block_wire_bytes`: what a block counts for on the way, if that is more than
        it has (emulated devices)."""
        self.stats = ReplicaStats()
        self.numerics = ""  # of this node's KV: who has others is no holder of it (dataplane/numerics.py)
        self._store = store
        self._bytes = blocks_as_bytes(kv)
        self._thread = thread
        self._send, self._send_later = send, send_later or send
        self._company = max(1, COMPANY_BYTES // (block_wire_bytes or kv.block_bytes))  # blocks of one message
        self._protected: dict[PipelineId, _Protected] = {}
        self._news: dict[tuple[Member, PipelineId, Fence], dict[int, None]] = {}  # requests to acknowledge
        # What was kept of copies whose requests have ended since.
        self._spared: dict[PipelineId, list[bytes]] = {}
        self._sources: dict[PipelineId, tuple[Member, Fence]] = {}  # who relies on our copies of a pipeline
        self._turn = 0  # which source goes first
        self._look_at = 0.0  # when something may be to be sent again, if nothing happens before that says so
        # Whose copies had to be refused, and how many blocks there were for copies then.
        self._refused: dict[tuple[Member, PipelineId, Fence], int] = {}

    # ------------------------------------------------------------------ the serving side

    def protect(
        self,
        pipeline: PipelineId,
        epoch: int,
        targets: list[Member],
        holders: Mapping[PipelineId, Member] | None = None,
    ) -> None:
        """From now on copy this pipeline's KV to `targets` (level-triggered: says how it shall be). `holders`: who
        may hold copies of single requests, by the pipeline whose stage it serves."""
        self._look_at = 0.0
        state = self._protected.setdefault(pipeline, _Protected(Fence(epoch)))
        if state.fence.epoch != epoch:
            state.fence = Fence(epoch)
            for source in state.sources.values():
                source.restart()
        state.full, state.placed.members = set(targets), dict(holders or {})
        state.sources = {
            target: state.sources.get(target) or self._source(pipeline, target, state)
            for target in dict.fromkeys((*targets, *state.placed.members.values()))
        }
        self.wrote(pipeline, self._rids(pipeline))

    def _source(self, pipeline: PipelineId, target: Member, state: _Protected) -> ReplicaSource:
        def wanted(rid: int) -> bool:
            return target in state.full or state.placed.wants(target, rid)

        return ReplicaSource(
            target,
            self._store.block_size,
            tokens_where(wanted, lambda rid: self._store.tokens((pipeline, rid))),
            lambda rid: self._store.verified_tokens((pipeline, rid)),
            self._bytes.block_bytes,
        )

    def place(self, pipeline: PipelineId, orders: Iterable[Place]) -> None:
        """The scheduler says which members are to have copies of these requests."""
        self._look_at = 0.0
        state = self._protected.get(pipeline)
        for order in orders if state is not None else ():
            assert state is not None
            tokens = self._store.tokens((pipeline, order.rid))
            fresh, gone = state.placed.place(order, tokens - tokens % self._store.block_size)
            for target in fresh:
                if target in state.sources:
                    state.sources[target].wrote((order.rid,))
            for target in gone:
                if target in state.sources and target not in state.full:
                    self._drop(pipeline, state.fence, state.sources[target], (order.rid,))

    def copied(self, pipeline: PipelineId) -> list[tuple[int, PipelineId]]:
        """Copies of single requests that are complete since the last time: (request, holder)."""
        state = self._protected.get(pipeline)
        return [] if state is None else state.placed.copied(state.sources)

    def lost(self, pipeline: PipelineId) -> list[tuple[int, PipelineId]]:
        """Copies of single requests that were complete and are gone since the last time: (request, holder)."""
        state = self._protected.get(pipeline)
        return [] if state is None else state.placed.lost(state.sources)

    def unprotect(self, pipeline: PipelineId) -> None:
        self._protected.pop(pipeline, None)

    def wrote(self, pipeline: PipelineId, rids: Iterable[int]) -> None:
        """These requests have KV here that their copies may lack."""
        state = self._protected.get(pipeline)
        if state is not None:
            for source in state.sources.values():
                source.wrote(rids)

    def advanced(self, pipeline: PipelineId, step: Rows, filled: list[int]) -> None:
        """A step has run: news only of the requests that have filled a block."""
        state = self._protected.get(pipeline)
        if state is None or not filled:
            return
        starts = dict(zip(step.rids.tolist(), step.starts.tolist(), strict=True))
        for source in state.sources.values():
            for rid in filled:
                source.rewrote(rid, starts[rid])
        self.wrote(pipeline, filled)

    def freed(self, pipeline: PipelineId, rids: tuple[int, ...]) -> None:
        """These requests have ended here or make room."""
        state = self._protected.get(pipeline)
        if state is None or not rids:
            return
        for source in state.sources.values():
            there = rids
            if source.target not in state.full:
                there = tuple(
                    rid for rid in rids if source.has(rid) or state.placed.wants(source.target, rid)
                )
            if there:
                self._drop(pipeline, state.fence, source, there)
        for rid in rids:
            state.placed.forget(rid)

    def _drop(
        self,
        pipeline: PipelineId,
        fence: Fence,
        source: ReplicaSource,
        rids: tuple[int, ...],
        evicts: bytes = b"",
        keep: bool = True,
    ) -> None:
        source.freed(rids)
        if not self._send_later(source.target, KvDropMeta(pipeline, fence, rids, evicts, keep), b""):
            source.restart()  # what it holds of them comes to light with its next answer

    def rejoin(self, stage: Stage, meta: RejoinMeta) -> HeldMeta:
        """A stage answers its scheduler; the holders learn what came of it."""
        self._look_at = 0.0
        pipeline = stage.pipeline
        before = self._here(pipeline)
        held = stage.rejoin(meta)
        gone = before.keys() - self._here(pipeline).keys()
        self.freed(pipeline, tuple(gone))
        state = self._protected.get(pipeline)
        if state is not None and any(before.get(rid) is False for rid in meta.rids):
            for source in state.sources.values():
                source.restart()  # it may have copies of what was promoted just now: only the rest is sent
        self.wrote(pipeline, meta.rids)
        return held

    def link_changed(self, node: str) -> None:
        """A link to or from `node` came or went: what was under way may be lost."""
        self._look_at = 0.0
        for state in self._protected.values():
            for target, source in state.sources.items():
                if target.node == node:
                    source.restart()

    async def pump(self, now: float, others_wait: Callable[[], bool] = never) -> None:
        """Send what is to be sent: all of it, or one piece of it if others wait for this node."""
        if self._news:
            self._acknowledge()
        if self._store.copies.evicted:
            self._tell_evicted()
        if self._store.pool.gone:
            self._tell_gone()
        if self._refused:
            self._tell_room()
        if now < self._look_at:
            return
        lines = [(p, s, source) for p, s in self._protected.items() for source in s.sources.values()]
        for pipeline, state, source in lines:
            if source.waiting and (over := source.unclaimed(self._store.copies.of(pipeline))):
                self._drop(pipeline, state.fence, source, over, keep=source.target not in state.full)
            if source.must_ask(now):
                self._send_later(source.target, KvQueryMeta(pipeline, state.fence, self.numerics), b"")
        for _ in range(len(lines)):
            self._turn = (self._turn + 1) % len(lines)
            pipeline, state, source = lines[self._turn]
            while copies := source.take(now, self._bytes.piece_blocks):
                sent = await self._send_copies(pipeline, state, source, copies)
                if others_wait():
                    return
                if not sent:
                    break
            if source.kept and source.known and not source.kept_waits:
                await self._send_kept(pipeline, state, source)
                if others_wait():
                    return
        self._look_at = now + LOOK_EVERY_S

    async def _send_copies(
        self, pipeline: PipelineId, state: _Protected, source: ReplicaSource, copies: list[Copy]
    ) -> bool:
        """Copied out: a block may be freed and written again before it has been sent. Of content that the holder has
        already it is only told. False: nothing more now."""
        fence, own, table, size = (
            state.fence,
            self._store.own[pipeline],
            self._store.table,
            self._store.block_size,
        )
        blocks: list[tuple[Block, int]] = []  # with the block here
        for copy in copies:
            here = table.block(own[copy.rid], copy.index)
            name = self._store.pool.name_of(here)
            checksum = self._store.checksums.of(here)
            shared = bool(name) and name in source.there and checksum is not None
            block = Block(copy.rid, copy.index, copy.tokens, checksum or 0, name, not shared)
            blocks.append((block, here))
        data, sums = await self._gather([here for block, here in blocks if block.data])
        if state.fence != fence or state.sources.get(source.target) is not source:
            return False
        checksums = iter(sums.tolist())
        ready: list[Block] = []
        for block, here in blocks:
            if block.data:
                checksum = next(checksums)
                tokens = block.tokens - block.index * size
                if not self._store.copied(here, checksum, tokens):
                    log.error(
                        "block %d of request %x of %s has changed in memory", block.index, block.rid, pipeline
                    )
                    source.restart()  # from what the holder says it goes on, as far as our own is valid
                    return False
                block = Block(block.rid, block.index, block.tokens, checksum, block.name)
                if block.name:
                    source.there.add(block.name)
            ready.append(block)
        return self._ship(pipeline, fence, source, ready, memoryview(data))

    async def _send_kept(self, pipeline: PipelineId, state: _Protected, source: ReplicaSource) -> None:
        """Some of what belongs to no request, when there is nothing else to send. The next ones follow its
        acknowledgement."""
        fence, kept, chosen = state.fence, self._store.kept[pipeline], dict[bytes, int]()
        while source.kept and len(chosen) < self._company:
            name = next(iter(source.kept))
            del source.kept[name]
            here = kept.get(name)
            if here is not None and name not in source.there and here not in self._store.checksums.unverified:
                chosen[name] = here
        if not chosen:
            return
        data, sums = await self._gather(list(chosen.values()))
        if state.fence != fence or state.sources.get(source.target) is not source:
            return
        size, ready = self._store.block_size, []
        for (name, here), checksum in zip(chosen.items(), sums.tolist(), strict=True):
            if not self._store.copied(here, checksum, size):
                log.error("a block that %s keeps has changed in memory", pipeline)
                source.restart()
                return
            source.there.add(name)
            ready.append(Block(KEPT, 0, size, checksum, name))
        source.kept_waits = True
        self._ship(pipeline, fence, source, ready, memoryview(data))

    async def _gather(self, blocks: list[int]) -> tuple[bytearray, Sums]:
        size = len(blocks) * self._bytes.block_bytes
        return await self._thread(self._bytes.gather, blocks, size=size)

    def _ship(
        self, pipeline: PipelineId, fence: Fence, source: ReplicaSource, blocks: list[Block], data: memoryview
    ) -> bool:
        """In messages of bounded size. False: the link does not take them."""
        at = 0
        for first in range(0, len(blocks), self._company):
            some = tuple(blocks[first : first + self._company])
            end = at + sum(block.data for block in some) * self._bytes.block_bytes
            if not self._send_later(source.target, KvMeta(pipeline, fence, some), data[at:end]):
                source.restart()
                return False
            at = end
            self.stats.blocks_sent += len(some)
            self.stats.blocks_shared += sum(not block.data for block in some)
        return True

    def acknowledged(self, peer: Member, meta: KvAckMeta, now: float) -> None:
        self._look_at = 0.0
        state = self._protected.get(meta.pipeline)
        source = state.sources.get(peer) if state is not None and meta.fence == state.fence else None
        if state is None or source is None:
            return
        if meta.room:
            source.room()
        unknown = source.acknowledged(meta.held, meta.whole, meta.refused, now)
        if meta.refused:
            self.stats.copies_refused += len(meta.held)
            for rid, _ in meta.held:  # perhaps since it lacks what it was told that it has
                source.there.difference_update(self._names(meta.pipeline, rid))
        # What waits here to be taken up may still be claimed: its other copies must not go before.
        source.waiting.update(rid for rid in unknown if (meta.pipeline, rid) in self._store.copies.rows)
        unknown = [rid for rid in unknown if rid not in source.waiting]
        there = unpack_names(meta.names)
        if meta.whole:
            source.wrote(self._rids(meta.pipeline))
            self._compare_kept(meta, source, full=peer in state.full)
        # Its copy of a request may have had more than the request itself in the end.
        gone = b"".join(name for name in there if not self._store.pool.has(name))
        if unknown or gone:
            # A request of an instance that failed is looked for by its names at who holds it.
            keep = peer not in state.full
            self._drop(meta.pipeline, state.fence, source, tuple(unknown), gone, keep=keep)

    def _compare_kept(self, meta: KvAckMeta, source: ReplicaSource, full: bool) -> None:
        """What the holder has of what is kept here is not sent again, and what it lacks is."""
        kept = self._store.kept[meta.pipeline]
        source.there = set(unpack_names(meta.names))
        for rid, tokens in meta.held:
            source.there.update(self._names(meta.pipeline, rid)[: tokens // self._store.block_size])
        source.kept = dict.fromkeys(name for name in kept if full and name not in source.there)

    def targets(self, pipeline: PipelineId) -> tuple[TargetReport, ...]:
        """How far behind each copy is."""
        state = self._protected.get(pipeline)
        if state is None:
            return ()
        rids = self._rids(pipeline)
        reports = []
        for target, source in state.sources.items():
            if target not in state.full:
                continue
            lag = source.lag_tokens(rids) if source.known else LAG_UNKNOWN
            reports.append(TargetReport(target, lag, source.behind_s(lag)))
        return tuple(reports)

    # ------------------------------------------------------------------ the holding side

    async def store_copies(self, peer: Member, meta: KvMeta, payload: memoryview) -> None:
        self._sources[meta.pipeline] = (peer, meta.fence)
        sums = await self._thread(self._bytes.sums_of, payload, size=len(payload))
        news: dict[int, None] = {}
        refused: dict[int, None] = {}
        blocks: list[int] = []
        places: list[int] = []
        place = 0
        for copy in meta.blocks:
            key = (meta.pipeline, copy.rid)
            if not copy.data:
                stored = self._store.copies.share(key, copy.index, copy.tokens, copy.name, copy.checksum)
            else:
                sound = place < len(sums) and sums[place] == copy.checksum
                block = self._block_for(key, copy, sound)
                if block is not None:
                    blocks.append(block)
                    places.append(place)
                stored = block is not None
                place += 1
            if stored:
                self.stats.blocks_stored += 1
            elif copy.rid != KEPT:
                self.stats.blocks_refused += 1
                refused[copy.rid] = None
            if stored or copy.rid == KEPT:
                news[copy.rid] = None
        if blocks:
            # They count already, so that the next block of the same request finds its place. Nobody looks before this
            # returns, and nothing is acknowledged before the next turn.
            await self._thread(self._bytes.scatter, blocks, payload, places, size=len(payload))
        if news:
            self._news.setdefault((peer, meta.pipeline, meta.fence), {}).update(news)
        if refused:
            self._refuse(peer, meta, list(refused))

    def _block_for(self, key: Key, copy: Block, sound: bool) -> int | None:
        """The block that a copy belongs into, which counts as written from here on; None: it is refused."""
        if not sound:
            self.stats.checksum_failures += 1
        if copy.rid == KEPT:
            return (
                self._store.copies.place_spare(key[0], copy.name, copy.checksum)
                if sound and copy.name
                else None
            )
        if not sound or self._store.serves(key):
            return None
        block = self._store.copies.place(key, copy.index, copy.tokens)
        if block is None:
            return None
        self._store.copies.written(key, copy.index, copy.tokens, copy.checksum, copy.name)
        return block

    def _refuse(self, peer: Member, meta: KvMeta, rids: list[int]) -> None:
        held = tuple((rid, self._store.copies.tokens((meta.pipeline, rid))) for rid in rids)
        self._refused.setdefault((peer, meta.pipeline, meta.fence), self._store.blocks_for_copies)
        self._send(peer, KvAckMeta(meta.pipeline, meta.fence, held, refused=True), b"")

    def _tell_room(self) -> None:
        """Whose copies were refused tries them again when there is room for them, not before."""
        free, part = self._store.blocks_for_copies, -(-self._store.num_blocks // ROOM_PART)
        for line, free_then in list(self._refused.items()):
            peer, pipeline, fence = line
            if self._sources.get(pipeline) != (peer, fence):
                del self._refused[line]
            elif free < free_then:
                self._refused[line] = free
            elif free >= free_then + part:
                del self._refused[line]
                self._send(peer, KvAckMeta(pipeline, fence, (), room=True), b"")

    def _acknowledge(self) -> None:
        """One message for all that was stored or dropped since the last time."""
        news, self._news = self._news, {}
        for (peer, pipeline, fence), rids in news.items():
            held = tuple((rid, self._store.copies.tokens((pipeline, rid))) for rid in rids)
            spared = b"".join(self._spared.pop(pipeline, ()))
            self._send(peer, KvAckMeta(pipeline, fence, held, names=spared), b"")

    def _tell_evicted(self) -> None:
        """A source must not count on copies that made room for served KV. It sends them again after a pause."""
        evicted, self._store.copies.evicted = self._store.copies.evicted, []
        gone: dict[PipelineId, list[tuple[int, int]]] = {}
        for pipeline, rid in evicted:
            gone.setdefault(pipeline, []).append((rid, 0))
        for pipeline, held in gone.items():
            if pipeline in self._sources:
                peer, fence = self._sources[pipeline]
                self._refused.setdefault((peer, pipeline, fence), self._store.blocks_for_copies)
                self._send(peer, KvAckMeta(pipeline, fence, tuple(held), refused=True), b"")

    def _tell_gone(self) -> None:
        """Holders need not keep what is not here any more."""
        gone = [name for name in self._store.pool.gone if not self._store.pool.has(name)]
        self._store.pool.gone.clear()
        if not gone:
            return
        for pipeline, state in self._protected.items():
            for source in state.sources.values():
                there = gone if source.target in state.full else [n for n in gone if n in source.there]
                source.there.difference_update(gone)
                if there:
                    self._drop(pipeline, state.fence, source, (), b"".join(there))

    def answer_query(self, peer: Member, meta: KvQueryMeta) -> None:
        """A source sends copies only after this answer: one whose numerics are others gets none."""
        if meta.numerics != self.numerics:
            self.stats.queries_refused += 1
            return
        self._sources[meta.pipeline] = (peer, meta.fence)  # it counts on what we say here
        copies = self._store.copies
        held = tuple((rid, copies.tokens((meta.pipeline, rid))) for rid in copies.of(meta.pipeline))
        spare = b"".join(self._store.copies.spare_of(meta.pipeline))
        self._send(peer, KvAckMeta(meta.pipeline, meta.fence, held, whole=True, names=spare), b"")

    def drop_copies(self, peer: Member, meta: KvDropMeta) -> None:
        news = self._news.setdefault((peer, meta.pipeline, meta.fence), {})
        for rid in meta.rids:
            self._spared.setdefault(meta.pipeline, []).extend(
                self._store.copies.drop((meta.pipeline, rid), meta.keep)
            )
            news[rid] = None
        self._store.copies.evict_spare(unpack_names(meta.evicts), meta.pipeline)

    # ------------------------------------------------------------------

    def _names(self, pipeline: PipelineId, rid: int) -> list[bytes]:
        """Of the blocks of a request that is served here; b"" for one that has none."""
        row = self._store.own[pipeline].get(rid)
        return [] if row is None else self._store.names_of(row)

    def _rids(self, pipeline: PipelineId) -> list[int]:
        return list(self._store.own[pipeline])

    def _here(self, pipeline: PipelineId) -> dict[int, bool]:
        """The requests that this node has KV of, and whether it serves it (else it is a copy)."""
        here = dict.fromkeys(self._store.copies.of(pipeline), False)
        return here | dict.fromkeys(self._rids(pipeline), True)
