"""A node as the encoder of other pipelines: what core/encoder.py decides is done to parities, and told.

What reads or writes shards runs in the KV thread. Used by the worker only, one call at a time."""

from __future__ import annotations

import logging
from collections import deque

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.topology import Topology
from dataplane._fast.checksum import piece_sums
from dataplane.core.encoder import Effect, Encoder, Fetch, Refuse, Send, Solve
from dataplane.core.messages import (
    Fence,
    FetchMeta,
    RestoredMeta,
    RestoreMeta,
    Shape,
    ShardAckMeta,
    ShardDropMeta,
    ShardMeta,
    ShardQueryMeta,
    SurvivorMeta,
)
from dataplane.core.parity import ANSWER_LIMIT_S, clients_of, encoders_of, ranked
from dataplane.core.prefix import unpack_names
from dataplane.kvwork import RunInThread
from dataplane.parity_bytes import OF_BYTES, ParityBytes
from dataplane.transport import frames

log = logging.getLogger(__name__)

EXPIRE_EVERY_S = 0.05
UNSENT_MAX = 64  # messages with restored shards that wait for a link ...
UNSENT_BYTES = 64 << 20  # ... and no more bytes than that: they are not of parity.memory_bytes
NOTHING = memoryview(b"")

EncoderMeta = ShardMeta | ShardQueryMeta | ShardDropMeta | RestoreMeta | SurvivorMeta


async def checked_shards(
    thread: RunInThread, packed: bytes, payload: memoryview
) -> tuple[list[bytes], list[int], int]:
    """Names, the CRC-32 of the shards that have come for them, and the size of one in bytes."""
    names = unpack_names(packed)
    size = len(payload) // max(1, len(names))
    sums = (await thread(piece_sums, payload, size, size=len(payload))).tolist() if size else []
    return names, sums, size


