"""A node as the encoder of other pipelines: parity over named blocks, and what is restored from it.

A stage sends its block of a name once. It is added to all parities when it arrives and let go, so that never more is
held than the parities and what one message brings. A name is complete when the shards of all stages are in, and not
before: with one missing, the parity restores nothing. To restore, the surviving stages send their blocks once more;
they are taken out of a copy of the parities, and what is left there is of the lost ones alone.

Effects are to be performed in their order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from controlplane.contract.ids import Member, PipelineId
from dataplane.core.messages import Fence, Shape, ShardAckMeta
from dataplane.core.parity import MINE, WHOLE
from kernels.coding.codes import Code, make_code

IDLE_LIMIT_S = 10.0  # a name to which nothing has been added for so long makes room first
JOB_LIMIT_S = 1.0  # a surviving stage that is asked and silent for so long: the names are refused
LONGEST_MAX = 1 << 30  # bytes of a shard
JOBS_MAX = 1024  # names that are restored at a time; more are refused

Key = tuple[PipelineId, bytes]


@dataclass(frozen=True, slots=True)
class Open:
    """Make the parities of a name: zeros."""

    key: Key
    shape: Shape


@dataclass(frozen=True, slots=True)
class Add:
    """Add the shard at this place of the message to the parities of a name."""

    key: Key
    stage: int
    place: int


@dataclass(frozen=True, slots=True)
class Close:
    """The parities go."""

    key: Key


@dataclass(frozen=True, slots=True)
class Begin:
    """Copy the parities of a name: shards of it are to be restored."""

    key: Key


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask a stage for its blocks."""

    pipeline: PipelineId
    fence: Fence
    stage: int
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class TakeOut:
    """Take the shard at this place of the message out of the copy."""

    key: Key
    stage: int
    place: int


@dataclass(frozen=True, slots=True)
class Solve:
    """Nothing is left in the copy but these stages' shards: work them out, and tell `solved` their checksums."""

    key: Key
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """The restored shard of a stage goes to who asked for it."""

    key: Key
    fence: Fence
    stage: int
    to: Member
    checksum: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """A name cannot be restored from here."""

    key: Key
    fence: Fence
    stage: int
    to: Member


@dataclass(frozen=True, slots=True)
class End:
    """The copy, and what was worked out of it, go."""

    key: Key


Effect = Open | Add | Close | Begin | Fetch | TakeOut | Solve | Send | Refuse | End


@dataclass(slots=True)
class _Entry:
    shape: Shape
    size_bytes: int
    added_at: float
    sums: dict[int, int] = field(default_factory=dict)  # CRC-32 of the shards that are in, by stage


@dataclass(slots=True)
class _Job:
    fence: Fence
    shape: Shape
    sums: dict[int, int]
    since: float
    waits: set[int]  # stages that have not sent their block yet
    askers: dict[int, Member] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _News:
    """For one stage, since it was told last."""

    added: dict[bytes, None] = field(default_factory=dict)
    complete: dict[bytes, None] = field(default_factory=dict)
    damaged: dict[bytes, None] = field(default_factory=dict)
    full: dict[bytes, None] = field(default_factory=dict)
    gone: dict[bytes, None] = field(default_factory=dict)
    left: dict[bytes, None] = field(default_factory=dict)


