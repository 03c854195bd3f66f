"""KV protected by parity, on one node: as a stage that sends its blocks, as an encoder of other pipelines, and as a
stage that has lost blocks and asks for them.

What is decided is decided by core/parity.py, core/encoder.py and core/restorer.py, on the event loop; what reads or
writes blocks or parities runs in the KV thread. Used by the worker only, one call at a time, between computations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from controlplane.contract.config import ParityConfig
from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.repair import computed_again
from controlplane.contract.topology import Mode, Topology
from dataplane._fast.checksum import piece_sums
from dataplane.core.blocks import KvStore
from dataplane.core.messages import (
    Fence,
    FetchMeta,
    HeldMeta,
    Meta,
    ParityMeta,
    RejoinMeta,
    RestoredMeta,
    RestoreMeta,
    Shape,
    ShardAckMeta,
    ShardDropMeta,
    ShardMeta,
    ShardQueryMeta,
    SurvivorMeta,
)
from dataplane.core.parity import ShardSource, candidates_of, encoders_of, ranked
from dataplane.core.prefix import unpack_names
from dataplane.core.restorer import Answer, Restorer
from dataplane.core.stage import Stage
from dataplane.encoding import Encoding, checked_shards
from dataplane.kvwork import KvBytes, RunInThread, blocks_as_bytes
from dataplane.model.split import split_layers
from dataplane.replica import COMPANY_BYTES, Replicator, never
from dataplane.transport import frames

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor
    from dataplane.kvcache import KVCache
    from dataplane.oracle import OracleExecutor
    from kernels.cuda.cache import DeviceCache

log = logging.getLogger(__name__)

# Of blocks in one message while some are restored. Each block takes five messages, and a message costs its nodes more
# than a block does; streams wait for these. 7 ms of a link of 10 Gbit/s.
RESTORE_BYTES = 8 << 20
RESTORE_BLOCKS = 64  # however small they are
# Since another stage was sent blocks that it had lost: parity that has moved to other encoders is not made until then.
RESTORING_S = 0.1


class Parity:
    def __init__(
        self,
        me: Member,
        store: KvStore,
        kv: KVCache | DeviceCache,
        thread: RunInThread,
        send: frames.Send,
        send_later: frames.Send,
        replicator: Replicator,
        stages: dict[PipelineId, Stage],
        answer: Callable[[PipelineId, HeldMeta], None],
        settings: ParityConfig,
        longest: Callable[[int], int],
        block_wire_bytes: int = 0,
    ) -> None:
        """`send_later`: for shards, behind all that others wait for. `answer`: to the scheduler of a pipeline.
        `longest(N)`: bytes of the longest block of N stages."""
        self.encoding = Encoding(me, thread, send, settings.memory_bytes)
        wire_bytes = block_wire_bytes or kv.block_bytes
        self._company = max(1, COMPANY_BYTES // wire_bytes)
        self._restored_together = max(1, min(RESTORE_BLOCKS, RESTORE_BYTES // wire_bytes))
        self.restorer = Restorer(wire_bytes, self._restored_together)
        self.sources: dict[PipelineId, ShardSource] = {}
        self.blocks_sent = 0
        self._me = me
        self._store = store
        self._kv = blocks_as_bytes(kv)
        self._thread = thread
        self._send = send
        self._send_later = send_later
        self._replicator = replicator
        self._stages = stages
        self._answer = answer
        self._settings = settings
        self._longest = longest
        self._asked_at = 0.0  # when another stage was sent blocks that it had lost
        self._topology: Topology | None = None
        self._busy = False  # parity protects this group
        self._epochs: dict[PipelineId, int] = {}
        # All that is alive in these has been heard of, and some of it is on its way.
        self._unsettled: set[PipelineId] = set()

    # ------------------------------------------------------------------ duties

    def apply(self, topology: Topology) -> None:
        """What this node has to do from now on (level-triggered). Its stages are those of the topology already."""
        self._topology = topology
        if topology.mode is not Mode.PARITY and not self._busy:
            return
        self._busy = topology.mode is Mode.PARITY
        self.encoding.apply(topology)
        for gone in self._epochs.keys() - {pipeline.id for pipeline in topology.pipelines}:
            del self._epochs[gone]
            self.restorer.void(gone)
            self._unsettled.discard(gone)
            self.sources.pop(gone, None)
        for pipeline in topology.pipelines:
            name, changed = pipeline.id, self._epochs.get(pipeline.id) != pipeline.epoch
            self._epochs[name] = pipeline.epoch
            if changed:
                self.restorer.void(name)
                self._unsettled.discard(name)
            if name not in self._stages or topology.mode is not Mode.PARITY:
                self.sources.pop(name, None)
                continue
            source = self.sources.get(name)
            if source is None or source.leads != (self._stages[name].index == 0):
                source = self.sources[name] = ShardSource(self._stages[name].index == 0, self._kv.block_bytes)
                source.add(self._names_here(name))
            elif changed:
                source.restart()
            source.place(encoders_of(topology, name), candidates_of(topology, name))

    def counters(self) -> dict[str, int]:
        """For reports, by name; all but the first two are monotonic."""
        encoder, restorer = self.encoding.encoder, self.restorer
        return {
            "parity_bytes": encoder.used_bytes,
            "parity_lag_blocks": sum(source.lag_blocks for source in self.sources.values()),
            "parity_evicted": encoder.evictions,
            "parity_checksum_failures": encoder.checksum_failures,
            "parity_shards_sent": self.blocks_sent,
            "parity_shards_restored": encoder.restored,
            "blocks_restored": restorer.blocks_restored,
            "blocks_not_restored": restorer.blocks_refused,
        }

    def uncoded_tokens(self, pipeline: PipelineId) -> int:
        """Positions of full blocks that no parity could bring back now; -1: the pipeline is not coded here."""
        source = self.sources.get(pipeline)
        return -1 if source is None else source.lag_blocks * self._store.block_size

    def link_changed(self, node: str) -> None:
        for source in self.sources.values():
            source.restart(node)
        self.restorer.link_changed(node)
        self.encoding.link_changed(node)

    def sealed(self, pipeline: PipelineId, names: Sequence[bytes]) -> None:
        """A step has filled these blocks."""
        source = self.sources.get(pipeline)
        if source is not None:
            source.add(names)

    # ------------------------------------------------------------------ messages

    async def handle(self, peer: Member, meta: ParityMeta, payload: memoryview, now: float) -> None:
        match meta:
            case ShardAckMeta():
                if (source := self.sources.get(meta.pipeline)) is not None:
                    source.heard(peer, meta, now)
            case FetchMeta():
                self._asked_at = now
                await self._survive(peer, meta)
            case RestoredMeta():
                await self._keep(peer, meta, payload, now)
            case _:
                await self.encoding.handle(peer, meta, payload, now)

    async def pump(self, now: float, others_wait: Callable[[], bool] = never) -> None:
        """Send what is to be sent. To be called before the replicator's: what is gone from the pool it forgets."""
        if not self._busy:
            return
        if self._store.pool.gone and self.sources:
            gone = [name for name in self._store.pool.gone if not self._store.pool.has(name)]
            for source in self.sources.values():
                source.gone(gone)
        await self.encoding.pump(now)
        self._restore(now)
        for pipeline, source in self.sources.items():
            fence, index = Fence(self._epochs[pipeline]), self._stages[pipeline].index
            for encoder in source.must_ask(now):
                self._later(encoder, ShardQueryMeta(pipeline, fence, index), b"")
            for encoder, names in source.drops(now):
                self._later(encoder, ShardDropMeta(pipeline, fence, index, b"".join(names)), b"")
        if now - self._asked_at < RESTORING_S:
            return  # links and cores are needed for what somebody waits for
        for pipeline, source in self.sources.items():
            while (taken := source.take(now, self._company)) is not None:
                await self._push(pipeline, source, *taken)
                if others_wait():
                    return

    # ------------------------------------------------------------------ a stage and its blocks

    async def _push(
        self, pipeline: PipelineId, source: ShardSource, encoder: Member, names: list[bytes]
    ) -> None:
        stage, (found, data) = self._stages[pipeline], await self._read(names)
        source.gone(name for name in names if name not in found)
        if not found:
            return
        shape, sums, fence = self._shape(pipeline), tuple(found.values()), Fence(self._epochs[pipeline])
        meta = ShardMeta(pipeline, fence, stage.index, shape, b"".join(found), sums)
        if self._later(encoder, meta, data):
            self.blocks_sent += len(found)
        else:
            source.restart(encoder.node)

    async def _survive(self, peer: Member, meta: FetchMeta) -> None:
        """Another stage has lost its blocks of these names, and somebody waits for ours."""
        stage, names = self._stages[meta.pipeline], unpack_names(meta.names)
        for first in range(0, len(names), self._restored_together):
            some = names[first : first + self._restored_together]
            found, data = await self._read(some)
            lacks, sums = b"".join(name for name in some if name not in found), tuple(found.values())
            answer = SurvivorMeta(meta.pipeline, meta.fence, stage.index, b"".join(found), sums, lacks)
            self._send(peer, answer, data)

    async def _read(self, names: Iterable[bytes]) -> tuple[dict[bytes, int], frames.Buffer]:
        """The CRC-32 of those blocks that are here and as they should be, and their bytes, one behind the other."""
        pool, size = self._store.pool, self._kv.block_bytes
        here = {name: block for name in names if (block := pool.find(name)) is not None}
        if not here:
            return {}, b""
        data, sums = await self._thread(self._kv.gather, list(here.values()), size=len(here) * size)
        found: dict[bytes, int] = {}
        whole = memoryview(data)
        crcs = (
            sums
            if isinstance(self._kv, KvBytes)
            else await self._thread(piece_sums, whole, size, size=len(data))
        )
        sound: list[memoryview] = []
        for at, (name, block) in enumerate(here.items()):
            if self._store.copied(block, int(sums[at]), self._store.block_size):
                found[name] = int(crcs[at])
                sound.append(whole[at * size : (at + 1) * size])
            else:
                log.error("a named block has changed in memory")
        return found, whole if len(sound) == len(here) else b"".join(sound)

    def _shape(self, pipeline: PipelineId) -> Shape:
        known = self._topology.pipeline(pipeline) if self._topology is not None else None
        assert known is not None
        stages = len(known.stages)
        return Shape(self._settings.code, stages, self._settings.parities, self._longest(stages))

    def _names_here(self, pipeline: PipelineId) -> list[bytes]:
        """Of the blocks of its requests here, and of what is kept of it."""
        rows = self._store.own[pipeline].values()
        named = dict.fromkeys(name for row in rows for name in self._store.names_of(row) if name)
        return [*(named | dict.fromkeys(self._store.kept[pipeline]))]

    # ------------------------------------------------------------------ a stage that lacks blocks

    def rejoin(self, stage: Stage, meta: RejoinMeta, now: float) -> None:
        """A scheduler asks. It is answered at once, or in parts while blocks are restored."""
        pipeline, pool = stage.pipeline, self._store.pool
        self.restorer.void(pipeline, meta.fence)
        source = self.sources.get(pipeline)
        names = {rid: unpack_names(packed) for rid, packed in zip(meta.rids, meta.names, strict=False)}
        lacking = {rid: [name for name in names.get(rid, ()) if not pool.has(name)] for rid in meta.rids}
        blocks = {rid: len(missing) for rid, missing in lacking.items()}
        for rid in computed_again(
            blocks, self._store.block_size, meta.computing, self.restorer.speed.restoring
        ):
            lacking[rid] = []
        candidates = candidates_of(self._topology, pipeline) if self._topology is not None else ()
        if source is None or not meta.adopts or not candidates or not any(lacking.values()):
            held = self._replicator.rejoin(stage, meta)
            if source is not None:
                source.add(self._names_here(pipeline) if meta.kept else self._named(pipeline, meta.rids))
            self._settled(pipeline, meta)
            self._answer(pipeline, held)
            return
        kept = self._enter(stage, meta)
        encoders = {name: ranked(name, candidates) for missing in lacking.values() for name in missing}
        self.restorer.begin(meta, kept, lacking, encoders, now)
        # That it is here, and will say more: so the scheduler knows how long the stages took to hear of each other.
        self._answer(pipeline, HeldMeta(pipeline, meta.fence, meta.ask, stage.index, (), more=True))

    def _enter(self, stage: Stage, meta: RejoinMeta) -> bytes:
        """What an answer does at once: other requests end, and it says what is kept."""
        pipeline = stage.pipeline
        if meta.fence > stage.fence:
            stage.enter(meta.fence)
        before = set(self._store.own[pipeline])
        if meta.complete:
            self._store.settle(pipeline, meta.rids)
        kept = self._store.keeps(pipeline) if meta.kept else []
        self._replicator.freed(pipeline, tuple(before - self._store.own[pipeline].keys()))
        self.sources[pipeline].add(self._names_here(pipeline))
        return b"".join(kept)

    def _settled(self, pipeline: PipelineId, meta: RejoinMeta) -> None:
        if meta.complete:
            self._unsettled.add(pipeline)

    def _restore(self, now: float) -> None:
        room = self._store.blocks_free
        if room < (outstanding := self.restorer.outstanding):
            room = self._store.room(self.restorer.needed, outstanding)
        for pipeline, fence, encoder, names in self.restorer.next(now, room):
            meta = RestoreMeta(pipeline, fence, self._stages[pipeline].index, b"".join(names))
            if not self._send(encoder, meta, b""):
                self.restorer.unreachable(pipeline, names, now)
        for answer in self.restorer.answers(now):
            self._tell(answer)
        for pipeline in self._unsettled - self.restorer.pipelines:
            self._unsettled.discard(pipeline)
            if (source := self.sources.get(pipeline)) is not None:
                source.settle()

    async def _keep(self, peer: Member, meta: RestoredMeta, payload: memoryview, now: float) -> None:
        """Blocks that were restored for us are kept under their names until their requests are taken up."""
        names, sums, size = await checked_shards(self._thread, meta.names, payload)
        refused = unpack_names(meta.refused)
        blocks: list[int] = []
        places: list[int] = []
        own = sums if isinstance(self._kv, KvBytes) else None
        if own is None:
            own = (await self._thread(self._kv.sums_of, payload, size=len(payload))).tolist()
        if self._store.blocks_free < len(names):
            self._store.make_room(len(names), self.restorer.needed)
        for place, (name, checksum) in enumerate(zip(names, meta.sums, strict=True)):
            if not self.restorer.wants(meta.pipeline, meta.fence, name):
                continue  # it came too late: it is computed again
            if place >= len(sums) or sums[place] != checksum or size != self._kv.block_bytes:
                refused.append(name)
                continue
            block = self._store.copies.place_spare(meta.pipeline, name, own[place])
            if block is not None:
                blocks.append(block)
                places.append(place)
            elif not self._store.pool.has(name):
                refused.append(name)
                continue
            self.restorer.arrived(meta.pipeline, name, now)
        if blocks:
            await self._thread(self._kv.scatter, blocks, payload, places, size=len(payload))
        self.restorer.refused(meta.pipeline, meta.fence, peer, refused)

    def _tell(self, answer: Answer) -> None:
        """How far requests are here now; they may go on while others wait."""
        meta = answer.question.meta
        stage = self._stages.get(meta.pipeline)
        if stage is None or stage.fence != meta.fence:
            return
        names = dict(zip(meta.rids, meta.names, strict=False))
        some = tuple(names.get(rid, b"") for rid in answer.rids)
        part = RejoinMeta(meta.pipeline, meta.fence, meta.ask, answer.rids, False, some)
        held = dict.fromkeys(answer.rids, 0) | dict(self._replicator.rejoin(stage, part).held)
        # Requests have their blocks now, and what none of them can use is of no use.
        used = (name for packed in some for name in unpack_names(packed))
        self._store.copies.evict_spare(used, meta.pipeline)
        source = self.sources[meta.pipeline]
        source.add(self._named(meta.pipeline, answer.rids))
        if answer.last:
            self._settled(meta.pipeline, meta)
        kept = answer.question.kept if answer.last else b""
        self._answer(
            meta.pipeline,
            HeldMeta(
                meta.pipeline, meta.fence, meta.ask, stage.index, tuple(held.items()), kept, not answer.last
            ),
        )

    def _named(self, pipeline: PipelineId, rids: Iterable[int]) -> list[bytes]:
        own = self._store.own[pipeline]
        rows = [own[rid] for rid in rids if rid in own]
        return [name for row in rows for name in self._store.names_of(row) if name]

    # ------------------------------------------------------------------

    def _later(self, peer: Member, meta: Meta, payload: frames.Buffer) -> bool:
        return (self._send if peer == self._me else self._send_later)(peer, meta, payload)


def longest_block(executor: StageExecutor | OracleExecutor, stages: int) -> int:
    """Bytes of the longest KV block of all stages: those with more layers have longer ones."""
    layers = getattr(executor, "layers", None)  # the oracle's stages are all alike
    if layers is None:
        return executor.kv.block_bytes
    most = max(map(len, split_layers(executor.config.num_layers, stages)))
    return executor.kv.block_bytes // len(layers) * most
