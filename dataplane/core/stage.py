"""One stage of one pipeline on one node: which steps it takes, what KV it holds, what it must know to sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from controlplane.contract.ids import PipelineId
from controlplane.contract.requests import Sampling
from dataplane.core.blocks import KvStore
from dataplane.core.messages import Fence, HeldMeta, RejoinMeta, Sample, StepMeta
from dataplane.core.request import unpack_tokens


@dataclass(slots=True)
class TokenLog:
    """What the last stage samples by."""

    sampling: Sampling
    prompt: list[int]
    output: list[int]


@dataclass(slots=True)
class Prepared:
    """A step whose blocks are there: block-table rows, first positions and counts, one of each a row."""

    meta: StepMeta
    rows: list[int]
    starts: list[int]
    counts: list[int]
    sample_rows: list[int] = field(default_factory=list)  # index of the last token of each row that samples
    logs: list[TokenLog] = field(default_factory=list)  # of those rows; last stage only


class Stage:
    def __init__(self, pipeline: PipelineId, index: int, num_stages: int, epoch: int, store: KvStore) -> None:
        self.pipeline = pipeline
        self.index = index
        self.num_stages = num_stages
        self.fence = Fence(epoch, 0)
        self.last_step = -1  # executed in this fence
        self.store = store
        self._logs: dict[int, TokenLog] = {}

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def enter(self, fence: Fence) -> None:
        """What was in flight before `fence` is void, and so is what was known of requests' logs."""
        self.fence = fence
        self.last_step = -1
        self._logs.clear()

    def stale(self, fence: Fence) -> bool:
        return fence < self.fence

    def prepare(self, meta: StepMeta) -> Prepared | str:
        """Free, admit, and find blocks for a step. A string says why it cannot run: "space" or "gap"."""
        if meta.fence > self.fence:  # it came before the question that begins its round
            self.enter(meta.fence)
        for rid in meta.frees:
            self.store.release((self.pipeline, rid))
            self._logs.pop(rid, None)
        if self.is_last:
            for admit in meta.admits:
                self._logs[admit.rid] = TokenLog(
                    admit.sampling, unpack_tokens(admit.prompt), unpack_tokens(admit.output)
                )
        prepared = Prepared(meta, [], [], [])
        end = 0
        for row in meta.rows:
            key = (self.pipeline, row.rid)
            if not self.store.grow(key, row.start + row.count):
                return "space"
            kv = self.store.own[key]
            if kv.tokens < row.start or (self.is_last and row.sample and row.rid not in self._logs):
                return "gap"
            # What is being computed is not valid until `commit`: nobody may copy or count it before.
            kv.tokens = row.start
            prepared.rows.append(kv.row)
            prepared.starts.append(row.start)
            prepared.counts.append(row.count)
            end += row.count
            if row.sample and self.is_last:
                prepared.sample_rows.append(end - 1)
                prepared.logs.append(self._logs[row.rid])
        return prepared

    def commit(self, meta: StepMeta, samples: tuple[Sample, ...]) -> None:
        """The step has run: the KV of its rows is valid."""
        self.last_step = meta.step
        for row in meta.rows:
            self.store.own[(self.pipeline, row.rid)].tokens = row.start + row.count
        for sample in samples:
            log = self._logs.get(sample.rid)
            if log is not None:
                log.output.append(sample.token)

    def rejoin(self, meta: RejoinMeta, checksum: Callable[[int], int]) -> HeldMeta:
        """Enter the message's fence, promote what copies there are, and say what is held of each request."""
        if meta.fence > self.fence:
            self.enter(meta.fence)
        for rid in meta.rids:
            key = (self.pipeline, rid)
            if key not in self.store.own and key in self.store.replicas:
                self.store.promote(key, checksum)
        if meta.complete:
            self.store.release_pipeline(self.pipeline, keep=meta.rids)
            self.store.drop_replicas(self.pipeline)
        held = tuple(
            (rid, self.store.own[(self.pipeline, rid)].tokens)
            for rid in meta.rids
            if (self.pipeline, rid) in self.store.own
        )
        return HeldMeta(self.pipeline, meta.fence, meta.ask, self.index, held)