class Encoder:
    """`room_bytes`: what parities may take, complete or not."""

    def __init__(self, room_bytes: int) -> None:
        self.used_bytes = 0
        self.evictions = 0
        self.restored = 0  # shards
        self.refused = 0
        self.checksum_failures = 0  # of shards as they were restored
        self._room_bytes = room_bytes
        self._open: OrderedDict[Key, _Entry] = OrderedDict()  # incomplete, the longest without progress first
        self._complete: OrderedDict[Key, _Entry] = OrderedDict()  # least recently used first
        self._jobs: dict[Key, _Job] = {}
        self._heard: dict[tuple[PipelineId, int], float] = {}  # when blocks of a stage came last
        self._news: dict[tuple[PipelineId, int], _News] = {}

    # ------------------------------------------------------------------ what is here

    def names(self, pipeline: PipelineId) -> list[bytes]:
        return [name for entries in (self._open, self._complete) for of, name in entries if of == pipeline]

    def is_complete(self, key: Key) -> bool:
        return key in self._complete

    def shape(self, key: Key) -> Shape | None:
        entry = self._complete.get(key) or self._open.get(key)
        return None if entry is None else entry.shape

    def has(self, key: Key, stage: int) -> bool:
        """Whether the stage's shard of a name is in."""
        entry = self._complete.get(key) or self._open.get(key)
        return entry is not None and stage in entry.sums

    def whole(self, pipeline: PipelineId, stage: int, fence: Fence) -> ShardAckMeta:
        """The answer to a query. What else there is to tell that stage is in it."""
        self._news.pop((pipeline, stage), None)
        names, flags = [], bytearray()
        for entries, whole in ((self._open, 0), (self._complete, WHOLE)):
            for (of, name), entry in entries.items():
                if of == pipeline:
                    names.append(name)
                    flags.append(whole | (MINE if stage in entry.sums else 0))
        return ShardAckMeta(pipeline, fence, whole=True, names=b"".join(names), flags=bytes(flags))

    def news(self) -> list[tuple[PipelineId, int, _News]]:
        """What stages have to be told, by pipeline and stage."""
        news, self._news = self._news, {}
        return [(pipeline, stage, each) for (pipeline, stage), each in news.items()]

    # ------------------------------------------------------------------ shards come

    def arrived(
        self, key: Key, stage: int, shape: Shape, checksum: int, place: int, now: float
    ) -> list[Effect]:
        """A shard, whose bytes are as its stage says. It may come again, late, and in any order."""
        told = self._told(key[0], stage)
        code = checked(shape)
        if code is None or not 0 <= stage < shape.shards:
            told.full[key[1]] = None
            return []
        effects: list[Effect] = []
        entry = self._complete.get(key) or self._open.get(key)
        if entry is not None and not self._fits(entry, stage, shape, checksum):
            idle = now - entry.added_at >= IDLE_LIMIT_S
            if idle or stage in entry.sums:
                # Its shape gets no further, and all stages may have another by now. Or the stage's bytes are others:
                # equal names mean equal bytes, so one of them is not as it was computed, and nothing says which.
                effects += self._drop(key)
            if not idle:
                # Stages that differ would drop each other's shards as fast as links take them: this one waits.
                told.gone.pop(key[1], None)
                told.full[key[1]] = None
                return effects
            entry = None
        if entry is None:
            size_bytes = shape.parities * code.parity_bytes(shape.longest)
            room = self._make_room(size_bytes, now)
            if room is None:
                told.full[key[1]] = None
                return effects
            entry = self._open[key] = _Entry(shape, size_bytes, now)
            self.used_bytes += size_bytes
            effects += [*room, Open(key, shape)]
        told.added[key[1]] = None
        told.gone.pop(key[1], None)
        if stage not in entry.sums:
            entry.sums[stage] = checksum
            entry.added_at = now
            effects.append(Add(key, stage, place))
            if self._all_in(entry):
                self._complete[key] = self._open.pop(key)
                for each in range(shape.shards):
                    self._told(key[0], each).complete[key[1]] = None
            else:
                self._open.move_to_end(key)
        elif key in self._complete:
            told.complete[key[1]] = None  # what was said first may be lost
        return effects

    def damaged(self, key: Key, stage: int) -> None:
        """A shard has arrived with other bytes than its stage has sent."""
        self._told(key[0], stage).damaged[key[1]] = None

    def dropped(self, pipeline: PipelineId, stage: int, names: Iterable[bytes]) -> list[Effect]:
        """A stage has these no more, and nobody will need them."""
        effects: list[Effect] = []
        for name in names:
            effects += self._drop((pipeline, name))
            told = self._told(pipeline, stage)
            told.gone.pop(name, None)
            told.left[name] = None
        return effects

    def retain(self, pipelines: Collection[PipelineId]) -> list[Effect]:
        """Nobody asks for parity of other pipelines here."""
        stale = [
            key for entries in (self._open, self._complete) for key in entries if key[0] not in pipelines
        ]
        effects = [effect for key in stale for effect in self._drop(key)]
        self._news = {line: news for line, news in self._news.items() if line[0] in pipelines}
        return effects

    # ------------------------------------------------------------------ shards are restored

    def asked(
        self, pipeline: PipelineId, fence: Fence, stage: int, by: Member, names: Sequence[bytes], now: float
    ) -> list[Effect]:
        """A stage lacks its blocks of these names."""
        effects: list[Effect] = []
        fetches: dict[int, list[bytes]] = {}
        for name in names:
            key = pipeline, name
            job = self._jobs.get(key)
            if job is not None and job.fence < fence:
                effects += self._end(key)
                job = None
            entry = self._complete.get(key)
            if job is None:
                if entry is None or stage >= entry.shape.shards or len(self._jobs) >= JOBS_MAX:
                    self.refused += 1
                    effects.append(Refuse(key, fence, stage, by))
                    continue
                self._complete.move_to_end(key)
                others = set(range(entry.shape.shards)) - {stage}
                job = self._jobs[key] = _Job(fence, entry.shape, dict(entry.sums), now, others)
                effects.append(Begin(key))
                for other in sorted(others):
                    fetches.setdefault(other, []).append(name)
            job.askers[stage] = by
            effects += self._lacks(key, job, stage)
        effects += [Fetch(pipeline, fence, other, tuple(some)) for other, some in fetches.items()]
        return effects

    def heard(self, pipeline: PipelineId, stage: int, now: float) -> None:
        """Blocks of a surviving stage have come: those that it has not sent yet are on their way."""
        self._heard[pipeline, stage] = now

    def survived(self, key: Key, fence: Fence, stage: int, checksum: int, place: int) -> list[Effect]:
        """A surviving stage's block has come, for the copy of a name's parities."""
        job = self._jobs.get(key)
        if job is None or job.fence != fence or stage not in job.waits:
            return []
        if job.sums.get(stage) != checksum:
            return self._lacks(key, job, stage)  # not what went into the parity
        job.waits.discard(stage)
        return [TakeOut(key, stage, place), *self._ready(key, job)]

    def lacks(self, pipeline: PipelineId, fence: Fence, stage: int, names: Iterable[bytes]) -> list[Effect]:
        """A stage that was asked has no block of these names, or cannot be reached."""
        effects: list[Effect] = []
        for name in names:
            job = self._jobs.get((pipeline, name))
            if job is not None and job.fence == fence:
                effects += self._lacks((pipeline, name), job, stage)
        return effects

    def solved(self, key: Key, sums: Mapping[int, int]) -> list[Effect]:
        """The shards of lost stages are worked out and have these checksums."""
        job = self._jobs.get(key)
        if job is None:
            return []
        if not self._sound(job, sums):
            # Its memory has changed: it restores nothing, and stages send their blocks again.
            self.checksum_failures += 1
            return [*self._refuse(key, job), *self._drop(key)]
        self.restored += len(job.askers)
        sent = [Send(key, job.fence, stage, to, sums[stage]) for stage, to in job.askers.items()]
        return [*sent, *self._end(key)]

    def expire(self, now: float) -> list[Effect]:
        if not self._jobs:
            self._heard.clear()
        late = [
            (key, job) for key, job in self._jobs.items() if self._silent_s(key[0], job, now) >= JOB_LIMIT_S
        ]
        return [effect for key, job in late for effect in self._refuse(key, job)]

    def void(self, pipeline: PipelineId) -> list[Effect]:
        """Another epoch has begun: nobody waits for what is under way."""
        return [effect for key in list(self._jobs) if key[0] == pipeline for effect in self._end(key)]

    # ------------------------------------------------------------------

    def _silent_s(self, pipeline: PipelineId, job: _Job, now: float) -> float:
        """For how long nothing has come of a stage that it waits for."""
        heard = min((self._heard.get((pipeline, stage), 0.0) for stage in job.waits), default=0.0)
        return now - max(job.since, heard)

    def _fits(self, entry: _Entry, stage: int, shape: Shape, checksum: int) -> bool:
        """What is in stays in, whatever shape its stage would choose now."""
        known = entry.sums.get(stage)
        return known == checksum or (known is None and entry.shape == shape)

    def _all_in(self, entry: _Entry) -> bool:
        return len(entry.sums) == entry.shape.shards

    def _sound(self, job: _Job, sums: Mapping[int, int]) -> bool:
        """Whether what was worked out is what went into the parity."""
        return all(job.sums.get(stage) == checksum for stage, checksum in sums.items())

    def _lacks(self, key: Key, job: _Job, stage: int) -> list[Effect]:
        if stage in job.lost:
            return []
        job.waits.discard(stage)
        job.lost.add(stage)
        if len(job.lost) > job.shape.parities:
            return self._refuse(key, job)
        return self._ready(key, job)

    def _ready(self, key: Key, job: _Job) -> list[Effect]:
        return [] if job.waits else [Solve(key, tuple(sorted(job.lost)))]

    def _refuse(self, key: Key, job: _Job) -> list[Effect]:
        self.refused += len(job.askers)
        refused = [Refuse(key, job.fence, stage, to) for stage, to in job.askers.items()]
        return [*refused, *self._end(key)]

    def _end(self, key: Key) -> list[Effect]:
        del self._jobs[key]
        return [End(key)]

    def _make_room(self, size_bytes: int, now: float) -> list[Effect] | None:
        """First what gets no further, then what is complete, least recently used first, and last what is on its way.
        None: it is too much in any case."""
        if size_bytes > self._room_bytes:
            return None
        effects: list[Effect] = []
        while self.used_bytes + size_bytes > self._room_bytes:
            oldest = next(iter(self._open), None)
            idle = oldest is not None and now - self._open[oldest].added_at >= IDLE_LIMIT_S
            key = oldest if idle else next(iter(self._complete), oldest)
            if key is None:
                return None
            self.evictions += 1
            effects += self._drop(key, full=True)
        return effects

    def _drop(self, key: Key, full: bool = False) -> list[Effect]:
        entry = self._complete.pop(key, None) or self._open.pop(key, None)
        if entry is None:
            return []
        self.used_bytes -= entry.size_bytes
        for stage in entry.sums:
            told = self._told(key[0], stage)
            told.added.pop(key[1], None)
            told.complete.pop(key[1], None)
            (told.full if full else told.gone)[key[1]] = None
        return [Close(key)]

    def _told(self, pipeline: PipelineId, stage: int) -> _News:
        return self._news.setdefault((pipeline, stage), _News())


@lru_cache(maxsize=64)
def checked(shape: Shape) -> Code | None:
    """The code of a shape; None: there is no such code, or it makes no sense."""
    if not 0 < shape.longest <= LONGEST_MAX:
        return None
    try:
        return make_code(shape.code, shape.shards, shape.parities)
    except ValueError:
        return None
