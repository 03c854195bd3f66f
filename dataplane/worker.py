"""Everything on a node that touches KV, one thing at a time.

Steps, copies, questions and topology changes go through one inbox and are handled in order, a computation
being awaited before the next item is taken. So no block is freed, promoted or overwritten under a running
computation, and the order of a link is the order of effects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.topology import MovePhase, Pipeline, Topology
from dataplane.core.blocks import KvStore
from dataplane.core.finite import nonfinite_rows
from dataplane.core.messages import (
    Detail,
    Fence,
    KvAckMeta,
    KvDropMeta,
    KvMeta,
    KvQueryMeta,
    Meta,
    RejoinMeta,
    ResultMeta,
    StepFailedMeta,
    StepMeta,
)
from dataplane.core.pace import Pace
from dataplane.core.stage import Prepared, Stage
from dataplane.model.sampler import Drawn, SamplingTable
from dataplane.replica import Replicator
from dataplane.transport.frames import Buffer, Send

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor
    from dataplane.oracle import OracleExecutor

log = logging.getLogger(__name__)

INBOX_MAX = 20_000
DEFERRED_MAX = 2_000
PUMP_EVERY = 4  # items handled in a row before copies get their turn
INLINE_S = 0.02  # a computation that is over by then is not worth a thread


@dataclass(frozen=True, slots=True)
class Message:
    """One message from a link, or from this node to itself."""

    peer: Member
    meta: Meta
    payload: Buffer = b""
    tokens: tuple[int, ...] = ()  # stage 0 only


@dataclass(frozen=True, slots=True)
class LinkChanged:
    node: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing but a turn for copies that wait for time to pass."""


Item = Message | Topology | LinkChanged | Wake


@dataclass(slots=True)
class WorkerStats:
    """Monotonic counts; `fenced` by kind of message."""

    steps: int = 0
    dropped_full: int = 0
    poisoned: int = 0  # requests whose numbers became non-finite here
    compute_s: float = 0.0
    fenced: dict[str, int] = field(default_factory=dict)