class Encoding:
    def __init__(self, me: Member, thread: RunInThread, send: frames.Send, room_bytes: int) -> None:
        self.encoder = Encoder(room_bytes)
        self.bytes = ParityBytes()
        self._me = me
        self._thread = thread
        self._send = send
        self._topology: Topology | None = None
        self._epochs: dict[PipelineId, int] = {}
        self._encoders: dict[PipelineId, tuple[Member, ...]] = {}  # of the pipelines whose parity may be here
        # Whose encoders are others since: when its first stage is told next of what lies here.
        self._moved: dict[PipelineId, float] = {}
        self._unsent: deque[tuple[Member, RestoredMeta, bytes]] = deque()  # the oldest first
        # Whose stages differ in their code, which is said once an epoch.
        self._misfits: set[PipelineId] = set()
        self._expire_at = 0.0

    def apply(self, topology: Topology) -> None:
        self._topology = topology
        before = self._encoders
        self._encoders = {p.id: encoders_of(topology, p.id) for p in clients_of(topology, self._me)}
        self._moved |= {name: 0.0 for name, now in self._encoders.items() if before.get(name, now) != now}
        self._forget(self.encoder.retain(self._encoders))
        for gone in self._epochs.keys() - {pipeline.id for pipeline in topology.pipelines}:
            del self._epochs[gone]
            self._misfits.discard(gone)
            self._moved.pop(gone, None)
            self._forget(self.encoder.void(gone))
        for pipeline in topology.pipelines:
            if self._epochs.get(pipeline.id) != pipeline.epoch:
                self._epochs[pipeline.id] = pipeline.epoch
                self._misfits.discard(pipeline.id)
                self._forget(self.encoder.void(pipeline.id))
        self._unsent = deque(each for each in self._unsent if self._waits(topology, each[0], each[1]))

    def link_changed(self, node: str) -> None:
        unsent = list(self._unsent)
        self._unsent.clear()
        for to, meta, payload in unsent:
            if to.node != node or not self._send(to, meta, payload):
                self._keep(to, meta, payload)

    def _waits(self, topology: Topology, to: Member, meta: RestoredMeta) -> bool:
        pipeline, epoch = topology.pipeline(meta.pipeline), meta.fence.epoch
        if pipeline is None or epoch < pipeline.epoch:
            return False
        # It may know a newer topology than this node.
        return epoch > pipeline.epoch or to in pipeline.members()

    def _keep(self, to: Member, meta: RestoredMeta, payload: bytes) -> None:
        """Until its link is up. Who waits for the oldest ones has given up first, and computes them again."""
        self._unsent.append((to, meta, payload))
        size_bytes = sum(len(each) for _, _, each in self._unsent)
        while len(self._unsent) > UNSENT_MAX or size_bytes > UNSENT_BYTES:
            size_bytes -= len(self._unsent.popleft()[2])

    async def handle(self, peer: Member, meta: EncoderMeta, payload: memoryview, now: float) -> None:
        match meta:
            case ShardMeta():
                if meta.pipeline in self._encoders:
                    await self._add(meta, payload, now)
            case ShardQueryMeta():
                if meta.pipeline in self._encoders:
                    self._send(peer, self.encoder.whole(meta.pipeline, meta.stage, meta.fence), b"")
            case ShardDropMeta():
                self._forget(self.encoder.dropped(meta.pipeline, meta.stage, unpack_names(meta.names)))
            case RestoreMeta():
                names = unpack_names(meta.names)
                effects = self.encoder.asked(meta.pipeline, meta.fence, meta.stage, peer, names, now)
                await self._perform(effects)
            case SurvivorMeta():
                self.encoder.heard(meta.pipeline, meta.stage, now)
                await self._take_out(meta, payload)

    async def pump(self, now: float) -> None:
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            await self._perform(self.encoder.expire(now))
        self._tell_stages()
        self._tell_moved(now)

    # ------------------------------------------------------------------

    async def _add(self, meta: ShardMeta, payload: memoryview, now: float) -> None:
        names, sums, size = await checked_shards(self._thread, meta.names, payload)
        effects: list[Effect] = []
        for place, (name, checksum) in enumerate(zip(names, meta.sums, strict=True)):
            key = meta.pipeline, name
            if not self._encodes(meta.pipeline, name):
                continue  # one of us does not know the newest topology; the stage asks what is here
            if place < len(sums) and sums[place] == checksum and size <= meta.shape.longest:
                effects += self.encoder.arrived(key, meta.stage, meta.shape, checksum, place, now)
                if not self.encoder.has(key, meta.stage):
                    self._say_misfit(meta, self.encoder.shape(key))
            else:
                self.encoder.damaged(key, meta.stage)
        await self._perform(effects, payload, size)

    def _say_misfit(self, meta: ShardMeta, kept: Shape | None) -> None:
        if kept in (None, meta.shape) or meta.pipeline in self._misfits:
            return
        self._misfits.add(meta.pipeline)
        log.warning(
            "stages of %s differ in their code, %s and %s: new blocks are not protected until parity.code and "
            "parity.parities are the same on all nodes",
            meta.pipeline,
            kept,
            meta.shape,
        )

    def _encodes(self, pipeline: PipelineId, name: bytes) -> bool:
        encoders = self._encoders.get(pipeline, ())
        return bool(encoders) and ranked(name, encoders)[0] == self._me

    async def _take_out(self, meta: SurvivorMeta, payload: memoryview) -> None:
        names, sums, size = await checked_shards(self._thread, meta.names, payload)
        lacks, effects = unpack_names(meta.lacks), list[Effect]()
        for place, (name, checksum) in enumerate(zip(names, meta.sums, strict=True)):
            if place < len(sums) and sums[place] == checksum:
                key = meta.pipeline, name
                effects += self.encoder.survived(key, meta.fence, meta.stage, checksum, place)
            else:
                lacks.append(name)
        effects += self.encoder.lacks(meta.pipeline, meta.fence, meta.stage, lacks)
        await self._perform(effects, payload, size)

    async def _perform(self, effects: list[Effect], payload: memoryview = NOTHING, size: int = 0) -> None:
        while effects:
            await self._say(effects)  # before what is said is forgotten
            further: list[Effect] = []
            work = [effect for effect in effects if isinstance(effect, OF_BYTES)]
            solved = await self._thread(self.bytes.perform, work, payload, size) if work else {}
            for effect in effects:
                if isinstance(effect, Fetch):
                    further += self._fetch(effect)
                elif isinstance(effect, Solve):
                    further += self.encoder.solved(effect.key, solved[effect.key])
            effects = further

    def _forget(self, effects: list[Effect]) -> None:
        """Effects that only give memory back."""
        self.bytes.perform(effects, NOTHING, 0)

    async def _say(self, effects: list[Effect]) -> None:
        """Restored shards to who asked, in company, and what cannot be restored."""
        said: dict[tuple[PipelineId, Fence, int, Member], tuple[list[Send], list[bytes]]] = {}
        for effect in effects:
            if isinstance(effect, Send | Refuse):
                line = effect.key[0], effect.fence, effect.stage, effect.to
                sent, refused = said.setdefault(line, ([], []))
                if isinstance(effect, Send):
                    sent.append(effect)
                else:
                    refused.append(effect.key[1])
        for (pipeline, fence, stage, to), (sent, refused) in said.items():
            names = b"".join(effect.key[1] for effect in sent)
            sums = tuple(effect.checksum for effect in sent)
            shards = [self.bytes.restored[effect.key][stage] for effect in sent]
            meta = RestoredMeta(pipeline, fence, stage, names, sums, b"".join(refused))
            payload = await self._thread(b"".join, shards, size=sum(map(len, shards)))
            if not self._send(to, meta, payload):
                self._keep(to, meta, payload)

    def _fetch(self, effect: Fetch) -> list[Effect]:
        pipeline = self._topology.pipeline(effect.pipeline) if self._topology is not None else None
        member = pipeline.leader_at(effect.stage) if pipeline is not None else None
        meta = FetchMeta(effect.pipeline, effect.fence, b"".join(effect.names))
        if member is not None and self._send(member, meta, b""):
            return []
        return self.encoder.lacks(effect.pipeline, effect.fence, effect.stage, effect.names)

    def _tell_stages(self) -> None:
        for pipeline, stage, news in self.encoder.news():
            known = self._topology.pipeline(pipeline) if self._topology is not None else None
            if known is None or (member := known.leader_at(stage)) is None:
                continue
            added, complete, damaged, full, gone, left = map(
                b"".join, (news.added, news.complete, news.damaged, news.full, news.gone, news.left)
            )
            answer = ShardAckMeta(pipeline, Fence(known.epoch), added, complete, damaged, full, gone, left)
            self._send(member, answer, b"")

    def _tell_moved(self, now: float) -> None:
        """Parity that belongs elsewhere now goes when it is there: the first stage sees to that, until it is done."""
        for pipeline, at in list(self._moved.items()):
            if now < at:
                continue
            known = self._topology.pipeline(pipeline) if self._topology is not None else None
            names = self.encoder.names(pipeline)
            if known is None or all(self._encodes(pipeline, name) for name in names):
                del self._moved[pipeline]
                continue
            self._moved[pipeline] = now + ANSWER_LIMIT_S
            if (first := known.leader_at(0)) is not None:
                self._send(first, self.encoder.whole(pipeline, 0, Fence(known.epoch)), b"")
