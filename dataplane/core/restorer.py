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

TRIES_MAX = 3  # encoders that are asked about a name
ATTEMPT_LIMIT_S = 1.0  # for one of them
CONNECT_LIMIT_S = 0.5  # for a link to it
QUIET_LIMIT_S = 1.5  # without a block: the rest is computed again
QUESTION_LIMIT_S = 20.0  # in any case
SIGN_OF_LIFE_S = 0.5  # so often a scheduler hears that blocks come
WINDOW_BLOCKS = 64  # asked for at a time ...
WINDOW_BYTES = 32 << 20  # ... and no more bytes than that, but two blocks in any case


@dataclass(slots=True)
class _Attempt:
    """One name."""

    encoders: Sequence[Member]  # to be asked, best first
    tries: int = 0
    turn_at: float | None = None  # since when it is that one's turn
    asked_at: float | None = None  # None: not asked yet
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
class _Pipeline:
    fence: Fence
    questions: list[Question] = field(default_factory=list)
    wanted: dict[bytes, _Attempt] = field(default_factory=dict)


class Restorer:
    def __init__(self, block_bytes: int) -> None:
        self.blocks_restored = 0
        self.blocks_refused = 0
        self._window = max(2, min(WINDOW_BLOCKS, WINDOW_BYTES // block_bytes))
        self._pipelines: dict[PipelineId, _Pipeline] = {}

    @property
    def pipelines(self) -> set[PipelineId]:
        """For which blocks are on their way."""
        return set(self._pipelines)

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
            state = self._pipelines[meta.pipeline] = _Pipeline(meta.fence)
        state.questions.append(Question(meta, kept, lacking, now, now, now))
        for names in lacking.values():
            for name in names:
                state.wanted.setdefault(name, _Attempt(tuple(encoders[name])[:TRIES_MAX]))

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
            for attempt in state.wanted.values():
                late = attempt.asked_at is not None and now - attempt.asked_at >= ATTEMPT_LIMIT_S
                if late and attempt.here is None:
                    self._next_one(attempt)
            flying = sum(a.asked_at is not None and a.here is None for a in state.wanted.values())
            left = min(self._window, room) - flying
            by_encoder: dict[Member, list[bytes]] = {}
            for name, attempt in state.wanted.items():
                if left <= 0:
                    break
                if attempt.here is None and attempt.asked_at is None:
                    attempt.asked_at = now
                    attempt.turn_at = attempt.turn_at or now
                    by_encoder.setdefault(attempt.encoder, []).append(name)
                    left -= 1
            asked += [(pipeline, state.fence, encoder, names) for encoder, names in by_encoder.items()]
        return asked

    def unreachable(self, pipeline: PipelineId, names: Iterable[bytes], now: float) -> None:
        """There is no link to the encoder yet: it is asked again, for a while."""
        state = self._pipelines[pipeline]
        for name in names:
            attempt = state.wanted[name]
            attempt.asked_at = None
            if attempt.turn_at is not None and now - attempt.turn_at >= CONNECT_LIMIT_S:
                self._next_one(attempt)

    def link_changed(self, node: NodeId) -> None:
        """What was asked there may be lost."""
        for state in self._pipelines.values():
            for attempt in state.wanted.values():
                if attempt.here is None and attempt.asked_at is not None and attempt.encoder.node == node:
                    attempt.asked_at = None

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
                self._next_one(attempt)

    def answers(self, now: float) -> list[Answer]:
        """What schedulers can be told now. What is told in the last answer of a question is forgotten."""
        answers: list[Answer] = []
        for pipeline, state in list(self._pipelines.items()):
            for question in list(state.questions):
                if now - question.moved_at >= QUIET_LIMIT_S or now - question.since >= QUESTION_LIMIT_S:
                    for names in question.lacking.values():
                        for name in names:
                            self._give_up(state.wanted[name])
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
                del self._pipelines[pipeline]
            elif any(answer.rids for answer in answers):
                needed = {name for q in state.questions for names in q.lacking.values() for name in names}
                state.wanted = {name: a for name, a in state.wanted.items() if name in needed}
        return answers

    def _known(self, state: _Pipeline, names: Sequence[bytes]) -> bool:
        """Whether it is known how far these blocks reach: behind one that is missing none is of any use."""
        for name in names:
            here = state.wanted[name].here
            if not here:
                return here is False
        return True

    def _next_one(self, attempt: _Attempt) -> None:
        attempt.tries += 1
        attempt.turn_at = attempt.asked_at = None
        if attempt.tries >= len(attempt.encoders):
            self._give_up(attempt)

    def _give_up(self, attempt: _Attempt) -> None:
        if attempt.here is None:
            attempt.here = False
            self.blocks_refused += 1
