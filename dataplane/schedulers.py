"""The schedulers that a node runs: one for each pipeline whose first stage it serves."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import fields
from typing import assert_never

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.records import NodeRecord
from controlplane.contract.reports import RecoveryReport
from controlplane.contract.requests import (
    Cancel,
    GatewayMessage,
    Recall,
    Recalled,
    RefusalCode,
    Refused,
    Submit,
    Tokens,
)
from controlplane.contract.topology import (
    HOLDER_MODES,
    Mode,
    Pipeline,
    Topology,
    quota_blocks,
    switched,
)
from dataplane.core.batching import Limits
from dataplane.core.events import (
    Ask,
    Cancelled,
    CandidatesChanged,
    CapacityChanged,
    Deliver,
    Effect,
    EpochBegan,
    Event,
    Recovered,
    Refuse,
    RunStep,
    SessionLost,
    Submitted,
    Tell,
    Tick,
)
from dataplane.core.holders import candidates_of, sources_of
from dataplane.core.messages import (
    CopiedMeta,
    HeldMeta,
    LoadMeta,
    LostMeta,
    ReadyMeta,
    RejoinMeta,
    ResultMeta,
    StepFailedMeta,
)
from dataplane.core.scheduler import Scheduler
from dataplane.core.speculation import Proposer
from dataplane.core.stats import SchedulerStats
from dataplane.frontdoor import Frontdoor
from dataplane.inbox import Message
from dataplane.moment import MOMENT
from dataplane.transport.frames import Send

log = logging.getLogger(__name__)

RECOVERIES_KEPT = 64
COUNTERS = tuple(field.name for field in fields(SchedulerStats))
# So often in so many seconds a scheduler that raised is replaced by a fresh one; then the node ends with its error.
CRASHES_MAX, CRASHES_WITHIN_S = 3, 60.0
LOADS_EVERY_S = 0.25  # how often a pipeline says what it has to do to those whose copies it may hold
UNSENT_MAX = 32  # questions kept for a member until its link is up; the scheduler asks anew anyway


class Schedulers:
    """Gives the schedulers their events and performs their effects, in order."""

    def __init__(
        self,
        me: Member,
        limits: Limits,
        microbatches: int,
        frontdoor: Frontdoor,
        run_local: Callable[[Message], None],
        send: Send,
        news: Callable[[], None],
        proposer: Proposer | None = None,
    ) -> None:
        """`proposer`: where the limits ask for a draft model."""
        self.by_pipeline: dict[PipelineId, Scheduler] = {}
        self.recoveries: list[RecoveryReport] = []  # the newest RECOVERIES_KEPT
        self.recoveries_total = 0
        self._me = me
        self._limits = limits
        self._microbatches = microbatches  # 0: as many as a pipeline's nodes can compute
        self._frontdoor = frontdoor
        self._run_local = run_local
        self._send = send
        self._news = news
        self._proposer = proposer
        self._topology: Topology | None = None
        self._unsent: dict[Member, list[RejoinMeta]] = {}  # questions for members whose link is not up yet
        self._records: dict[NodeId, NodeRecord] = {}  # the last one of every node that was ever registered
        self.hosts: dict[NodeId, str] = {}  # of every node that was ever registered
        self._copies_moved = 0  # of schedulers that have moved away
        self._past = SchedulerStats()  # of schedulers that have moved away
        self._listeners: dict[PipelineId, list[Member]] = {}  # whom our pipelines tell what they have to do
        self._loads_at = 0.0
        self._crashes: deque[float] = deque(maxlen=CRASHES_MAX)  # when schedulers raised
        self.crashes_total = 0

    # ------------------------------------------------------------------ inputs

    def on_records(self, records: dict[str, NodeRecord]) -> None:
        # A registration may be gone for a while (etcd was away); the node is not.
        self._records.update(records)
        self.hosts.update({node: record.fault_domain.get("host", node) for node, record in records.items()})

    def on_topology(self, topology: Topology, records: dict[str, NodeRecord]) -> None:
        previous, self._topology = self._topology, topology
        self.on_records(records)
        now = time.monotonic()
        served: Counter[NodeId] = Counter()
        if any(pipeline.scheduler == self._me for pipeline in topology.pipelines):
            served = served_counts(topology)
        for gone in self.by_pipeline.keys() - {pipeline.id for pipeline in topology.pipelines}:
            self._end(gone)
        for pipeline in topology.pipelines:
            scheduler = self.by_pipeline.get(pipeline.id)
            if pipeline.scheduler != self._me:
                if scheduler is not None:
                    self._end(pipeline.id)
                continue
            before = previous.pipeline(pipeline.id) if previous is not None else None
            capacity = self._capacity(topology, pipeline, served)
            planned = before is not None and switched(before, pipeline)
            if scheduler is None:
                scheduler = Scheduler(
                    pipeline.id,
                    pipeline.epoch,
                    len(pipeline.stages),
                    self._limits,
                    takeover=True,
                    planned=planned,
                    salt=self._salt(pipeline),
                    now=now,
                    proposer=self._proposer,
                )
                for other in self.by_pipeline.values():  # the same model, on nodes like ours
                    scheduler.batcher.speed.learn(other.batcher.speed)
                self.by_pipeline[pipeline.id] = scheduler
                scheduler = self._dispatch(scheduler, capacity)
                self._perform(scheduler, scheduler.start(now))
            elif scheduler.fence.epoch < pipeline.epoch:
                self._forget_unsent(pipeline.id)
                scheduler = self._dispatch(
                    scheduler, EpochBegan(pipeline.epoch, planned, self._salt(pipeline))
                )
            scheduler = self._dispatch(scheduler, capacity)
            self._dispatch(scheduler, self._candidates(topology, pipeline))
            self._news()
        self._listen(topology)

    def _candidates(self, topology: Topology, pipeline: Pipeline) -> CandidatesChanged:
        """Who may hold copies of its requests: whoever computes with them as well as it does."""
        if topology.mode not in HOLDER_MODES:
            return CandidatesChanged(None)
        salt = self._salt(pipeline)
        able = [p.id for p in candidates_of(topology, pipeline, self.hosts) if self._salt(p) == salt]
        return CandidatesChanged(tuple(able), topology.mode is Mode.FIXED_NEIGHBOUR)

    def _listen(self, topology: Topology) -> None:
        """Who wants to know how much our pipelines have to do."""
        self._listeners = {}
        for pipeline in topology.pipelines if topology.mode in HOLDER_MODES else ():
            if pipeline.id in self.by_pipeline:
                schedulers = [p.scheduler for p in sources_of(topology, pipeline, self.hosts)]
                self._listeners[pipeline.id] = [member for member in schedulers if member is not None]

    def on_load(self, meta: LoadMeta) -> None:
        """Another pipeline says how much it has to do."""
        for scheduler in list(self.by_pipeline.values()):
            if scheduler.holders is not None and scheduler.pipeline != meta.pipeline:
                self._dispatch(scheduler, meta)

    def _tell_loads(self) -> None:
        now = time.monotonic()
        if not self._listeners or now < self._loads_at:
            return
        self._loads_at = now + LOADS_EVERY_S
        for pipeline, members in self._listeners.items():
            scheduler = self.by_pipeline.get(pipeline)
            if scheduler is not None:
                meta = LoadMeta(pipeline, scheduler.fence, scheduler.work)
                for member in members:
                    self._send(member, meta, b"")  # what is lost of it is said again soon

    def _end(self, pipeline: PipelineId) -> None:
        """Another node schedules the pipeline now, or it is gone."""
        scheduler = self.by_pipeline.pop(pipeline)
        self._remember(scheduler)
        self._perform(scheduler, scheduler.close())

    def on_gateway(self, session: int, message: GatewayMessage) -> None:
        match message:
            case Submit(rid, pipeline):
                if (scheduler := self.by_pipeline.get(pipeline)) is not None:
                    self._dispatch(scheduler, Submitted(message, session))
                else:
                    text = f"{self._me} does not schedule {pipeline}"
                    refused = Refused(rid, pipeline, RefusalCode.NOT_HERE, text)
                    self._frontdoor.send(session, refused)
            case Cancel(rid, pipeline):
                if (scheduler := self.by_pipeline.get(pipeline)) is not None:
                    self._dispatch(scheduler, Cancelled(rid, session))
            case Recall(rid):
                logs = [log for s in self.by_pipeline.values() if (log := s.recall(rid)) is not None]
                # It may have moved from one of them to another: who has more of it had it last.
                found = max(logs, key=lambda log: len(log.emitted), default=None)
                self._frontdoor.send(session, Recalled(rid, found))
            case _:
                assert_never(message)

    def on_session_lost(self, session: int) -> None:
        for scheduler in list(self.by_pipeline.values()):
            self._dispatch(scheduler, SessionLost(session))

    def on_message(
        self, meta: ResultMeta | StepFailedMeta | HeldMeta | ReadyMeta | LostMeta | CopiedMeta
    ) -> None:
        scheduler = self.by_pipeline.get(meta.pipeline)
        if scheduler is not None:
            self._dispatch(scheduler, meta)

    def on_link_up(self, peer: Member) -> None:
        for meta in self._unsent.pop(peer, []):
            self._send(peer, meta, b"")

    def tick(self) -> None:
        for scheduler in list(self.by_pipeline.values()):
            self._dispatch(scheduler, Tick())
        self._tell_loads()

    def counters(self) -> dict[str, int]:
        """Totals over present and past schedulers, by name."""
        stats = [self._past, *(s.stats for s in self.by_pipeline.values())]
        totals = {name: sum([getattr(s, name) for s in stats]) for name in COUNTERS}
        moved = sum(s.holders.moved for s in self.by_pipeline.values() if s.holders is not None)
        return totals | {"crashes": self.crashes_total, "copies_moved": self._copies_moved + moved}

    # ------------------------------------------------------------------ effects

    def _dispatch(self, scheduler: Scheduler, event: Event) -> Scheduler:
        """Returns the pipeline's scheduler: another one if this one raised."""
        now = time.monotonic()
        try:
            effects = scheduler.step(event, now)
        except Exception as error:
            log.exception("the scheduler of %s raised at %s", scheduler.pipeline, type(event).__name__)
            return self._replace(scheduler, event, error, now)
        self._perform(scheduler, effects)
        return scheduler

    def _replace(self, broken: Scheduler, event: Event, error: Exception, now: float) -> Scheduler:
        """An error of ours at one request must not end node after node, nor may a state be used that it left half-way.

        What a scheduler knows is a cache of what gateways and stages know: a fresh one takes over, in the next round,
        stages keep their KV, gateways submit again. If a request had come, that one goes back as poisoned: it is
        tried on another node and then quarantined. Raises again when this happens too often.
        """
        self.crashes_total += 1
        if len(self._crashes) == CRASHES_MAX and now - self._crashes[0] < CRASHES_WITHIN_S:
            raise error
        self._crashes.append(now)
        if isinstance(event, Submitted):
            rid, session = event.message.rid, event.session
            broken.requests.pop(rid, None)
            text = f"{self._me} failed to schedule this request"
            refused = Refused(rid, broken.pipeline, RefusalCode.POISONED, text, node=self._me.node)
            self._frontdoor.send(session, refused)
        self._remember(broken)
        self._perform(broken, broken.close())
        fresh = broken.successor(now)
        self.by_pipeline[fresh.pipeline] = fresh
        pipeline = self._topology.pipeline(fresh.pipeline) if self._topology is not None else None
        if self._topology is not None and pipeline is not None:
            served = served_counts(self._topology)
            self._dispatch(fresh, self._capacity(self._topology, pipeline, served))
            self._dispatch(fresh, self._candidates(self._topology, pipeline))
        self._perform(fresh, fresh.start(now))
        return fresh

    def _perform(self, scheduler: Scheduler, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case RunStep(meta, tokens):
                    self._run_local(Message(self._me, meta, b"", tokens, MOMENT.now()))
                case Ask(meta):
                    self._ask(scheduler.pipeline, meta)
                case Deliver(session, tokens):
                    message = Tokens(scheduler.pipeline, scheduler.fence.epoch, tokens)
                    self._frontdoor.send(session, message)
                case Tell(session, holders):
                    message = Tokens(scheduler.pipeline, scheduler.fence.epoch, (), holders)
                    self._frontdoor.send(session, message)
                case Refuse(session, refused):
                    self._frontdoor.send(session, refused)
                case Recovered(timing):
                    to_unix = time.time() - time.monotonic()
                    self.recoveries.append(
                        RecoveryReport(
                            pipeline=scheduler.pipeline,
                            epoch=timing.epoch,
                            seen_unix_s=timing.seen + to_unix,
                            connected_unix_s=timing.connected + to_unix,
                            restored_unix_s=timing.restored + to_unix,
                            first_token_unix_s=timing.first_token + to_unix,
                            requests=timing.requests,
                            tokens_recomputed=timing.tokens_recomputed,
                            planned=timing.planned,
                        )
                    )
                    del self.recoveries[:-RECOVERIES_KEPT]
                    self.recoveries_total += 1
                    self._news()

    def _ask(self, pipeline_id: PipelineId, meta: RejoinMeta) -> None:
        pipeline = self._topology.pipeline(pipeline_id) if self._topology is not None else None
        if pipeline is None:
            return
        for stage in pipeline.stages:
            member = stage.leader
            if member is not None and not self._send(member, meta, b""):
                unsent = self._unsent.setdefault(member, [])
                unsent.append(meta)
                del unsent[:-UNSENT_MAX]

    def _forget_unsent(self, pipeline_id: PipelineId) -> None:
        for member, metas in list(self._unsent.items()):
            self._unsent[member] = [meta for meta in metas if meta.pipeline != pipeline_id]
            if not self._unsent[member]:
                del self._unsent[member]

    def _capacity(self, topology: Topology, pipeline: Pipeline, served: Counter[NodeId]) -> CapacityChanged:
        """Blocks: the least that one of its nodes can give it; the least counts, as all hold the same blocks.

        `served`: how many pipelines each node serves.
        """
        quotas = []
        shared = 1
        # By host, for each node there: how many such nodes the host can run at once.
        on_host: dict[str, list[int]] = {}
        for member in pipeline.members():
            record = self._records.get(member.node)
            if record is not None:
                serves = served[member.node]
                quotas.append(quota_blocks(record.pool_blocks, serves, topology.copies))
                shared = max(shared, serves)
                on_host.setdefault(record.fault_domain.get("host", member.node), []).append(
                    record.host_parallel
                )
        parallel = sum(min(len(limits), *limits) for limits in on_host.values())
        return CapacityChanged(min(quotas, default=0), self._microbatches or max(1, parallel), shared)

    def _salt(self, pipeline: Pipeline) -> bytes:
        """What decides the bits of the pipeline's KV besides tokens: the numerics of all its stages. If those of one
        are not known, nothing is shared with what was computed before or elsewhere."""
        numerics = []
        for member in pipeline.members():
            record = self._records.get(member.node)
            if record is None or record.member != member or not record.numerics:
                return os.urandom(16)
            numerics.append(record.numerics)
        return hashlib.blake2b("\n".join(numerics).encode(), digest_size=16).digest()

    def _remember(self, scheduler: Scheduler) -> None:
        for name in COUNTERS:
            setattr(self._past, name, getattr(self._past, name) + getattr(scheduler.stats, name))
        self._copies_moved += scheduler.holders.moved if scheduler.holders is not None else 0


def served_counts(topology: Topology) -> Counter[NodeId]:
    """How many pipelines each node serves: one pass over the topology."""
    found: Counter[NodeId] = Counter()
    for pipeline in topology.pipelines:
        found.update({member.node for stage in pipeline.stages for member in stage.ranks})
    return found
