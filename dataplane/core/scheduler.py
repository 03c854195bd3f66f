"""The scheduler of one pipeline: continuous batching, chunked prefill, and resumption after any change.

`step(event, now) -> list[Effect]`. It keeps as many microbatches in flight as the pipeline's stages can compute at
the same time, and the token log of every request. All recovery is one thing, `_resync`: forget what is in flight,
ask every stage how much KV it holds, resume each request at the minimum, recompute the tail from the log.
"""

from __future__ import annotations

from itertools import accumulate, takewhile
from typing import assert_never

from msgspec.structs import replace

from controlplane.contract.ids import NodeId, PipelineId
from controlplane.contract.loads import work
from controlplane.contract.requests import Log, RefusalCode, Refused, Submit, Token
from dataplane.core.admission import no_room, refusal
from dataplane.core.batching import Batcher, Limits
from dataplane.core.events import (
    Cancelled,
    CandidatesChanged,
    CapacityChanged,
    Deliver,
    Effect,
    EpochBegan,
    Event,
    Recovered,
    Refuse,
    SessionLost,
    Submitted,
    Tell,
    Tick,
)
from dataplane.core.holders import Holders
from dataplane.core.kept import Kept
from dataplane.core.messages import (
    CopiedMeta,
    Fence,
    HeldMeta,
    LoadMeta,
    LostMeta,
    ReadyMeta,
    ResultMeta,
    StepFailedMeta,
)
from dataplane.core.patience import STALL_LIMIT_S, Patience
from dataplane.core.prefix import PrefixHasher, unpack_names
from dataplane.core.questions import Questions
from dataplane.core.recovery import HeldCollector, Recovery
from dataplane.core.request import Phase, Request, unpack_tokens
from dataplane.core.speculation import Proposer, Speculator
from dataplane.core.stats import SchedulerStats
from dataplane.core.steps import InFlight, Steps

RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1.0, 60.0  # told to whom the queue has no room for
# Pause before the next attempt when a stage could not run a step or pass it on; doubled each time in a row.
FAILED_RETRY_S, FAILED_RETRY_MAX_S = 0.05, 0.8
# A request whose grammar the last stage compiles is tried again after this if nothing is heard: its word may be lost.
BLOCKED_RETRY_S = 1.0
SCORES_MISSED_MAX = 3  # times that a prompt was computed and its log probabilities did not come
# A pipeline whose stage had no room for its quota tries it again after this; doubled each time, until that changes.
SPACE_RETRY_S, SPACE_RETRY_MAX_S = 5.0, 80.0