class Worker:
    def __init__(
        self, me: Member, executor: StageExecutor | OracleExecutor, store: KvStore, send: Send
    ) -> None:
        self.stats = WorkerStats()
        self.stages: dict[PipelineId, Stage] = {}
        self.replicator = Replicator(store, executor.kv, send)
        self.topology: Topology | None = None  # the newest one applied
        self._newest: Topology | None = (
            None  # the newest one known: what is older than it need not be computed
        )
        self._me = me
        self._executor = executor
        self._store = store
        self._send = send
        self._inbox: asyncio.Queue[Item] = asyncio.Queue()  # bounded by put()
        self._deferred: list[Message] = []  # of an epoch that this node has not heard of yet
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.pace = Pace()
        self.busy: tuple[float, int] | None = None  # since when a step computes, and its tokens
        self._last = (1, 1.0)  # tokens of the last step, and the seconds that it took

    def put(self, item: Item) -> None:
        """Queue an item. A message over the bound is dropped and counted: its sender repeats it."""
        if isinstance(item, Topology):
            self._newest = item
        elif self._inbox.qsize() >= INBOX_MAX:
            self.stats.dropped_full += 1
            return
        self._inbox.put_nowait(item)

    async def run(self) -> None:
        handled = 0
        while True:
            await self._handle(await self._inbox.get())
            handled += 1
            if self._inbox.empty() or handled % PUMP_EVERY == 0:
                self.replicator.pump(time.monotonic())

    def wake(self) -> None:
        """Called every tick. Copies wait for their turn like everything else: a block must not be read
        while a computation writes it."""
        if self._inbox.empty():
            self.put(Wake())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ dispatch

    async def _handle(self, item: Item) -> None:
        match item:
            case Topology():
                self._apply(item)
                deferred, self._deferred = self._deferred, []
                for message in deferred:
                    await self._handle(message)
            case LinkChanged(node):
                self.replicator.link_changed(node)
            case Wake():
                pass
            case Message(peer, meta):
                if self._admissible(item):
                    await self._handle_message(peer, meta, item)

    async def _handle_message(self, peer: Member, meta: Meta, message: Message) -> None:
        match meta:
            case StepMeta():
                await self._step(meta, message)
            case RejoinMeta():
                self._rejoin(meta)
            case KvMeta():
                self.replicator.store_copies(peer, meta, memoryview(message.payload))
            case KvAckMeta():
                self.replicator.acknowledged(peer, meta, time.monotonic())
            case KvQueryMeta():
                self.replicator.answer_query(peer, meta)
            case KvDropMeta():
                self.replicator.drop_copies(meta)
            case _:
                raise TypeError(f"{type(meta).__name__} is not the worker's")

    def _admissible(self, message: Message) -> bool:
        """Fencing: old epochs are dropped and counted, coming ones wait for the topology to arrive."""
        meta = message.meta
        assert isinstance(meta, StepMeta | RejoinMeta | KvMeta | KvAckMeta | KvQueryMeta | KvDropMeta)
        pipeline = self.topology.pipeline(meta.pipeline) if self.topology is not None else None
        epoch = pipeline.epoch if pipeline is not None else -1
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
        if isinstance(meta, StepMeta | RejoinMeta):
            stage = self.stages.get(meta.pipeline)
            if stage is None or stage.stale(meta.fence):
                self._count_fenced(meta)
                return False
        if isinstance(meta, KvMeta | KvQueryMeta) and not self._holds(pipeline):
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
        self.topology = topology
        for pipeline in topology.pipelines:
            duty = pipeline.stages_of(self._me)
            stage = self.stages.get(pipeline.id)
            if duty:
                if stage is None or stage.index != duty[0]:
                    if stage is not None:
                        self._leave(pipeline)
                    self.stages[pipeline.id] = self._stage(pipeline, duty[0])
                elif stage.fence.epoch < pipeline.epoch:
                    stage.enter(Fence(pipeline.epoch))
                self._protect(pipeline, duty[0])
            else:
                if stage is not None:
                    self._leave(pipeline)
                if not self._holds(pipeline):
                    self._store.drop_replicas(pipeline.id)

    def _stage(self, pipeline: Pipeline, index: int) -> Stage:
        stages = len(pipeline.stages)
        sampling = None
        if index == stages - 1:
            sampling = SamplingTable(self._store.table.max_rows, self._executor.config.vocab_size)
        return Stage(pipeline.id, index, stages, pipeline.epoch, self._store, sampling)

    def _protect(self, pipeline: Pipeline, index: int) -> None:
        targets = list(pipeline.stages[index].replicas)
        move = pipeline.move
        flush = False
        if move is not None and move.stage == index:
            flush = move.phase is MovePhase.QUIESCE
            if move.to not in targets:
                targets.append(move.to)
        self.replicator.protect(pipeline.id, pipeline.epoch, targets, flush)

    def _leave(self, pipeline: Pipeline) -> None:
        """Another node serves our stage now. What we hold becomes its replica, if it copies to us."""
        stage = self.stages.pop(pipeline.id)
        self.replicator.unprotect(pipeline.id)
        if self._me in pipeline.stages[stage.index].replicas:
            for rid in list(self._store.own[pipeline.id]):
                self._store.demote((pipeline.id, rid), self.replicator.checksum)
        else:
            self._store.release_pipeline(pipeline.id)

    def _holds(self, pipeline: Pipeline | None) -> bool:
        """Whether some stage of the pipeline copies its KV to this node."""
        if pipeline is None:
            return False
        if pipeline.move is not None and pipeline.move.to == self._me:
            return True
        return any(self._me in stage.replicas for stage in pipeline.stages)

    # ------------------------------------------------------------------ serving

    def _rejoin(self, meta: RejoinMeta) -> None:
        stage = self.stages[meta.pipeline]
        self._to_scheduler(meta.pipeline, self.replicator.rejoin(stage, meta))

    async def _step(self, meta: StepMeta, message: Message) -> None:
        stage = self.stages[meta.pipeline]
        prepared = stage.prepare(meta)
        self.replicator.freed(meta.pipeline, meta.frees)
        if isinstance(prepared, str):
            log.warning("step %d of %s: %s", meta.step, meta.pipeline, prepared)
            self._to_scheduler(
                meta.pipeline, StepFailedMeta(meta.pipeline, meta.fence, meta.step, stage.index, prepared)
            )
            return
        output: Buffer = b""
        drawn: Drawn | None = None
        if meta.rows:
            self.busy = (time.monotonic(), prepared.arrays.num_tokens)
            output, drawn = await self._computed(stage, prepared, message)
            if self._executor.rest_s > 0:
                await asyncio.sleep(self._executor.rest_s)  # an emulated device is at work yet
            self.busy = None
            if rids := self._poisoned(prepared, output, drawn):
                self._to_scheduler(
                    meta.pipeline,
                    StepFailedMeta(
                        meta.pipeline, meta.fence, meta.step, stage.index, "numbers", self._me.node, rids
                    ),
                )
                return
        if stage.is_last:
            self._to_scheduler(meta.pipeline, self._result(meta, drawn))
        else:
            self._forward(stage, meta, output)  # first of all: the next stage waits for it
        filled = stage.commit(prepared, drawn.tokens if drawn is not None else None)
        self.stats.steps += 1
        self.replicator.advanced(meta.pipeline, prepared.rows, filled)
        if meta.rows:
            self.pace.ran(prepared.arrays.num_tokens, int(prepared.arrays.context_lens.sum()), self._last[1])

    def _result(self, meta: StepMeta, drawn: Drawn | None) -> ResultMeta:
        if drawn is None:
            return ResultMeta(meta.pipeline, meta.fence, meta.step, b"")
        details = tuple(Detail(row, logprob, drawn.top[row]) for row, logprob in drawn.logprobs.items())
        return ResultMeta(meta.pipeline, meta.fence, meta.step, drawn.tokens.astype("<i4").tobytes(), details)

    async def _computed(self, stage: Stage, step: Prepared, message: Message) -> tuple[Buffer, Drawn | None]:
        """On the loop if it is over soon: a thread costs two switches and waits for the interpreter, more than all the
        rest of a step. What may take long has a thread, for heartbeats must go out."""
        tokens, took = self._last
        if took * max(1.0, step.arrays.num_tokens / tokens) < INLINE_S:
            if stage.is_last:
                # First what the loop has ready, the tokens of the step before: other stages have time for that while
                # the step is with the next one.
                await asyncio.sleep(0)
            return self._compute(stage, step, message)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._compute, stage, step, message)

    def _poisoned(self, step: Prepared, output: Buffer, drawn: Drawn | None) -> tuple[int, ...]:
        """Requests whose numbers are not finite after this stage. What came was: who sees otherwise sends nothing on.

        Their step is not committed, so no KV of it is ever valid or copied."""
        rids: tuple[int, ...] = ()
        if drawn is not None and drawn.poisoned:
            rids = tuple(step.rows.sample_rids[list(drawn.poisoned)].tolist())
        elif output and self._executor.suspect and len(bad := nonfinite_rows(np.asarray(output))):
            rids = tuple(dict.fromkeys(np.repeat(step.rows.rids, step.rows.counts)[bad].tolist()))
        self.stats.poisoned += len(rids)
        return rids

    def _forward(self, stage: Stage, meta: StepMeta, output: Buffer) -> None:
        pipeline = self.topology.pipeline(meta.pipeline) if self.topology is not None else None
        successor = pipeline.stages[stage.index + 1].leader if pipeline is not None else None
        if successor is None:
            return  # the pipeline is down: its next epoch starts from the log
        if successor == self._me:
            raise RuntimeError("two stages of one pipeline on one node")
        if not self._send(successor, meta, output):
            failed = StepFailedMeta(meta.pipeline, meta.fence, meta.step, stage.index, "link")
            self._to_scheduler(meta.pipeline, failed)

    def _to_scheduler(self, pipeline_id: PipelineId, meta: Meta) -> None:
        pipeline = self.topology.pipeline(pipeline_id) if self.topology is not None else None
        scheduler = pipeline.scheduler if pipeline is not None else None
        if scheduler is not None:
            self._send(scheduler, meta, b"")

    def _compute(self, stage: Stage, step: Prepared, message: Message) -> tuple[Buffer, Drawn | None]:
        """One stage's forward pass, and on the last stage the next tokens."""
        started = time.monotonic()
        tokens = np.array(message.tokens, np.int64) if stage.index == 0 else None
        hidden = message.payload if stage.index > 0 else None
        output = self._executor.forward(tokens, hidden, step.arrays, step.rows.sample_rows)
        drawn = None
        if stage.sampling is not None and len(step.slots):
            drawn = stage.sampling.sample(output.astype(np.float32, copy=False), step.slots)
        took = time.monotonic() - started
        self.stats.compute_s += took
        self._last = (step.arrays.num_tokens, took)
        return (b"" if stage.is_last else output.data), drawn
