"""A pipeline of pure parts: the real scheduler, stages, block stores and replicators, and a model of integers.

KV is real bytes in a real pool, and a token depends on every byte of KV that its request should have on every
stage: a block that is lost, swapped, stale or cut short shows as a wrong token.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from controlplane.contract.ids import Member
from controlplane.contract.requests import Sampling, Submit
from dataplane._fast.blocktable import Rows
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.checksums import Check
from dataplane.core.events import (
    Ask,
    CapacityChanged,
    Deliver,
    Effect,
    EpochBegan,
    Event,
    Recovered,
    Refuse,
    RunStep,
    Submitted,
    Tick,
)
from dataplane.core.messages import (
    Fence,
    HeldMeta,
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
from dataplane.core.request import Phase, Request
from dataplane.core.scheduler import Scheduler
from dataplane.core.stage import Prepared, Stage
from dataplane.kvcache import KVCache
from dataplane.model.sampler import SamplingTable
from dataplane.replica import Replicator

BLOCK = 4
PIPELINE = "p0"
VOCAB = 50_000

T = TypeVar("T")


async def here(call: Callable[..., T], /, *arguments: object, size: int | None = None) -> T:
    """In the place of the KV thread: done at once."""
    return call(*arguments)


def done(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits for something")


def mix(*values: int) -> int:
    return zlib.crc32(np.array(values, np.uint64).tobytes())


def next_token(tokens: list[int], stages: int) -> int:
    """What the model says after `tokens`: the reference that never fails."""
    hidden = list(tokens)
    for stage in range(stages):
        kv = [mix(stage, h) for h in hidden]
        hidden = [mix(hidden[i], *kv[: i + 1]) for i in range(len(hidden))]
    return hidden[-1] % VOCAB


class IntKv(KVCache):
    """Stands where the tensor pool is: one uint32 a position."""

    def __init__(self, num_blocks: int) -> None:
        # Keys and values: BLOCK numbers of 4 bytes.
        super().__init__(num_blocks, 1, 1, BLOCK // 2, 1, "float32")
        self.data = self.pool.view(np.uint32)


@dataclass
class Node:
    """One stage's worth of a node: what dataplane/worker.py does, without threads."""

    cluster: Cluster
    me: Member
    stage_index: int
    blocks: int
    alive: bool = True
    stage: Stage | None = None
    inbox: deque[tuple[Member, Meta, bytes]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.store = KvStore(self.blocks, BLOCK, 64, 64)
        self.kv = IntKv(self.blocks)
        self.replicator = Replicator(self.store, self.kv, here, self.send)  # type: ignore[arg-type]

    def send(self, peer: Member, meta: Meta, payload: bytes) -> bool:
        return self.cluster.send(self.me, peer, meta, bytes(payload))

    def serve(self, epoch: int, replicas: list[Member]) -> None:
        if self.stage is None:
            last = self.stage_index == self.cluster.stages - 1
            sampling = SamplingTable(self.store.table.max_rows, VOCAB) if last else None
            self.stage = Stage(PIPELINE, self.stage_index, self.cluster.stages, epoch, self.store, sampling)
        elif self.stage.fence.epoch < epoch:
            self.stage.enter(Fence(epoch))
        self.replicator.protect(PIPELINE, epoch, replicas)

    def leave(self, demote: bool) -> None:
        self.stage = None
        self.replicator.unprotect(PIPELINE)
        self.store.leave(PIPELINE, demote)

    def handle(self, peer: Member, meta: Meta, payload: bytes) -> None:
        fence: Fence = meta.fence  # type: ignore[union-attr]
        if fence.epoch < self.cluster.epoch:
            return
        match meta:
            case StepMeta():
                if self.stage is not None and not self.stage.stale(meta.fence):
                    self.run(self.stage, meta, payload)
            case RejoinMeta():
                if self.stage is not None and not self.stage.stale(meta.fence):
                    self.send(peer, self.replicator.rejoin(self.stage, meta), b"")
            case KvMeta():
                done(self.replicator.store_copies(peer, meta, memoryview(payload)))
            case KvAckMeta():
                self.replicator.acknowledged(peer, meta, self.cluster.now)
            case KvQueryMeta():
                self.replicator.answer_query(peer, meta)
            case KvDropMeta():
                self.replicator.drop_copies(peer, meta)
            case _:
                raise TypeError(meta)
        done(self.replicator.pump(self.cluster.now))
        self.store.check()

    def run(self, stage: Stage, meta: StepMeta, payload: bytes) -> None:
        self.look_at(self.store.straddled(PIPELINE, Rows(meta.rows)))
        prepared = stage.prepare(meta)
        self.replicator.freed(PIPELINE, (*meta.drops, *meta.frees))
        if isinstance(prepared, str):
            self.cluster.to_scheduler(
                self.me, StepFailedMeta(PIPELINE, meta.fence, meta.step, stage.index, prepared)
            )
            return
        # The worst moment to copy: blocks are there, their contents are not.
        done(self.replicator.pump(self.cluster.now))
        hidden = self.compute(stage, prepared, np.frombuffer(payload, np.uint64))
        if self.look_at(self.store.unverified(prepared.table_rows.tolist())):
            failed = StepFailedMeta(PIPELINE, meta.fence, meta.step, stage.index, "gap")
            self.cluster.to_scheduler(self.me, failed)
            return
        drawn = (hidden[prepared.rows.sample_rows] % VOCAB).astype(np.int64)
        for index in np.flatnonzero(prepared.rows.depths) if prepared.drafts is not None else ():
            if drawn[index - 1] != prepared.drafts[index]:
                drawn[index] = -1
        filled = stage.commit(prepared, drawn if stage.is_last else None)
        self.replicator.advanced(PIPELINE, prepared.rows, filled)
        if stage.is_last:
            tokens = drawn.astype("<i4").tobytes()
            self.cluster.to_scheduler(self.me, ResultMeta(PIPELINE, meta.fence, meta.step, tokens))
        elif not self.send(self.cluster.serving[stage.index + 1], meta, hidden.tobytes()):
            self.cluster.to_scheduler(
                self.me, StepFailedMeta(PIPELINE, meta.fence, meta.step, stage.index, "link")
            )

    def look_at(self, checks: list[Check]) -> set[int]:
        sums = done(here(self.replicator._bytes.sums, [check.block for check in checks]))
        return self.store.looked_at(checks, sums)

    def compute(self, stage: Stage, prepared: Prepared, hidden: np.ndarray) -> np.ndarray:
        out = np.zeros(len(hidden), np.uint64)
        at = 0
        for row, start, count in zip(
            prepared.table_rows, prepared.rows.starts, prepared.rows.counts, strict=True
        ):
            blocks = self.store.table.blocks(row)
            for position in range(start, start + count):
                self.kv.data[blocks[position // BLOCK], position % BLOCK] = mix(stage.index, int(hidden[at]))
                kv = self.kv.data[blocks].reshape(-1)[: position + 1]
                out[at] = mix(int(hidden[at]), *(int(v) for v in kv))
                at += 1
        return out


class Guesser:
    """Drafts what the model will say, with an error now and then."""

    def pass_s(self, requests: int) -> float:
        return 0.0

    def __init__(self, random: random.Random, stages: int, right: float) -> None:
        self.random, self.stages, self.right = random, stages, right

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        found = []
        for request in requests:
            ids = list(request.ids)
            for _ in range(self.random.randrange(count + 1)):
                right = self.random.random() < self.right
                ids.append(next_token(ids, self.stages) if right else self.random.randrange(VOCAB))
            found.append(ids[request.total :])
        return found

    def forget(self, rid: int) -> None:
        pass


class Cluster:
    """One pipeline, with a peer for each stage. Messages between two nodes keep their order; links do not."""

    def __init__(
        self, stages: int, seed: int, blocks: int = 64, quota: int = 32, drafts_right: float | None = None
    ) -> None:
        """`drafts_right`: steps have drafts, of which that part are right."""
        self.random = random.Random(seed)
        self.stages = stages
        self.epoch = 1
        self.now = 0.0
        self.limits = Limits(BLOCK, 16, 16, 64, 120, 1.0)
        self.proposer = None
        if drafts_right is not None:
            self.limits = replace(self.limits, speculation="ngram", max_draft_tokens=6)
            self.proposer = Guesser(self.random, stages, drafts_right)
        self.quota = quota
        self.nodes: dict[Member, Node] = {}
        for instance in range(2):
            for stage in range(stages):
                self.add(Member(f"n{instance * stages + stage}", "a"), stage, blocks)
        members = list(self.nodes)
        self.serving = members[:stages]
        self.peers = members[stages:]
        self.links: dict[tuple[Member, Member], deque[tuple[Meta, bytes]]] = {}
        self.received: dict[int, list[int]] = {}
        self.submitted: dict[int, Submit] = {}
        self.finished: set[int] = set()
        self.recoveries: list[Recovered] = []
        self.refused: list[Refuse] = []
        self.blocks = blocks
        self.scheduler = self.new_scheduler(takeover=False)
        self.apply_topology()

    def add(self, member: Member, stage: int, blocks: int) -> None:
        self.nodes[member] = Node(self, member, stage, blocks)

    def new_scheduler(self, takeover: bool) -> Scheduler:
        scheduler = Scheduler(
            PIPELINE,
            self.epoch,
            self.stages,
            self.limits,
            takeover=takeover,
            now=self.now,
            proposer=self.proposer,
        )
        self.perform(scheduler.step(CapacityChanged(self.quota, self.stages), self.now))
        return scheduler

    # ------------------------------------------------------------------ network

    def send(self, source: Member, to: Member, meta: Meta, payload: bytes) -> bool:
        if not self.nodes[to].alive:
            return False
        self.links.setdefault((source, to), deque()).append((meta, payload))
        return True

    def to_scheduler(self, source: Member, meta: Meta) -> None:
        self.send(source, self.serving[0], meta, b"")

    def deliver_one(self) -> bool:
        ready = [link for link, queue in self.links.items() if queue]
        if not ready:
            return False
        link = self.random.choice(ready)
        meta, payload = self.links[link].popleft()
        node = self.nodes[link[1]]
        if not node.alive:
            return True
        if isinstance(meta, ResultMeta | StepFailedMeta | HeldMeta):
            if link[1] == self.serving[0]:
                self.dispatch(meta)
        else:
            node.handle(link[0], meta, payload)
        return True

    # ------------------------------------------------------------------ scheduler and gateway

    def dispatch(self, event: Event) -> None:
        self.perform(self.scheduler.step(event, self.now))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case RunStep(meta, tokens):
                    payload = np.array(tokens, np.uint64).tobytes()
                    self.send(self.serving[0], self.serving[0], meta, payload)
                case Ask(meta):
                    for member in self.serving:
                        self.send(self.serving[0], member, meta, b"")
                case Deliver(_, tokens):
                    for token in tokens:
                        log = self.received[token.rid]
                        if token.position == len(log):  # as the gateway does
                            log.append(token.token)
                            if token.finish is not None:
                                self.finished.add(token.rid)
                        assert token.position <= len(log), "a gap"
                case Refuse():
                    self.refused.append(effect)
                case Recovered():
                    self.recoveries.append(effect)

    def submit(self, rid: int, prompt: list[int], max_tokens: int) -> None:
        self.received[rid] = []
        self.submitted[rid] = Submit(rid, PIPELINE, tuple(prompt), Sampling(max_tokens, seed=0))
        self.dispatch(Submitted(self.submitted[rid], 1))

    def resubmit_all(self) -> None:
        for rid, first in self.submitted.items():
            if rid not in self.finished:
                message = Submit(
                    rid, PIPELINE, first.prompt, first.sampling, tuple(self.received[rid]), 0, True
                )
                self.dispatch(Submitted(message, 1))

    # ------------------------------------------------------------------ faults

    def apply_topology(self) -> None:
        for index, member in enumerate(self.serving):
            peer = self.peers[index]
            targets = [peer] if peer != member and self.nodes[peer].alive else []
            self.nodes[member].serve(self.epoch, targets)

    def replace(self, stage: int, by: Member, demote: bool = False) -> None:
        """Another node serves `stage` from now on: what the leader's topology write brings about."""
        old = self.serving[stage]
        self.epoch += 1
        self.serving[stage] = by
        if self.nodes[old].alive:
            self.nodes[old].leave(demote)
            self.peers[stage] = old
        self.apply_topology()
        if stage == 0:
            self.scheduler = self.new_scheduler(takeover=True)
            self.perform(self.scheduler.start(self.now))
            self.resubmit_all()
        else:
            self.dispatch(EpochBegan(self.epoch, planned=False))

    def kill(self, stage: int) -> None:
        """kill -9 of the serving node; its peer is borrowed."""
        self.nodes[self.serving[stage]].alive = False
        self.replace(stage, self.peers[stage])

    def move(self, stage: int, to: Member) -> int:
        """A planned switch: the copy, then the epoch. Returns how many tokens have to be computed again: those that
        were issued, and of which no copy was acknowledged or another stage has nothing."""
        source = self.nodes[self.serving[stage]]
        targets = [m for m in (self.peers[stage], to) if self.nodes[m].alive and m != source.me]
        source.replicator.protect(PIPELINE, self.epoch, list(dict.fromkeys(targets)))
        self.run(self.random.randrange(60))
        for _ in range(20_000):
            source.look_at(source.store.checksums.next(1))  # a worker does in idle time
            lag = {t.target: t.lag_tokens for t in source.replicator.targets(PIPELINE)}
            if lag[to] <= 2 * BLOCK * self.scheduler.running:
                break
            self.run(1)
        else:
            raise AssertionError("the copy never came near")
        there = source.replicator._protected[PIPELINE].sources[to]
        lacks = 0
        for request in self.scheduler.requests.values():
            if request.phase is Phase.RUNNING:
                others = (self.nodes[m].store for m in self.serving if m != source.me)
                held = [there.acked(request.rid), *(s.tokens((PIPELINE, request.rid)) for s in others)]
                lacks += max(0, min(request.issued, request.total - 1) - min(held))
            elif request.phase is Phase.RECOVERING:
                lacks += request.computed
        self.replace(stage, to)
        return lacks

    def join(self, stage: int, name: str) -> Member:
        """A blank replacement."""
        member = Member(name, f"b{self.epoch}")
        self.add(member, stage, self.blocks)
        return member

    # ------------------------------------------------------------------ time

    def run(self, deliveries: int) -> None:
        for _ in range(deliveries):
            self.now += 0.001
            if not self.deliver_one():
                self.now += 0.05
                self.dispatch(Tick())
                for node in self.nodes.values():
                    if node.alive:
                        done(node.replicator.pump(self.now))

    def run_to_end(self, limit: int = 200_000) -> None:
        for _ in range(limit):
            if len(self.finished) + len(self.refused) >= len(self.submitted):
                return
            self.run(1)
        raise AssertionError(f"stuck: {self.finished} of {list(self.submitted)} finished")

    def check(self) -> None:
        """Every stream equals the stream that never failed."""
        for rid, submit in self.submitted.items():
            tokens = list(submit.prompt)
            for position, token in enumerate(self.received[rid]):
                assert token == next_token(tokens, self.stages), f"request {rid} position {position}"
                tokens.append(token)
            assert len(self.received[rid]) == submit.sampling.max_tokens