class Scheduler:
    def __init__(
        self,
        pipeline: str,
        epoch: int,
        num_stages: int,
        limits: Limits,
        *,
        takeover: bool,
        planned: bool = False,
        salt: bytes = b"",
        now: float,
        proposer: Proposer | None = None,
    ) -> None:
        """`takeover`: an earlier scheduler may have left KV of requests that gateways will re-submit; `planned`: it was
        alive, and moved here. `salt`: what decides the bits of KV besides tokens. `proposer`: of drafts, where the
        limits ask for a draft model.

        What nobody claims within the orphan grace is then given back on every stage.
        """
        self.pipeline = pipeline
        self.num_stages = num_stages
        self.fence = Fence(epoch, 0)
        self.limits = limits
        self._salt = salt
        self.stats = SchedulerStats()
        self.requests: dict[int, Request] = {}
        self.bytes_kept = 0  # of `requests`
        self.kept = Kept(limits.orphan_grace_s, limits.max_running + limits.max_waiting)
        self.batcher = Batcher(limits)
        self.steps = Steps(pipeline)
        self.holders: Holders | None = None  # of requests' copies, where each has one of its own
        self._proposer = proposer
        self.speculator = Speculator(limits, proposer, self.stats)
        self._order = 0
        self.questions = Questions(pipeline, num_stages)
        self._frees: list[int] = []  # whose blocks the account has released
        self._drops: list[int] = []  # of which stages may have blocks that the account does not know
        self._hold_until = 0.0
        self._retry_s = FAILED_RETRY_S
        self._quota_given = 0  # blocks; the batcher has fewer while a stage has no room for them
        self._quota_retry_s = SPACE_RETRY_S
        self._quota_retry_at: float | None = None
        self._microbatches = 1  # given; the batcher has fewer while the stages seem too slow
        self._patience = Patience(limits.max_batch_tokens)
        self._recovery: Recovery | None = Recovery(epoch, planned, now) if takeover else None
        self._sweep_at: float | None = now + limits.orphan_grace_s if takeover else None

    # ------------------------------------------------------------------ events

    def step(self, event: Event, now: float) -> list[Effect]:
        effects: list[Effect] = []
        news: list[Effect] = []  # after the next step: stages wait for it, gateways can
        match event:
            case Submitted(message, session):
                self._submit(message, session, now, effects)
            case Cancelled(rid, session):
                request = self.requests.get(rid)
                if request is not None and (session is None or request.session in (None, session)):
                    self._retire(request, now)
            case SessionLost(session):
                self._lose_session(session, now)
            case EpochBegan(epoch, planned, salt):
                self._rename(salt)
                self._recovery = Recovery(epoch, planned, now)
                self._patience.reset()
                self._bound_steps()
                self._resync(Fence(epoch, 0), now, effects)
            case CapacityChanged(blocks, microbatches, shared):
                self._microbatches, self.batcher.shared = microbatches, shared
                self._bound_steps()
                if blocks != self._quota_given:
                    self._quota_given, self._quota_retry_s, self._quota_retry_at = blocks, SPACE_RETRY_S, None
                    self._set_quota(blocks)
            case CandidatesChanged(candidates, fixed):
                self._choose_among(candidates, fixed)
            case LoadMeta(pipeline, _, load):
                if self.holders is not None:
                    self.holders.heard(pipeline, load, now)
            case CopiedMeta():
                if self.holders is not None and event.fence == self.fence:
                    for rid, holder in event.lost:
                        self.holders.lost(event.stage, rid, holder)
                    for rid, holder in event.placed:
                        self.holders.copied(event.stage, rid, holder)
            case Tick():
                self._tick(now, effects)
            case ResultMeta():
                self._result(event, now, effects, news)
            case StepFailedMeta():
                if event.fence == self.fence and event.step in self.steps.in_flight:
                    self._failed(event, now, effects)
            case HeldMeta():
                self._held(event, now)
            case LostMeta():
                if event.fence == self.fence:
                    lost = unpack_names(event.names)
                    self.batcher.account.forget(lost)
                    self.questions.gone(lost)
            case ReadyMeta():
                for rid in event.rids if event.fence == self.fence else ():
                    if (request := self.requests.get(rid)) is not None:
                        request.unblock()
            case _:
                assert_never(event)
        if joining := self.questions.next_joining():
            asked = [self.requests[rid] for rid in joining]
            effects.append(self.questions.ask(self.fence, asked, now, computing=self.batcher.computing))
        self._issue(now, effects)
        if self.holders is not None:
            news += self._tell_holders(self.holders)
        return effects + news

    # ------------------------------------------------------------------ for reports

    @property
    def running(self) -> int:
        return sum(r.phase is not Phase.WAITING for r in self.requests.values())

    @property
    def waiting(self) -> int:
        return len(self.requests) - self.running

    @property
    def tokens(self) -> tuple[int, int]:
        """Positions of its requests that have KV, and those of them in blocks that are not full."""
        held = [r.issued for r in self.requests.values() if r.phase is Phase.RUNNING]
        return sum(held), sum(tokens % self.limits.block_size for tokens in held)

    @property
    def unheld_tokens(self) -> int:
        """Of these, positions in full blocks of requests that no instance holds; -1: none is to hold any."""
        if self.holders is None:
            return -1
        size, holder = self.limits.block_size, self.holders.holder
        running = (r for r in self.requests.values() if r.phase is Phase.RUNNING)
        return sum(r.issued - r.issued % size for r in running if holder(r.rid) is None)

    @property
    def work(self) -> int:
        """What this pipeline has to do, in tokens (contract/loads.py)."""
        left = sum(r.total - r.issued for r in self.requests.values() if r.total - r.issued > 1)
        return work(len(self.requests), left)

    def recall(self, rid: int) -> Log | None:
        """The log of a request that runs here, or did a moment ago."""
        request = self.requests.get(rid) or self.kept.get(rid)
        return None if request is None else request.log(self.pipeline)

    def held_up(self, now: float) -> tuple[float, int]:
        """For how long the oldest step is in flight, or a stage has not said what it holds if that is longer; and which
        stage (-1: it is a step)."""
        step = self.steps.oldest(now)
        oldest = self.questions.waited_for()
        if oldest is None or oldest.since >= step:
            return now - step, -1
        return now - oldest.since, min(oldest.stages_missing)

    # ------------------------------------------------------------------ requests

    def _submit(self, message: Submit, session: int, now: float, effects: list[Effect]) -> None:
        known = self.requests.get(message.rid) or self.kept.get(message.rid)
        if known is not None and (known.rid in self.requests or len(message.emitted) <= len(known.output)):
            self._attach(known, message, session, effects)
            return
        self.kept.pop(message.rid)  # it went on elsewhere meanwhile
        refused = refusal(message, self.batcher, self.bytes_kept)
        if refused is not None:
            code, text = refused
            retry = self._queue_s(now) if code is RefusalCode.OVERLOADED else 0.0
            effects.append(Refuse(session, Refused(message.rid, self.pipeline, code, text, retry)))
            return
        request = Request.from_submit(message, self._order, session)
        request.arrived = now
        request.hasher = self._hasher(request)
        self._order += 1
        self._add(request)
        # After a takeover stages may hold KV of a stream that its client takes up from the start.
        left_over = self._sweep_at is not None and message.context is not None
        if message.admitted or message.emitted or left_over:
            request.phase = Phase.RECOVERING
            self.questions.joining.append(request.rid)
        else:
            self.batcher.enqueue(request)

    def _attach(self, known: Request, message: Submit, session: int, effects: list[Effect]) -> None:
        """Somebody reads a request on that is here already: send what that reader has not."""
        # Who goes on with a request may be of a release that does not know all of its sampling.
        same = message.admitted or message.sampling == known.sampling
        if not same or list(message.prompt) != known.ids[: known.prompt_len]:
            text = "this Idempotency-Key was used with another body"
            effects.append(Refuse(session, Refused(known.rid, self.pipeline, RefusalCode.INVALID, text)))
            return
        text = "another connection reads this stream now"
        superseded = Refused(known.rid, self.pipeline, RefusalCode.SUPERSEDED, text)
        if message.reader < known.reader:
            # The sender may not have been able to ask here which readers there were: it is told.
            effects.append(Refuse(session, replace(superseded, reader=known.reader)))
            return
        if known.session is not None and known.session != session:
            effects.append(Refuse(known.session, superseded))
        have = len(message.emitted)
        again = known.lacks_logprobs(have)
        if again:
            known.truncate(have)
            if known.phase is Phase.RUNNING and known.rid in self.requests:
                self._preempted(known)
        known.reader = message.reader
        if known.rid not in self.requests and (again or not known.finished):
            self.kept.pop(known.rid)
            self._add(known)
            known.hasher = self._hasher(known)
            known.rewind(Phase.WAITING)
            self.batcher.enqueue(known)
        if known.rid in self.requests:
            known.session, known.orphaned_at = session, None
            if self.holders is not None:
                self.holders.tell(known.rid)
        missed = tuple(known.output[have:])
        if missed:
            effects.append(Deliver(session, missed))
        elif known.finished:  # who asks has its end: that cannot be said with tokens
            text = "this request has ended, and nothing is left of it"
            effects.append(Refuse(session, Refused(known.rid, self.pipeline, RefusalCode.INVALID, text)))

    def _queue_s(self, now: float) -> float:
        """How long a new request would wait: about as long as the oldest in the queue has, within reason."""
        arrived = min((r.arrived for r in self.requests.values() if r.phase is Phase.WAITING), default=now)
        return min(max(RETRY_AFTER_MIN_S, now - arrived), RETRY_AFTER_MAX_S)

    def _add(self, request: Request) -> None:
        self.requests[request.rid] = request
        self.bytes_kept += request.bytes_kept

    def _drop(self, rid: int) -> None:
        """The request ends here: its KV is given back on every stage with the next step."""
        request = self.requests.pop(rid, None)
        if request is None:
            return
        self.bytes_kept -= request.bytes_kept
        request.ngrams = None
        self.speculator.forget(rid)
        if self.holders is not None:
            self.holders.release(rid)
        (self._frees if rid in self.batcher.account else self._drops).append(rid)
        self.batcher.remove(request)
        if rid in self.questions.joining:
            self.questions.joining.remove(rid)

    def _retire(self, request: Request, now: float) -> None:
        """It has finished or nobody reads it: what its client may still come back for is the log."""
        self._drop(request.rid)
        request.session = request.orphaned_at = None
        if request.context is not None:
            self.kept.put(request, now)

    def _lose_session(self, session: int, now: float) -> None:
        for request in self.requests.values():
            if request.session == session:
                request.session, request.orphaned_at = None, now

    def _hasher(self, request: Request) -> PrefixHasher:
        return PrefixHasher(
            self.limits.block_size, len(self._salt).to_bytes(4, "little") + self._salt + request.salt
        )

    def _rename(self, salt: bytes) -> None:
        """Blocks that are computed from now on are equal to those of before only if nothing else decides their bits."""
        if salt != self._salt:
            self._salt = salt
            for request in self.requests.values():
                request.hasher = self._hasher(request)

    def _set_quota(self, blocks: int) -> None:
        self.batcher.quota_blocks = blocks
        for request in self.batcher.preempt_until_fits():
            self._preempted(request)

    def _preempted(self, request: Request) -> None:
        """Recompute later: what it holds is freed, its tokens stay in the log."""
        self.stats.preemptions += 1
        if self.holders is not None:
            self.holders.release(request.rid)
        self._frees.append(request.rid)
        request.rewind(Phase.WAITING)
        request.interrupted = False  # others go on meanwhile
        self.batcher.enqueue(request)

    def _choose_among(self, candidates: tuple[PipelineId, ...] | None, fixed: bool) -> None:
        if candidates is None:
            self.holders = None
            return
        if self.holders is None or self.holders.fixed != fixed:
            self.holders = Holders(self.num_stages, fixed=fixed)
        self.holders.allow(candidates)

    def _tell_holders(self, holders: Holders) -> list[Effect]:
        by_session: dict[int, list[tuple[int, PipelineId | None]]] = {}
        for rid, holder in holders.news():
            session = self.requests[rid].session
            if session is not None:
                by_session.setdefault(session, []).append((rid, holder))
        return [Tell(session, tuple(told)) for session, told in by_session.items()]

    def _tick(self, now: float, effects: list[Effect]) -> None:
        self.kept.expire(now)
        if self.holders is not None:
            self.holders.tick(now)
        if self._quota_retry_at is not None and now >= self._quota_retry_at:
            self._quota_retry_at = None
            self._quota_retry_s = min(2 * self._quota_retry_s, SPACE_RETRY_MAX_S)
            self._set_quota(self._quota_given)
        grace = self.limits.orphan_grace_s
        for request in list(self.requests.values()):
            if request.orphaned_at is not None and now - request.orphaned_at > grace:
                self.stats.orphans_dropped += 1
                self._drop(request.rid)
        self.batcher.unblock(now - BLOCKED_RETRY_S)
        for request in self.batcher.never_fits():
            self._drop(request.rid)
            if request.session is not None:
                code, text = no_room(request.total, self.batcher)
                refused = Refused(request.rid, self.pipeline, code, text, RETRY_AFTER_MIN_S)
                effects.append(Refuse(request.session, refused))
        if self._sweep_at is not None and now >= self._sweep_at:
            self._sweep_at = None
            ask = self.questions.ask(self.fence, self._alive(), now, complete=True, adopts=False, kept=True)
            effects.append(ask)
        if now - min(self.steps.oldest(now), self.questions.oldest(now)) > STALL_LIMIT_S:
            self._give_up_late(now, effects)

    # ------------------------------------------------------------------ recovery

    def _give_up_late(self, now: float, effects: list[Effect]) -> None:
        """Messages of what is unanswered for too long, for what steps take here, are lost."""
        step, rows = self.steps.oldest(now), self.steps.rows_max
        limit_s = self._patience.limit_s(max(self.steps.round_s, self.batcher.speed.expected_s(rows)))
        if now - min(step, self.questions.oldest(now)) > limit_s:
            self._patience.gave_up(limit_s, rows if now - step > limit_s else 0)
            self._bound_steps()
            self._resync(Fence(self.fence.epoch, self.fence.round + 1), now, effects)

    def _bound_steps(self) -> None:
        self.batcher.rows_max = self._patience.rows_max
        self.batcher.microbatches = min(self._microbatches, self._patience.in_flight_max)

    def _failed(self, event: StepFailedMeta, now: float, effects: list[Effect]) -> None:
        """A stage could not run a step: the same is tried again, with less if there was no room for it."""
        self.stats.steps_failed += 1
        for rid in event.rids:
            self._poisoned(rid, event.node, effects)
        if not event.rids:
            self._hold_until = now + self._retry_s
            self._retry_s = min(2 * self._retry_s, FAILED_RETRY_MAX_S)
        if event.reason == "space":
            # The stage counts what is there, whoever has the rest. At least one block fewer each time, so it ends: who
            # came last is preempted, and who cannot fit even alone is refused.
            self.stats.space_failures += 1
            self.batcher.quota_blocks = max(0, self.batcher.used_blocks - max(1, event.missing))
            self._quota_retry_at = now + self._quota_retry_s
        self._resync(Fence(self.fence.epoch, self.fence.round + 1), now, effects)

    def _alive(self) -> list[Request]:
        return [r for r in self.requests.values() if r.phase is not Phase.WAITING]

    def _resync(self, fence: Fence, now: float, effects: list[Effect]) -> None:
        """Everything in flight is void; ask the stages what they hold."""
        self.stats.resyncs += 1
        self.fence = fence
        self.steps.void()
        self.questions.void()
        for request in self.requests.values():
            if request.phase is not Phase.WAITING:
                self.batcher.remove(request)
                if request.phase is Phase.RUNNING:
                    request.computed = min(request.issued, request.total - 1)
                request.rewind(Phase.RECOVERING)
        self.batcher.account.reset()
        if self.holders is not None:
            self.holders.reset()
        # While gateways may still bring requests of an earlier scheduler, what nobody claims yet must stay.
        complete = self._sweep_at is None
        if complete:
            self._frees.clear()
            self._drops.clear()
        computing = self.batcher.computing
        ask = self.questions.ask(fence, self._alive(), now, complete=complete, kept=True, computing=computing)
        effects.append(ask)

    def start(self, now: float) -> list[Effect]:
        """The first effects of a scheduler that takes over: see that every stage answers."""
        return [self.questions.ask(self.fence, (), now, kept=True)]

    def successor(self, now: float) -> Scheduler:
        """One that takes over from this one, which is broken: in the next round, so that nothing of this one counts."""
        fresh = Scheduler(
            self.pipeline,
            self.fence.epoch,
            self.num_stages,
            self.limits,
            takeover=True,
            salt=self._salt,
            now=now,
            proposer=self._proposer,
        )
        fresh.fence = Fence(self.fence.epoch, self.fence.round + 1)
        return fresh

    def close(self) -> list[Effect]:
        """The last effects of a scheduler that is no more: who reads a request learns that it is not here.

        Silence would do if gateways knew just as much. But one that is ahead has submitted requests for when this
        member schedules the pipeline again, and one that missed a topology thinks that it always did.
        """
        text = f"the scheduler of {self.pipeline} that had this request is no more"
        return [
            Refuse(r.session, Refused(r.rid, self.pipeline, RefusalCode.DROPPED, text))
            for r in self.requests.values()
            if r.session is not None
        ]

    def _held(self, meta: HeldMeta, now: float) -> None:
        if meta.fence != self.fence:
            return
        collector, heard = self.questions.answer(meta, now)
        if collector is None:
            return
        if not collector.adopts:
            if collector.complete:
                self._keep(collector)
            return
        if self._recovery is not None and not collector.silent:
            self._recovery.answered(now)
            if heard or collector.complete:
                self._recovery.heard(now)
        for rid in heard:
            request = self.requests.get(rid)
            if request is None:
                # It ended meanwhile. The order to free it may have overtaken the question, which then promoted
                # a copy of it.
                self._drops.append(rid)
                continue
            if request.phase is not Phase.RECOVERING:
                continue
            position = min(collector.resume_at(rid, request.total), request.known_max)
            recomputed = max(0, request.computed - position)
            self.stats.requests_recovered += 1
            self.stats.tokens_recomputed += recomputed
            if self._recovery is not None:
                self._recovery.resumed(recomputed)
            # Computed again from the start while blocks of others are restored, it need not wait for them.
            beside = not collector.complete
            if (position > 0 or beside) and self.batcher.adopt(request, position):
                request.rewind(Phase.RUNNING, position)
            else:
                # Nothing is left of it, or there is no room: it waits like a new one, in front by its order.
                request.rewind(Phase.WAITING)
                request.interrupted = True
                if self.holders is not None:
                    self.holders.release(rid)
                self._drops.append(rid)
                self.batcher.enqueue(request)
        if collector.complete:
            self._keep(collector)

    def _keep(self, collector: HeldCollector) -> None:
        """What all stages have besides requests is cached; what only some have is of no use to anybody."""
        common, others = collector.kept()
        account = self.batcher.account
        account.keep(common)
        account.evictions += [name for name in others if not account.found([name])]

    # ------------------------------------------------------------------ steps

    def _issue(self, now: float, effects: list[Effect]) -> None:
        if now < self._hold_until:
            return
        # While requests are being adopted their blocks are not counted yet: nobody new is let in.
        admit = not self.questions.adopting
        if not admit and self._recovery is not None and self._recovery.gathers(now):
            return
        while len(self.steps) < self.batcher.microbatches:
            rows, preempted = self.batcher.next_rows(admit, len(self.steps))
            for request in preempted:
                self._preempted(request)
            account = self.batcher.account
            self.stats.prefix_cache_queries = account.queries * self.limits.block_size
            self.stats.prefix_cache_hits = account.hits * self.limits.block_size
            ordered = self.holders is not None and self.holders.ordered
            if not (rows or self._frees or self._drops or account.evictions or ordered):
                return
            if rows and self._recovery is not None and not self._recovery.issued(now):
                self._recovery = None
            frees, self._frees = self._frees, []
            drops, self._drops = self._drops, []
            drafts = self.speculator.drafts(rows, self.batcher)
            places = self.holders.orders() if self.holders is not None else ()
            step = self.steps.launch(self.fence, rows, frees, drops, account, now, drafts, places)
            self.questions.gone(unpack_names(step.meta.evicts))
            effects.append(step)

    def _result(self, meta: ResultMeta, now: float, effects: list[Effect], news: list[Effect]) -> None:
        flight = self.steps.land(meta.step, now) if meta.fence == self.fence else None
        if flight is None:
            return
        self._retry_s = FAILED_RETRY_S
        limit_s = self._patience.limit_s(self.steps.round_s)
        self._patience.came_back(flight.tokens, now - flight.since, limit_s, self._microbatches)
        self._bound_steps()
        self.speculator.ran(flight, now)
        self.batcher.speed.ran(
            flight.decodes, flight.prompt_tokens, now - flight.since, beside_chunk=flight.beside_chunk
        )
        if flight.prompt_tokens:
            self.batcher.speed.passed(flight.prompt_tokens, flight.since, now)
        tokens = unpack_tokens(meta.tokens)
        sampled = flight.sampled
        # A result that does not fit its step is worth no more than a lost one.
        if len(tokens) != sum(samples for _, _, samples in sampled):
            self._resync(Fence(self.fence.epoch, self.fence.round + 1), now, effects)
            return
        self._score(meta, flight)
        unscored = [
            request for request, attempt, _ in sampled if request.attempt == attempt and request.scoring
        ]
        if unscored:  # a result before this one is lost
            for request in unscored:
                request.scores_missed += 1
                if request.scores_missed > SCORES_MISSED_MAX:
                    text = "the last stage gives no log probabilities of the prompt"
                    self._refuse(request, RefusalCode.INVALID, text, news)
            self._resync(Fence(self.fence.epoch, self.fence.round + 1), now, effects)
            return
        details = {detail.index: (detail.logprob, detail.top) for detail in meta.details}
        failed = dict(meta.failed)
        by_session: dict[int, list[Token]] = {}
        ends = accumulate((samples for _, _, samples in sampled), initial=0)
        for (request, attempt, samples), index in zip(sampled, ends, strict=False):
            if request.attempt != attempt or self.requests.get(request.rid) is not request:
                continue  # it was preempted or has ended since
            if index in failed:
                self.stats.grammars_failed += 1
                self._refuse(request, RefusalCode.INVALID, failed[index], news)
                continue
            if index in meta.waiting:
                request.blocked_at = now
                self.stats.grammar_waits += 1
                continue
            drawn = tokens[index : index + samples]
            if samples > 1:
                drawn = list(takewhile(lambda token: token >= 0, drawn))
                request.issued += len(drawn) - 1  # the drafts that were right are computed
            if samples > 1 or request.rid in self.speculator.probes:
                self.speculator.verified(request.rid, samples - 1, drawn)
            for at, token in enumerate(drawn, index):
                item = self._append(request, token, *details.get(at, (None, ())))
                if self.holders is not None and request.rid not in self.holders:
                    self.holders.place(request.rid, now)
                if request.session is not None:
                    by_session.setdefault(request.session, []).append(item)
                if item.finish is not None:
                    self._retire(request, now)
                    break
        for session, items in by_session.items():
            # Log probabilities of a prompt may be megabytes: a message has one's at most.
            heavy = [item for item in items if item.prompt_scores]
            news.extend(Deliver(session, (item,)) for item in heavy)
            if light := tuple(item for item in items if not item.prompt_scores):
                news.append(Deliver(session, light))
        if by_session and self._recovery is not None:
            timing = self._recovery.delivered(now)
            if timing is not None:
                self._recovery = None
                news.append(Recovered(timing))

    def _score(self, meta: ResultMeta, flight: InFlight) -> None:
        """Log probabilities of prompts: what has come of them is not computed again after a failure."""
        rows = {request.rid: (request, attempt) for request, attempt, _ in flight.rows} if meta.scores else {}
        for part in meta.scores:
            request, attempt = rows.get(part.rid, (None, 0))
            if request is not None and request.attempt == attempt and request.scoring:
                request.take_scores(part.first, part.records)

    def _append(
        self, request: Request, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]
    ) -> Token:
        finish = request.finish_of(token, self.limits.context_len)
        cached = 0 if request.output else min(request.cached, request.prompt_len)
        scores = None
        if request.sampling.prompt_logprobs is not None and not request.output:
            scores = request.scores = bytes(request.scores)
        item = Token(request.rid, len(request.output), token, logprob, top, finish, cached, scores)
        request.append(item)
        self.stats.tokens_generated += 1
        return item

    def _poisoned(self, rid: int, node: NodeId, effects: list[Effect]) -> None:
        """Back to its gateway, which tries it where `node` does not serve: nothing else tells whose fault it is."""
        request = self.requests.get(rid)
        if request is None:
            return
        self.stats.poisoned += 1
        text = f"the model's numbers for this request were not finite on {node}"
        self._refuse(request, RefusalCode.POISONED, text, effects, node)

    def _refuse(
        self, request: Request, code: RefusalCode, text: str, effects: list[Effect], node: NodeId = ""
    ) -> None:
        """It ends here, and whoever reads it is told why."""
        self._drop(request.rid)
        if request.session is not None:
            refused = Refused(request.rid, self.pipeline, code, text, node=node)
            effects.append(Refuse(request.session, refused))
