"""A stage that lacks blocks after a failure: whom to ask for them, and when its scheduler gets which answer.

For each name its encoder is asked first, then others that may have had its parity before nodes were borrowed. What none
of them can restore is computed again. The scheduler is answered request by request, as soon as it is known how far
each one's blocks reach, so that requests go on one after the other. Everything waits for a bounded time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.contract.ids import Member, NodeId, PipelineId
from dataplane.core.messages import Fence, RejoinMeta
from dataplane.core.prefix import unpack_names
from dataplane.core.restoring import Pace, RestoreSpeed

TRIES_MAX = 3  # encoders that are asked about a name
ATTEMPT_LIMIT_S = 1.0  # without anything from one of them that was asked
CONNECT_LIMIT_S = 0.5  # for a link to it
QUIET_LIMIT_S = 1.5  # without a block: the rest is computed again
QUESTION_LIMIT_S = 20.0  # in any case
SIGN_OF_LIFE_S = 0.5  # so often a scheduler hears that blocks come
# Asked for at a time, but two blocks in any case: 50 ms of a link of 10 Gbit/s, so that it never runs dry.
WINDOW_BLOCKS = 512
WINDOW_BYTES = 64 << 20


@dataclass(slots=True)
class _Attempt:
    """One name."""

    encoders: Sequence[Member]  # to be asked, best first
    tries: int = 0
    turn_at: float | None = None  # since when it is that one's turn
    here: bool | None = None  # None: not known yet

    @property
    def encoder(self) -> Member:
        return self.encoders[self.tries]


@dataclass(slots=True)
class Question:
    """One RejoinMeta. `lacking`: by request the names of blocks that are not here, first position first."""

    meta: RejoinMeta
    kept: bytes
    lacking: dict[int, list[bytes]]
    needed: frozenset[bytes]  # names of blocks of its requests, here or not
    since: float
    moved_at: float  # a block has come
    said_at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Of these requests it is known how far they are here; `last`: of all."""

    question: Question
    rids: tuple[int, ...]
    last: bool


@dataclass(slots=True)
class _Flight:
    """What one encoder has been asked for and has not answered."""

    names: dict[bytes, None] = field(default_factory=dict)
    moved_at: float = 0.0  # it was asked when nothing was outstanding, or something came


@dataclass(slots=True)
class _Pipeline:
    fence: Fence
    pace: Pace
    questions: list[Question] = field(default_factory=list)
    wanted: dict[bytes, _Attempt] = field(default_factory=dict)
    waiting: dict[bytes, None] = field(default_factory=dict)  # of these, nobody is asked for now
    flying: dict[Member, _Flight] = field(default_factory=dict)


