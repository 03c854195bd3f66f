"""Everything on a node that touches KV, one thing at a time.

Steps, copies, questions and topology changes go through one inbox and are handled in order, a computation, or a piece
of work on KV in its thread, being awaited before the next item is taken. So no block is freed, promoted or overwritten
while one is computed, copied or checked; the event loop itself touches none and is free for heartbeats meanwhile. The
order of a link is, for each pipeline, the order of effects. A step takes along those of other
pipelines that wait behind it, where one pass over the weights for all is cheaper (`inbox.company`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never, get_args

from controlplane.contract.config import ParityConfig
from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.topology import HOLDER_MODES, Pipeline, Topology
from dataplane._fast.blocktable import Rows
from dataplane.compute import Compute, Computed, Work
from dataplane.core.blocks import KvStore
from dataplane.core.checksums import Check
from dataplane.core.holders import candidates_of, leaders_at
from dataplane.core.messages import (
    CopiedMeta,
    Detail,
    Fence,
    FetchMeta,
    HeldMeta,
    KvAckMeta,
    KvDropMeta,
    KvMeta,
    KvQueryMeta,
    LostMeta,
    Meta,
    ParityMeta,
    ReadyMeta,
    RejoinMeta,
    RestoredMeta,
    ResultMeta,
    StepFailedMeta,
    StepMeta,
    step_tokens,
)
from dataplane.core.rhythm import Rhythm
from dataplane.core.stage import Stage
from dataplane.inbox import Inbox, Item, LinkChanged, Message, Wake
from dataplane.kvwork import KvThread, blocks_as_bytes
from dataplane.model.sampler import SamplingTable
from dataplane.moment import MOMENT
from dataplane.parity import Parity, longest_block
from dataplane.replica import Replicator
from dataplane.transport.frames import Buffer, Send

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor
    from dataplane.grammars import Grammars
    from dataplane.oracle import OracleExecutor

log = logging.getLogger(__name__)

UNSENT_MAX = 64  # answers that wait for a link
DEFERRED_MAX = 2_000
# A step of more than this part of `light_tokens` has a prompt in it, whose first token somebody waits for.
PROMPT_SHARE = 4
PUMP_EVERY = 4  # items handled in a row before copies get their turn
# Tuples, since `isinstance(meta, A | B)` makes a new union each time.
OF_THE_STAGE = (StepMeta, RejoinMeta, FetchMeta, RestoredMeta)
OF_THE_HOLDER = (KvMeta, KvQueryMeta)
OF_COPIES = (KvMeta, KvAckMeta, KvDropMeta)
FENCED = (StepMeta, RejoinMeta, KvMeta, KvAckMeta, KvQueryMeta, KvDropMeta, *get_args(ParityMeta))


@dataclass(slots=True)
class WorkerStats:
    """Monotonic counts; `fenced` by kind of message."""

    steps: int = 0
    merged: int = 0  # of these, the ones that another pipeline's step took along
    dropped_full: int = 0
    check_wait_s: float = 0.0  # that steps waited for the checking of copies, after they had been computed
    poisoned: int = 0  # requests whose numbers became non-finite here
    fenced: dict[str, int] = field(default_factory=dict)


class Worker:
    def __init__(
        self,
        me: Member,
        executor: StageExecutor | OracleExecutor,
        store: KvStore,
        send: Send,
        send_later: Send | None = None,
        grammars: Grammars | None = None,
        parity: ParityConfig | None = None,
    ) -> None:
        """`send_later`: for copies of KV, behind all else; as everything else if it is not given. `grammars`: of a node
        that serves last stages. `parity`: where that protects KV."""
        self.stats = WorkerStats()
        self.stages: dict[PipelineId, Stage] = {}
        self._bytes = blocks_as_bytes(executor.kv)
        self._thread = KvThread(self._bytes.at_once_bytes)
        self.block_bytes = executor.kv.block_bytes
        self.replicator = Replicator(
            store, executor.kv, self._thread, send, send_later, executor.block_wire_bytes
        )
        self.replicator.numerics = executor.numerics
        self.parity = Parity(
            me,
            store,
            executor.kv,
            self._thread,
            send,
            send_later or send,
            self.replicator,
            self.stages,
            self._to_scheduler,
            parity or ParityConfig(),
            lambda stages: longest_block(executor, stages),
            executor.block_wire_bytes,
        )
        self.hosts: Mapping[NodeId, str] = {}  # of nodes, as far as they are known
        # Hears of steps with prompts of traced requests, and from when to when they were computed (monotonic seconds).
        self.on_traced: Callable[[StepMeta, float, float], None] | None = None
        self.topology: Topology | None = None  # the newest one applied
        # The newest one known: what is older than it need not be computed.
        self._newest: Topology | None = None
        self._me = me
        self._executor = executor
        self._store = store
        self._send = send
        self._grammars = grammars
        # For want of a link: what a scheduler learns in no other way.
        self._unsent: deque[tuple[Member, HeldMeta | LostMeta]] = deque(maxlen=UNSENT_MAX)
        self.compute = Compute(executor)
        self._inbox = Inbox()
        self._rhythm = Rhythm()
        self._deferred: list[Message] = []  # of an epoch that this node has not heard of yet

    def put(self, item: Item) -> None:
        """Queue an item. A message over the bound is dropped and counted: its sender repeats it."""
        if isinstance(item, Topology):
            self._newest = item
        if not self._inbox.put(item):
            self.stats.dropped_full += 1

    async def run(self) -> None:
        if self._grammars is not None:
            loop = asyncio.get_running_loop()
            self._grammars.settled = lambda: (
                None if loop.is_closed() else loop.call_soon_threadsafe(self._tell_settled)
            )
        handled = 0
        while True:
            while self._store.checksums.unverified and not self._inbox:
                await self._look_at(self._store.checksums.next(self._bytes.piece_blocks))
            await self._handle(await self._inbox.get())
            handled += 1
            if self._store.lost:
                self._tell_lost()
            if not self._inbox or handled % PUMP_EVERY == 0:
                await self.parity.pump(time.monotonic(), lambda: len(self._inbox) > 0)
                await self.replicator.pump(time.monotonic(), lambda: len(self._inbox) > 0)
                self._tell_copied()

    def wake(self) -> None:
        """Called every tick. Copies wait for their turn like everything else: a block must not be read
        while a computation writes it."""
        if not self._inbox:
            self.put(Wake())

    def close(self) -> None:
        self.compute.close()
        self._thread.close()
        if self._grammars is not None:
            self._grammars.close()

    # ------------------------------------------------------------------ dispatch

    async def _handle(self, item: Item) -> None:
        match item:
            case Topology():
                self._apply(item)
                self._inbox.put_back(self._deferred)
                self._deferred = []
            case LinkChanged(node):
                self.replicator.link_changed(node)
                self.parity.link_changed(node)
                self._answer_again(node)
            case Wake():
                pass
            case Message(peer, meta):
                if self._admissible(item):
                    await self._handle_message(peer, meta, item)
            case _:
                assert_never(item)

    async def _handle_message(self, peer: Member, meta: Meta, message: Message) -> None:
        match meta:
            case StepMeta():
                await self._step(meta, message)
            case RejoinMeta():
                self._rejoin(meta)
            case KvMeta():
                await self.replicator.store_copies(peer, meta, memoryview(message.payload))
            case KvAckMeta():
                self.replicator.acknowledged(peer, meta, time.monotonic())
            case KvQueryMeta():
                self.replicator.answer_query(peer, meta)
            case KvDropMeta():
                self.replicator.drop_copies(peer, meta)
            case _:
                if not isinstance(meta, ParityMeta):
                    raise TypeError(f"{type(meta).__name__} is not the worker's")
                await self.parity.handle(peer, meta, memoryview(message.payload), time.monotonic())

    def _admissible(self, message: Message) -> bool:
        """Fencing: old epochs are dropped and counted, coming ones wait for the topology to arrive."""
        meta = message.meta
        assert isinstance(meta, FENCED)
        pipeline = self.topology.pipeline(meta.pipeline) if self.topology is not None else None
        # Of a pipeline that is gone all epochs are over: if one of its name comes again, its epochs are later counters.
        gone = self.topology.counter if self.topology is not None else -1
        epoch = pipeline.epoch if pipeline is not None else gone
        if meta.fence.epoch > epoch:
            if len(self._deferred) < DEFERRED_MAX:
                self._deferred.append(message)
            else:
                self.stats.dropped_full += 1
            return False
        newest = self._newest.pipeline(meta.pipeline) if self._newest is not None else None
        if meta.fence.epoch < max(epoch, newest.epoch if newest is not None else epoch):
            self._count_fenced(meta)
            return False
        if isinstance(meta, OF_THE_STAGE):
            stage = self.stages.get(meta.pipeline)
            if stage is None or stage.stale(meta.fence):
                self._count_fenced(meta)
                return False
        if isinstance(meta, OF_THE_HOLDER) and not self._holds(pipeline):
            self._count_fenced(meta)
            return False
        return True

    def _count_fenced(self, meta: Meta) -> None:
        kind = type(meta).__name__.removesuffix("Meta").lower()
        self.stats.fenced[kind] = self.stats.fenced.get(kind, 0) + 1

    # ------------------------------------------------------------------ topology

    def _apply(self, topology: Topology) -> None:
        if self.topology is not None and topology.counter <= self.topology.counter:
            return
        before, self.topology = self.topology, topology
        for pipeline in before.pipelines if before is not None else ():
            if topology.pipeline(pipeline.id) is None:
                self._forget(pipeline.id)
        self._store.idle = frozenset(pipeline.id for pipeline in topology.pipelines if not pipeline.up)
        copied = self._store.copies.owners()
        for pipeline in topology.pipelines:
            duty = self._duty(pipeline)
            stage = self.stages.get(pipeline.id)
            if duty is not None:
                if stage is None or stage.index != duty:
                    if stage is not None:
                        self._leave(pipeline)
                    self.stages[pipeline.id] = self._stage(pipeline, duty)
                elif stage.fence.epoch < pipeline.epoch:
                    stage.enter(Fence(pipeline.epoch))
                self._protect(pipeline, duty)
            else:
                if stage is not None:
                    self._leave(pipeline)
                if pipeline.id in copied and not self._holds(pipeline):
                    self._store.copies.drop_pipeline(pipeline.id)
        self.parity.apply(topology)

    def _duty(self, pipeline: Pipeline) -> int | None:
        """Its stage that we serve. None too if our layers cannot be that one's, as only another hand can write it: the
        first stage takes tokens, and the last one draws them."""
        index = next(iter(pipeline.stages_of(self._me)), -1)
        ends = index == 0, index == len(pipeline.stages) - 1
        return index if index >= 0 and ends == (self._executor.is_first, self._executor.is_last) else None

    def _stage(self, pipeline: Pipeline, index: int) -> Stage:
        stages = len(pipeline.stages)
        sampling = None
        if index == stages - 1:
            rows, executor = self._store.table.max_rows, self._executor
            sampling = SamplingTable(rows, executor.config.vocab_size, executor.team)
        return Stage(pipeline.id, index, stages, pipeline.epoch, self._store, sampling, self._grammars)

    def _protect(self, pipeline: Pipeline, index: int) -> None:
        targets = list(pipeline.stages[index].replicas)
        move = pipeline.move
        if move is not None and move.stage == index and move.to not in targets:
            targets.append(move.to)
        assert self.topology is not None
        holders = leaders_at(candidates_of(self.topology, pipeline, self.hosts), index)
        self.replicator.protect(pipeline.id, pipeline.epoch, targets, holders)

    def _leave(self, pipeline: Pipeline) -> None:
        """Another node serves our stage now. What we hold becomes its replica, if it copies to us."""
        stage = self.stages.pop(pipeline.id)
        self.replicator.unprotect(pipeline.id)
        at = pipeline.stages[stage.index : stage.index + 1]  # none, where a topology is not what it should be
        self._store.leave(pipeline.id, demote=any(self._me in place.replicas for place in at))

    def _forget(self, pipeline: PipelineId) -> None:
        """It is gone, with all that was kept for it."""
        if self.stages.pop(pipeline, None) is not None:
            self.replicator.unprotect(pipeline)
            self._store.leave(pipeline, demote=False)
        self._store.copies.drop_pipeline(pipeline)

    def _holds(self, pipeline: Pipeline | None) -> bool:
        """Whether some stage of the pipeline copies its KV to this node."""
        if pipeline is None or self.topology is None:
            return False
        if pipeline.move is not None and pipeline.move.to == self._me:
            return True
        if self.topology.mode in HOLDER_MODES:
            # Also while their instance is down: its requests may go on here.
            able = candidates_of(self.topology, pipeline, self.hosts) if pipeline.up else ()
            return not pipeline.up or any(other.stages_of(self._me) for other in able)
        return any(self._me in stage.replicas for stage in pipeline.stages)

    # ------------------------------------------------------------------ serving

    def _rejoin(self, meta: RejoinMeta) -> None:
        self.parity.rejoin(self.stages[meta.pipeline], meta, time.monotonic())

    async def _step(self, meta: StepMeta, message: Message) -> None:
        messages = [message]
        waited = False
        if meta.rows:
            self._rhythm.came(meta.pipeline, time.monotonic())
            if (self._alone(meta) or len(self.stages) > 1) and self.compute.inline(step_tokens(meta)):
                # First what the loop has ready: the tokens of the step before, as a first stage has time for them
                # while the step is with the next one; and steps that have come and may join this one.
                await asyncio.sleep(0)
            others, waited = await self._company(meta)
            for other in others:
                assert isinstance(other.meta, StepMeta)
                self._rhythm.came(other.meta.pipeline, time.monotonic())
            messages += filter(self._admissible, others)
        if self._store.checksums.unverified:
            await self._look_at([check for message in messages for check in self._straddled(message)])
        works = [work for message in messages if (work := self._prepared(message)) is not None]
        computed = [Computed()] * len(works)
        damaged: set[int] = set()
        if works and meta.rows:
            began = time.monotonic()
            looking = self._look_at_used(works)
            computed = await self.compute.run(works, began if waited else 0.0)
            if looking is not None:
                computed_at = time.monotonic()
                damaged = await looking
                self.stats.check_wait_s += time.monotonic() - computed_at
            now = time.monotonic()
            self._rhythm.ran(len(works), now - began)
            for work in works:
                if work.step.meta.traces and self.on_traced is not None:
                    self.on_traced(work.step.meta, began, now)
                if work.step.unfinished:
                    self._rhythm.goes_on(work.step.meta.pipeline, step_tokens(work.step.meta), now)
            self.stats.merged += len(works) - 1
        for work, outcome in zip(works, computed, strict=True):
            if damaged and not damaged.isdisjoint(work.step.table_rows.tolist()):
                # Nothing of it leaves this node. The scheduler asks what is held here and computes the rest again.
                self._fail(work.stage, work.step.meta, "gap")
            else:
                self._finish(work, outcome)
        self.compute.account()
        MOMENT.end()

    async def _company(self, meta: StepMeta) -> tuple[list[Message], bool]:
        """Steps that run along with this one, which waits for them where `rhythm` says so; whether it did in vain.

        Meanwhile copies are taken in, which other pipelines' steps come behind; all else ends the wait."""
        others = self._inbox.take_company(meta, self._executor.light_tokens)
        now = time.monotonic()
        patience_s = 0.0
        if not others and PROMPT_SHARE * step_tokens(meta) <= self._executor.light_tokens:
            room = self._executor.light_tokens - step_tokens(meta)
            patience_s = max(
                self._rhythm.patience_s(meta.pipeline, now), self._rhythm.chunk_s(meta.pipeline, room, now)
            )
        deadline = now + patience_s
        while not others and (left_s := deadline - time.monotonic()) > 0:
            copy = self._inbox.take_other(meta.pipeline, OF_COPIES)
            if copy is not None:
                await self._handle(copy)
            elif self._inbox.waits_only(meta.pipeline):
                await self._inbox.more(left_s)
            else:
                break
            others = self._inbox.take_company(meta, self._executor.light_tokens)
        return others, patience_s > 0 and not others

    # ------------------------------------------------------------------ what was promoted unread

    def _straddled(self, message: Message) -> list[Check]:
        assert isinstance(message.meta, StepMeta)
        return self._store.straddled(message.meta.pipeline, Rows(message.meta.rows))

    def _look_at_used(self, works: list[Work]) -> asyncio.Task[set[int]] | None:
        """Read what these steps use and nobody has read since it was promoted, on another core while they compute."""
        if not self._store.checksums.unverified:
            return None
        checks = self._store.unverified(row for work in works for row in work.step.table_rows.tolist())
        return asyncio.create_task(self._look_at(checks)) if checks else None

    async def _look_at(self, checks: list[Check]) -> set[int]:
        """Rows of the block table of which a block is not as it came: its positions are no longer valid."""
        if not checks:
            return set()
        sums = await self._thread(self._bytes.sums, [check.block for check in checks])
        failures = self._store.checksum_failures
        damaged = self._store.looked_at(checks, sums)
        if failures := self._store.checksum_failures - failures:
            log.error("%d of %d blocks of copies had changed in memory", failures, len(checks))
        return damaged

    def _tell_copied(self) -> None:
        """Schedulers learn which holders have what they were to get, and which have it no longer."""
        for pipeline, stage in self.stages.items():
            lost, placed = self.replicator.lost(pipeline), self.replicator.copied(pipeline)
            if lost or placed:
                told = CopiedMeta(pipeline, stage.fence, stage.index, tuple(placed), tuple(lost))
                self._to_scheduler(pipeline, told)

    def _tell_lost(self) -> None:
        """Of what is kept here for requests to come, something has changed in memory."""
        lost: dict[PipelineId, list[bytes]] = {}
        for pipeline, name in self._store.lost:
            lost.setdefault(pipeline, []).append(name)
        self._store.lost.clear()
        for pipeline, names in lost.items():
            stage = self.stages.get(pipeline)
            if stage is not None:
                self._to_scheduler(pipeline, LostMeta(pipeline, stage.fence, b"".join(names)))

    # ------------------------------------------------------------------

    def _alone(self, meta: StepMeta) -> bool:
        """Whether the whole pipeline is this stage."""
        stage = self.stages[meta.pipeline]
        return stage.is_last and stage.index == 0

    def _prepared(self, message: Message) -> Work | None:
        """A step with its blocks; None: its scheduler has been told why it cannot run."""
        meta = message.meta
        assert isinstance(meta, StepMeta)
        stage = self.stages[meta.pipeline]
        prepared = stage.prepare(meta)
        self.replicator.freed(meta.pipeline, (*meta.drops, *meta.frees))
        self.replicator.place(meta.pipeline, meta.places)
        if isinstance(prepared, str):
            log.warning("step %d of %s: %s", meta.step, meta.pipeline, prepared)
            self._fail(stage, meta, prepared, missing=self._store.missing if prepared == "space" else 0)
            return None
        return Work(stage, prepared, message)

    def _finish(self, work: Work, computed: Computed) -> None:
        stage, meta = work.stage, work.step.meta
        if computed.poisoned:
            # The step is not committed, so no KV of it is ever valid or copied.
            self.stats.poisoned += len(computed.poisoned)
            self._fail(stage, meta, "numbers", self._me.node, computed.poisoned)
            return
        drawn = computed.drawn
        if stage.is_last:
            self._to_scheduler(meta.pipeline, self._result(meta, computed))
            if drawn is not None and drawn.waiting:  # behind the result that says so
                stage.rules.ask([int(work.step.rows.sample_rids[row]) for row in drawn.waiting])
                self._tell_settled()
        else:
            self._forward(stage, meta, computed.output)  # first of all: the next stage waits for it
        filled = stage.commit(work.step, drawn.tokens if drawn is not None else None)
        self.stats.steps += 1
        self.replicator.advanced(meta.pipeline, work.step.rows, filled)
        self.parity.sealed(meta.pipeline, work.step.names)

    def _result(self, meta: StepMeta, computed: Computed) -> ResultMeta:
        drawn = computed.drawn
        if drawn is None:
            return ResultMeta(meta.pipeline, meta.fence, meta.step, b"", scores=computed.scores)
        details = tuple(Detail(row, logprob, drawn.top[row]) for row, logprob in drawn.logprobs.items())
        tokens = drawn.tokens.astype("<i4").tobytes()
        return ResultMeta(
            meta.pipeline,
            meta.fence,
            meta.step,
            tokens,
            details,
            drawn.waiting,
            drawn.failed,
            computed.scores,
        )

    def _tell_settled(self) -> None:
        """Schedulers that wait for grammars learn of those that are compiled, or cannot be."""
        for pipeline, stage in self.stages.items():
            if rids := stage.rules.answers():
                self._to_scheduler(pipeline, ReadyMeta(pipeline, stage.fence, tuple(rids)))

    def _forward(self, stage: Stage, meta: StepMeta, output: Buffer) -> None:
        pipeline = self.topology.pipeline(meta.pipeline) if self.topology is not None else None
        successor = pipeline.leader_at(stage.index + 1) if pipeline is not None else None
        # Ourselves: a topology is not what it should be, which ends no node.
        if successor is None or successor == self._me:
            return  # the pipeline is down: its next epoch starts from the log
        if not self._send(successor, meta, output):
            self._fail(stage, meta, "link")

    def _fail(
        self,
        stage: Stage,
        meta: StepMeta,
        reason: str,
        node: str = "",
        rids: tuple[int, ...] = (),
        missing: int = 0,
    ) -> None:
        failed = StepFailedMeta(
            meta.pipeline, meta.fence, meta.step, stage.index, reason, node, rids, missing
        )
        self._to_scheduler(meta.pipeline, failed)

    def _to_scheduler(self, pipeline_id: PipelineId, meta: Meta) -> None:
        pipeline = self.topology.pipeline(pipeline_id) if self.topology is not None else None
        scheduler = pipeline.scheduler if pipeline is not None else None
        if scheduler is None or self._send(scheduler, meta, b""):
            return
        if isinstance(meta, HeldMeta | LostMeta):
            self._unsent.append((scheduler, meta))

    def _answer_again(self, node: NodeId) -> None:
        """A scheduler that has only just got this duty may ask before our link to it is open. It drops what is old."""
        unsent = list(self._unsent)
        self._unsent.clear()
        for scheduler, meta in unsent:
            if scheduler.node != node or not self._send(scheduler, meta, b""):
                self._unsent.append((scheduler, meta))
