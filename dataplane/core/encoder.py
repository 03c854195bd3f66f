"""A node as the encoder of other pipelines' chunks: shards are added to the parity one by one, as they arrive.

Never more is held than the parities and one shard. A stage offers its shard; the encoder fetches one at a time, adds
it once, and lets it go. A chunk is acknowledged when all its shards are in its parity, and not before: with one
missing, the parity restores nothing.

Effects are to be performed in their order. What cannot be had is refused, and the ledger (parity.py) knows when to
order it again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from dataplane.core.parity import Chunk

FETCH_LIMIT_S = 2.0  # a stage that was asked for its shard and is silent for so long holds the others up
OPEN_LIMIT_S = 30.0  # without a further shard: the chunk is given up, its parity takes room


@dataclass(frozen=True, slots=True)
class Shape:
    shards: int  # N: one from each stage
    parity_bytes: int  # of all parities together


@dataclass(frozen=True, slots=True)
class Open:
    """Make room for the parities of a chunk: zeros."""

    chunk: Chunk
    parity_bytes: int


@dataclass(frozen=True, slots=True)
class Fetch:
    chunk: Chunk
    stage: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """What arrives of this fetch from now on is thrown away."""

    chunk: Chunk
    stage: int


@dataclass(frozen=True, slots=True)
class Add:
    """Add the shard that has arrived to the parities, and let it go."""

    chunk: Chunk
    stage: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The parity is over all shards."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Refuse:
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Drop:
    """The parities go, and their room is free."""

    chunk: Chunk


Effect = Open | Fetch | Cancel | Add | Acknowledge | Refuse | Drop


@dataclass(slots=True)
class _Work:
    chunk: Chunk
    shape: Shape
    progress_at: float
    begun: bool = False  # its parities are there
    waiting: dict[int, None] = field(default_factory=dict)  # stages whose shards can be fetched, in order
    added: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.added) == self.shape.shards


class ChunkEncoder:
    def __init__(self, room_bytes: int) -> None:
        """`room_bytes`: what parities may take, complete or not."""
        self._room_bytes = room_bytes
        self._used_bytes = 0
        self._work: dict[tuple[int, int], _Work] = {}  # by request and index, oldest first
        self._fetching: Fetch | None = None
        self._fetched_at = 0.0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def complete(self) -> list[Chunk]:
        """Chunks whose shards can be restored from here."""
        return [work.chunk for work in self._work.values() if work.complete]

    def offered(self, chunk: Chunk, stage: int, shape: Shape, now: float) -> list[Effect]:
        """A stage has its shard ready. Offers may come twice, late, and in any order."""
        work, effects = self._work.get((chunk.rid, chunk.index)), []
        if work is not None and chunk.version > work.chunk.version:
            effects += self._drop(work)
            work = None
        if work is not None and chunk.version < work.chunk.version:
            return []
        if not 0 <= stage < shape.shards or shape.parity_bytes > self._room_bytes:
            return [*effects, Refuse(chunk)]
        if work is None:
            work = self._work[chunk.rid, chunk.index] = _Work(chunk, shape, now)
        if work.shape != shape:
            return [*self._drop(work), Refuse(chunk), *self._next(now)]
        if work.complete:
            return [Acknowledge(chunk)]  # the first one may be lost
        if stage not in work.added:
            work.waiting[stage] = None
        return [*effects, *self._next(now)]

    def arrived(self, chunk: Chunk, stage: int, now: float) -> list[Effect]:
        """The shard that was fetched is here. One that was not, or no longer, has no effect and is thrown away."""
        if self._fetching != Fetch(chunk, stage):
            return []
        self._fetching = None
        effects: list[Effect] = []
        work = self._work.get((chunk.rid, chunk.index))
        # Nothing begins while a shard is fetched: what has begun is this chunk, not one that took its place.
        if work is not None and work.begun:
            work.waiting.pop(stage, None)  # offered once more meanwhile
            work.added.add(stage)
            work.progress_at = now
            effects.append(Add(chunk, stage))
            if work.complete:
                effects.append(Acknowledge(chunk))
        return [*effects, *self._next(now)]

    def freed(self, rids: Collection[int], now: float) -> list[Effect]:
        """Their pipelines need these requests' parity no longer."""
        gone = [work for work in self._work.values() if work.chunk.rid in rids]
        return [effect for work in gone for effect in self._drop(work)] + self._next(now)

    def expire(self, now: float) -> list[Effect]:
        """Gives up a fetch that takes too long, and chunks that get no further: their stages may be gone."""
        effects: list[Effect] = []
        if self._fetching is not None and now - self._fetched_at >= FETCH_LIMIT_S:
            effects.append(Cancel(self._fetching.chunk, self._fetching.stage))
            self._fetching = None
        for work in list(self._work.values()):
            if not work.complete and now - work.progress_at >= OPEN_LIMIT_S:
                effects += [*self._drop(work), Refuse(work.chunk)]
        return [*effects, *self._next(now)]

    # ------------------------------------------------------------------

    def _next(self, now: float) -> list[Effect]:
        """The next shard to fetch: chunks are completed in the order in which they came, as far as shards are there.
        One for whose parities there is no room is refused."""
        effects: list[Effect] = []
        if self._fetching is not None:
            return effects
        for work in list(self._work.values()):
            if not work.waiting:
                continue
            if not work.begun:
                if self._used_bytes + work.shape.parity_bytes > self._room_bytes:
                    effects += [*self._drop(work), Refuse(work.chunk)]
                    continue
                work.begun = True
                self._used_bytes += work.shape.parity_bytes
                effects.append(Open(work.chunk, work.shape.parity_bytes))
            stage = next(iter(work.waiting))
            del work.waiting[stage]
            self._fetching, self._fetched_at = Fetch(work.chunk, stage), now
            return [*effects, self._fetching]
        return effects

    def _drop(self, work: _Work) -> list[Effect]:
        """A shard of it that is being fetched arrives all the same: until then nothing else is fetched."""
        del self._work[work.chunk.rid, work.chunk.index]
        if not work.begun:
            return []
        self._used_bytes -= work.shape.parity_bytes
        return [Drop(work.chunk)]