class Restorer:
    """`block_bytes`: what a block counts for on the way. `company`: blocks that are asked for, and come, together."""

    def __init__(self, block_bytes: int, company: int = 1) -> None:
        self.blocks_restored = 0
        self.blocks_refused = 0
        self.speed = RestoreSpeed()
        self._company = company
        self._window = max(2, min(WINDOW_BLOCKS, WINDOW_BYTES // block_bytes))
        self._pipelines: dict[PipelineId, _Pipeline] = {}

    @property
    def pipelines(self) -> set[PipelineId]:
        """For which blocks are on their way."""
        return set(self._pipelines)

    @property
    def outstanding(self) -> int:
        """Blocks that are still to come, as many as are asked for at a time at most."""
        states = self._pipelines.values()
        flying = sum(len(flight.names) for state in states for flight in state.flying.values())
        return min(self._window, flying + sum(len(state.waiting) for state in states))

    @property
    def needed(self) -> frozenset[bytes]:
        """Names of blocks of requests that wait: those that are here make no room for the others."""
        sets = [q.needed for state in self._pipelines.values() for q in state.questions]
        return sets[0] if len(sets) == 1 else frozenset().union(*sets)  # nearly always one, and large

    def begin(
        self,
        meta: RejoinMeta,
        kept: bytes,
        lacking: dict[int, list[bytes]],
        encoders: Mapping[bytes, Sequence[Member]],
        now: float,
    ) -> None:
        """A scheduler asks, and not all is here. `encoders`: of each name that is lacking, best first."""
        state = self._pipelines.get(meta.pipeline)
        if state is None or state.fence != meta.fence:
            state = self._pipelines[meta.pipeline] = _Pipeline(meta.fence, Pace(now))
        needed = frozenset(name for packed in meta.names for name in unpack_names(packed))
        state.questions.append(Question(meta, kept, lacking, needed, now, now, now))
        for names in lacking.values():
            for name in names:
                if name not in state.wanted:
                    state.wanted[name] = _Attempt(tuple(encoders[name])[:TRIES_MAX])
                    state.waiting[name] = None

    def void(self, pipeline: PipelineId, fence: Fence | None = None) -> None:
        """Nobody waits for answers any more: of an older fence than this one, or of any."""
        state = self._pipelines.get(pipeline)
        if state is not None and (fence is None or state.fence < fence):
            del self._pipelines[pipeline]

    # ------------------------------------------------------------------ asking

    def next(self, now: float, room: int) -> list[tuple[PipelineId, Fence, Member, list[bytes]]]:
        """Names to ask encoders for now; `room`: blocks that could be stored."""
        asked: list[tuple[PipelineId, Fence, Member, list[bytes]]] = []
        for pipeline, state in self._pipelines.items():
            for flight in state.flying.values():
                if flight.names and now - flight.moved_at >= ATTEMPT_LIMIT_S:
                    for name in list(flight.names):
                        self._next_one(state, name)
            left = min(self._window, room) - sum(len(flight.names) for flight in state.flying.values())
            if not state.waiting or left <= 0:
                continue
            for encoder, names in self._chosen(state, left).items():
                flight = state.flying.setdefault(encoder, _Flight())
                if not flight.names:
                    flight.moved_at = now
                for name in names:
                    del state.waiting[name]
                    flight.names[name] = None
                    attempt = state.wanted[name]
                    attempt.turn_at = attempt.turn_at or now
                asked.append((pipeline, state.fence, encoder, names))
        return asked

    def _chosen(self, state: _Pipeline, left: int) -> dict[Member, list[bytes]]:
        """The first `left` names that wait, by encoder. An encoder that is at work is asked for no fewer than go
        together, unless these are the last: one question for each block would make each a message of its own, at
        every stage."""
        by_encoder: dict[Member, list[bytes]] = {}
        last = True
        for name in state.waiting:
            if left <= 0:
                last = False
                break
            by_encoder.setdefault(state.wanted[name].encoder, []).append(name)
            left -= 1
        if last:
            return by_encoder
        at_work = {encoder for encoder, flight in state.flying.items() if flight.names}
        return {
            encoder: names
            for encoder, names in by_encoder.items()
            if encoder not in at_work or len(names) >= self._company
        }

    def unreachable(self, pipeline: PipelineId, names: Iterable[bytes], now: float) -> None:
        """There is no link to the encoder yet: it is asked again, for a while."""
        state = self._pipelines[pipeline]
        for name in names:
            attempt = state.wanted[name]
            self._land(state, name, again=True)
            if attempt.turn_at is not None and now - attempt.turn_at >= CONNECT_LIMIT_S:
                self._next_one(state, name)

    def link_changed(self, node: NodeId) -> None:
        """What was asked there may be lost."""
        for state in self._pipelines.values():
            for encoder, flight in state.flying.items():
                if encoder.node == node:
                    for name in list(flight.names):
                        self._land(state, name, again=True)

    # ------------------------------------------------------------------ what comes of it

    def wants(self, pipeline: PipelineId, fence: Fence, name: bytes) -> bool:
        """Whether anybody still waits for this block."""
        state = self._pipelines.get(pipeline)
        return state is not None and state.fence == fence and name in state.wanted

    def arrived(self, pipeline: PipelineId, name: bytes, now: float) -> None:
        """The block is here."""
        state = self._pipelines.get(pipeline)
        attempt = state.wanted.get(name) if state is not None else None
        if state is not None and attempt is not None and attempt.here is not True:
            attempt.here = True
            self.blocks_restored += 1
            state.pace.came(now)
            if (flight := state.flying.get(attempt.encoder)) is not None:
                flight.moved_at = now
            self._land(state, name)
            for question in state.questions:
                question.moved_at = now

    def refused(self, pipeline: PipelineId, fence: Fence, encoder: Member, names: Iterable[bytes]) -> None:
        """An encoder cannot restore these."""
        state = self._pipelines.get(pipeline)
        if state is None or state.fence != fence:
            return
        for name in names:
            attempt = state.wanted.get(name)
            if attempt is not None and attempt.here is None and attempt.encoder == encoder:
                self._next_one(state, name)

    def answers(self, now: float) -> list[Answer]:
        """What schedulers can be told now. What is told in the last answer of a question is forgotten."""
        answers: list[Answer] = []
        for pipeline, state in list(self._pipelines.items()):
            for question in list(state.questions):
                if now - question.moved_at >= QUIET_LIMIT_S or now - question.since >= QUESTION_LIMIT_S:
                    for names in question.lacking.values():
                        for name in names:
                            self._give_up(state, name)
                rids = tuple(rid for rid, names in question.lacking.items() if self._known(state, names))
                for rid in rids:
                    del question.lacking[rid]
                last = not question.lacking
                alive = now - question.said_at >= SIGN_OF_LIFE_S and question.moved_at > question.said_at
                if rids or last or alive:
                    question.said_at = now
                    answers.append(Answer(question, rids, last))
                if last:
                    state.questions.remove(question)
            if not state.questions:
                self.speed.ran(state.pace)
                del self._pipelines[pipeline]
            elif any(answer.rids for answer in answers):
                needed = {name for q in state.questions for names in q.lacking.values() for name in names}
                for name in state.wanted.keys() - needed:
                    self._land(state, name)
                    del state.wanted[name]
        return answers

    def _known(self, state: _Pipeline, names: Sequence[bytes]) -> bool:
        """Whether it is known how far these blocks reach: behind one that is missing none is of any use."""
        for name in names:
            here = state.wanted[name].here
            if not here:
                return here is False
        return True

    def _next_one(self, state: _Pipeline, name: bytes) -> None:
        """The next encoder is to be asked for it, if there is one."""
        attempt = state.wanted[name]
        self._land(state, name, again=attempt.tries + 1 < len(attempt.encoders))
        attempt.turn_at = None
        if attempt.tries + 1 < len(attempt.encoders):
            attempt.tries += 1
        else:
            self._give_up(state, name)

    def _land(self, state: _Pipeline, name: bytes, *, again: bool = False) -> None:
        """Nobody is asked for it any more; `again`: somebody is to be."""
        flight = state.flying.get(state.wanted[name].encoder)
        if flight is not None:
            flight.names.pop(name, None)
        if again:
            state.waiting[name] = None
        else:
            state.waiting.pop(name, None)

    def _give_up(self, state: _Pipeline, name: bytes) -> None:
        attempt = state.wanted[name]
        if attempt.here is None:
            attempt.here = False
            self._land(state, name)
            self.blocks_refused += 1
