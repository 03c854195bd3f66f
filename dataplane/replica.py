"""Both ends of KV copies on one node: reading and sending blocks, and storing those of others.

What is decided here is decided on the event loop; what reads or writes blocks runs in the KV thread (kvwork.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.reports import TargetReport
from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import Key, KvStore
from dataplane.core.messages import (
    Block,
    Fence,
    HeldMeta,
    KvAckMeta,
    KvDropMeta,
    KvMeta,
    KvQueryMeta,
    RejoinMeta,
)
from dataplane.core.replication import Copy, ReplicaSource
from dataplane.core.stage import Stage
from dataplane.kvwork import RunInThread, blocks_as_bytes
from dataplane.transport.frames import Send

if TYPE_CHECKING:
    from dataplane.kvcache import KVCache
    from kernels.cuda.cache import DeviceCache

log = logging.getLogger(__name__)

# Of copies in one message: it costs both ends more than a block does, yet steps must not wait behind it for long.
COMPANY_BYTES = 1 << 19
# A holder that had to refuse copies says that it has room once so much of its pool has become free since.
ROOM_PART = 16


@dataclass(slots=True)
class ReplicaStats:
    """Monotonic counts."""

    blocks_sent: int = 0
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
    flush: bool = False  # quiesced: part-filled blocks too


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
        self._sources: dict[PipelineId, tuple[Member, Fence]] = {}  # who relies on our copies of a pipeline
        self._turn = 0  # which source goes first
        # Whose copies had to be refused, and how many blocks were free then.
        self._refused: dict[tuple[Member, PipelineId, Fence], int] = {}

    # ------------------------------------------------------------------ the serving side

    def protect(self, pipeline: PipelineId, epoch: int, targets: list[Member], flush: bool) -> None:
        """From now on copy this pipeline's KV to `targets` (level-triggered: says how it shall be)."""
        state = self._protected.setdefault(pipeline, _Protected(Fence(epoch)))
        if state.fence.epoch != epoch:
            state.fence = Fence(epoch)
            for source in state.sources.values():
                source.restart()
        state.flush = flush
        state.sources = {
            target: state.sources.get(target) or self._source(pipeline, target) for target in targets
        }
        self.wrote(pipeline, self._rids(pipeline))

    def _source(self, pipeline: PipelineId, target: Member) -> ReplicaSource:
        return ReplicaSource(
            target,
            self._store.block_size,
            lambda rid: self._store.tokens((pipeline, rid)),
            lambda rid: self._store.verified_tokens((pipeline, rid)),
            self._bytes.block_bytes,
        )

    def unprotect(self, pipeline: PipelineId) -> None:
        self._protected.pop(pipeline, None)

    def wrote(self, pipeline: PipelineId, rids: Iterable[int]) -> None:
        """These requests have KV here that their copies may lack."""
        state = self._protected.get(pipeline)
        if state is not None:
            for source in state.sources.values():
                source.wrote(rids)

    def advanced(self, pipeline: PipelineId, step: Rows, filled: list[int]) -> None:
        """A step has run: news only of the requests that have filled a block, unless everything is to be copied."""
        state = self._protected.get(pipeline)
        if state is not None and filled:
            starts = dict(zip(step.rids.tolist(), step.starts.tolist(), strict=True))
            for source in state.sources.values():
                for rid in filled:
                    source.rewrote(rid, starts[rid])
        if state is not None and state.flush:
            self.wrote(pipeline, step.rids.tolist())
        elif filled:
            self.wrote(pipeline, filled)

    def freed(self, pipeline: PipelineId, rids: tuple[int, ...]) -> None:
        state = self._protected.get(pipeline)
        if state is None or not rids:
            return
        for source in state.sources.values():
            self._drop(pipeline, state.fence, source, rids)

    def _drop(self, pipeline: PipelineId, fence: Fence, source: ReplicaSource, rids: tuple[int, ...]) -> None:
        source.freed(rids)
        if not self._send_later(source.target, KvDropMeta(pipeline, fence, rids), b""):
            source.restart()  # what it holds of them comes to light with its next answer

    def rejoin(self, stage: Stage, meta: RejoinMeta) -> HeldMeta:
        """A stage answers its scheduler; the holders learn what came of it."""
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
        for state in self._protected.values():
            for target, source in state.sources.items():
                if target.node == node:
                    source.restart()

    async def pump(self, now: float, others_wait: Callable[[], bool] = never) -> None:
        """Send what is to be sent: all of it, or one piece of it if others wait for this node."""
        self._acknowledge()
        self._tell_evicted()
        self._tell_room()
        lines = [(p, s, source) for p, s in self._protected.items() for source in s.sources.values()]
        for pipeline, state, source in lines:
            if source.must_ask(now):
                self._send_later(source.target, KvQueryMeta(pipeline, state.fence, self.numerics), b"")
        for _ in range(len(lines)):
            self._turn = (self._turn + 1) % len(lines)
            pipeline, state, source = lines[self._turn]
            while copies := source.take(now, state.flush, self._bytes.piece_blocks):
                sent = await self._send_copies(pipeline, state, source, copies)
                if others_wait():
                    return
                if not sent:
                    break

    async def _send_copies(
        self, pipeline: PipelineId, state: _Protected, source: ReplicaSource, copies: list[Copy]
    ) -> bool:
        """Copied out: a block may be freed and written again before it has been sent. False: nothing more now."""
        fence, own, table, size = (
            state.fence,
            self._store.own[pipeline],
            self._store.table,
            self._bytes.block_bytes,
        )
        rows = [own[copy.rid] for copy in copies]
        data, sums = await self._thread(
            self._bytes.gather, [table.block(row, copy.index) for row, copy in zip(rows, copies, strict=True)]
        )
        if state.fence != fence or state.sources.get(source.target) is not source:
            return False
        blocks = []
        for copy, row, checksum in zip(copies, rows, sums.tolist(), strict=True):
            if not self._store.checksums.copied(row, copy.index, copy.tokens, checksum):
                log.error(
                    "block %d of request %x of %s has changed in memory", copy.index, copy.rid, pipeline
                )
                source.restart()  # from what the holder says it goes on, as far as our own is valid
                return False
            blocks.append(Block(copy.rid, copy.index, copy.tokens, checksum))
        parts = memoryview(data)
        for first in range(0, len(blocks), self._company):
            some = tuple(blocks[first : first + self._company])
            part = parts[first * size : (first + len(some)) * size]
            if not self._send_later(source.target, KvMeta(pipeline, fence, some), part):
                source.restart()
                return False
            self.stats.blocks_sent += len(some)
        return True

    def acknowledged(self, peer: Member, meta: KvAckMeta, now: float) -> None:
        state = self._protected.get(meta.pipeline)
        source = state.sources.get(peer) if state is not None and meta.fence == state.fence else None
        if state is None or source is None:
            return
        if meta.room:
            source.room()
        unknown = source.acknowledged(meta.held, meta.whole, meta.refused, now)
        if meta.refused:
            self.stats.copies_refused += len(meta.held)
        # What waits here to be promoted may still be claimed: its other copies must not go before.
        unknown = [rid for rid in unknown if (meta.pipeline, rid) not in self._store.replicas]
        if meta.whole:
            source.wrote(self._rids(meta.pipeline))
        if unknown:
            self._drop(meta.pipeline, state.fence, source, tuple(unknown))

    def targets(self, pipeline: PipelineId) -> tuple[TargetReport, ...]:
        """How far behind each copy is."""
        state = self._protected.get(pipeline)
        if state is None:
            return ()
        rids = self._rids(pipeline)
        reports = []
        for target, source in state.sources.items():
            lag = source.lag_tokens(rids, state.flush) if source.known else 1 << 30
            reports.append(TargetReport(target, lag, source.behind_s(lag)))
        return tuple(reports)

    # ------------------------------------------------------------------ the holding side

    async def store_copies(self, peer: Member, meta: KvMeta, payload: memoryview) -> None:
        self._sources[meta.pipeline] = (peer, meta.fence)
        sums = await self._thread(self._bytes.sums_of, payload)
        refused: dict[int, None] = {}
        blocks: list[int] = []
        places: list[int] = []
        for place, copy in enumerate(meta.blocks):
            sound = place < len(sums) and sums[place] == copy.checksum
            block = self._block_for((meta.pipeline, copy.rid), copy, sound)
            if block is None:
                refused[copy.rid] = None
            else:
                blocks.append(block)
                places.append(place)
        if blocks:
            # They count already, so that the next block of the same request finds its place. Nobody looks before this
            # returns, and nothing is acknowledged before the next turn.
            await self._thread(self._bytes.scatter, blocks, payload, places)
        for place in places:
            self._news.setdefault((peer, meta.pipeline, meta.fence), {})[meta.blocks[place].rid] = None
        if refused:
            self._refuse(peer, meta, list(refused))

    def _block_for(self, key: Key, copy: Block, sound: bool) -> int | None:
        """The block that a copy belongs into, which counts as written from here on; None: it is refused."""
        block = self._store.replica_block(key, copy.index, copy.tokens)
        if not sound:
            self.stats.checksum_failures += 1
        if block is None or not sound:
            self.stats.blocks_refused += 1
            return None
        self._store.replica_written(key, copy.index, copy.tokens, copy.checksum)
        self.stats.blocks_stored += 1
        return block

    def _refuse(self, peer: Member, meta: KvMeta, rids: list[int]) -> None:
        held = tuple((rid, self._store.replica_tokens((meta.pipeline, rid))) for rid in rids)
        self._refused.setdefault((peer, meta.pipeline, meta.fence), self._store.blocks_free)
        self._send(peer, KvAckMeta(meta.pipeline, meta.fence, held, refused=True), b"")

    def _tell_room(self) -> None:
        """Whose copies were refused tries them again when there is room for them, not before."""
        free, part = self._store.blocks_free, -(-self._store.num_blocks // ROOM_PART)
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
            held = tuple((rid, self._store.replica_tokens((pipeline, rid))) for rid in rids)
            self._send(peer, KvAckMeta(pipeline, fence, held), b"")

    def _tell_evicted(self) -> None:
        """A source must not count on copies that made room for served KV. It sends them again after a pause."""
        evicted, self._store.evicted = self._store.evicted, []
        gone: dict[PipelineId, list[tuple[int, int]]] = {}
        for pipeline, rid in evicted:
            gone.setdefault(pipeline, []).append((rid, 0))
        for pipeline, held in gone.items():
            if pipeline in self._sources:
                peer, fence = self._sources[pipeline]
                self._refused.setdefault((peer, pipeline, fence), self._store.blocks_free)
                self._send(peer, KvAckMeta(pipeline, fence, tuple(held), refused=True), b"")

    def answer_query(self, peer: Member, meta: KvQueryMeta) -> None:
        """A source sends copies only after this answer: one whose numerics are others gets none."""
        if meta.numerics != self.numerics:
            self.stats.queries_refused += 1
            return
        self._sources[meta.pipeline] = (peer, meta.fence)  # it counts on what we say here
        held = tuple(
            (key[1], self._store.replica_tokens(key))
            for key in self._store.replicas
            if key[0] == meta.pipeline
        )
        self._send(peer, KvAckMeta(meta.pipeline, meta.fence, held, whole=True), b"")

    def drop_copies(self, peer: Member, meta: KvDropMeta) -> None:
        news = self._news.setdefault((peer, meta.pipeline, meta.fence), {})
        for rid in meta.rids:
            self._store.drop_replica((meta.pipeline, rid))
            news[rid] = None

    # ------------------------------------------------------------------

    def _rids(self, pipeline: PipelineId) -> list[int]:
        return list(self._store.own[pipeline])

    def _here(self, pipeline: PipelineId) -> dict[int, bool]:
        """The requests that this node has KV of, and whether it serves it (else it is a copy)."""
        here = {rid: False for owner, rid in self._store.replicas if owner == pipeline}
        return here | dict.fromkeys(self._rids(pipeline), True)
