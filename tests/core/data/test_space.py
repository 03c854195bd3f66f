"""A stage without room for what its scheduler thinks that it has: less is tried, and in the end it is said."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.contract import topology
from controlplane.contract.ids import Member
from controlplane.contract.requests import FinishReason, RefusalCode, Refused, Sampling, Submit
from controlplane.contract.topology import Mode, Topology, quota_blocks
from dataplane._fast.blocktable import Rows
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.events import (
    Ask,
    CapacityChanged,
    Deliver,
    Effect,
    Event,
    Refuse,
    RunStep,
    Submitted,
    Tick,
)
from dataplane.core.messages import Begin, Fence, ResultMeta, Row, StepFailedMeta, StepMeta, pack_rows
from dataplane.core.request import pack_tokens
from dataplane.core.scheduler import SPACE_RETRY_S, Scheduler
from dataplane.core.stage import Prepared, Stage

BLOCK = 4
LIMITS = Limits(
    block_size=BLOCK,
    max_batch_tokens=64,
    max_running=16,
    max_waiting=99,
    context_len=256,
    orphan_grace_s=60.0,
)


def rows_of(*rows: Row) -> Rows:
    return Rows(pack_rows(list(rows)))


def hold(store: KvStore, pipeline: str, rid: int, blocks: int) -> None:
    """KV that is served here for somebody else."""
    rows = rows_of((rid, 0, blocks * BLOCK, False))
    table_rows = store.begin(pipeline, rows)
    assert table_rows is not None
    store.commit(table_rows, rows)


def copy(store: KvStore, pipeline: str, rid: int, blocks: int) -> None:
    for index in range(blocks):
        assert store.copies.place((pipeline, rid), index, (index + 1) * BLOCK) is not None
        store.copies.written((pipeline, rid), index, (index + 1) * BLOCK, 0)


class Pipeline:
    """One scheduler and one stage, which computes nothing and draws token 7; `now` moves by 10 ms a turn."""

    def __init__(self, store: KvStore, quota: int) -> None:
        self.now = 0.0
        self.store = store
        self.stage = Stage("p0", 0, 2, 1, store)  # not the last, which would have to sample
        self.scheduler = Scheduler("p0", 1, 1, LIMITS, takeover=False, now=0.0)
        self.refused: dict[int, Refused] = {}
        self.ended: dict[int, FinishReason] = {}
        self.failures = 0
        self._todo: list[Effect] = []
        self.tell(CapacityChanged(quota, 1))

    def tell(self, event: Event) -> None:
        self._todo += self.scheduler.step(event, self.now)

    def submit(self, rid: int, prompt: int, tokens: int) -> None:
        message = Submit(rid, "p0", tuple(range(100 * rid, 100 * rid + prompt)), Sampling(tokens, seed=1))
        self.tell(Submitted(message, session=1))

    def run(self, turns: int) -> None:
        for _ in range(turns):
            self.now += 0.01
            todo, self._todo = self._todo, []
            for effect in todo:
                self._perform(effect)
            self.tell(Tick())

    def _perform(self, effect: Effect) -> None:
        match effect:
            case RunStep(meta, _):
                if self.stage.stale(meta.fence):
                    return
                prepared = self.stage.prepare(meta)
                if isinstance(prepared, Prepared):
                    self.stage.commit(prepared, None)
                    drawn = pack_tokens([7] * len(prepared.rows.sample_rids))
                    self.tell(ResultMeta("p0", meta.fence, meta.step, drawn))
                else:
                    self.failures += 1
                    failed = StepFailedMeta(
                        "p0", meta.fence, meta.step, 0, prepared, missing=self.store.missing
                    )
                    self.tell(failed)
            case Ask(meta):
                self.tell(self.stage.rejoin(meta))
            case Refuse(_, message):
                self.refused[message.rid] = message
            case Deliver(_, tokens):
                self.ended |= {t.rid: t.finish for t in tokens if t.finish is not None}


@pytest.mark.parametrize("missing_is_told", [True, False])
def test_a_stage_with_less_room_than_the_quota(missing_is_told: bool) -> None:
    """Others hold 40 of 64 blocks; the quota says 32. It was tried with the same rows for ever."""
    store = KvStore(64, BLOCK, 64, 64)
    hold(store, "p1", 1, 40)
    line = Pipeline(store, quota=32)
    if not missing_is_told:  # a stage of an older version
        line.store = KvStore(1, 1, 1, 1)
    for rid in range(8):
        line.submit(rid, prompt=12, tokens=8)  # 5 blocks in the end, 40 for all
    line.run(400)
    assert line.ended == dict.fromkeys(range(8), FinishReason.LENGTH)
    assert not line.refused
    assert line.failures <= 8
    assert line.scheduler.stats.space_failures == line.failures > 0
    store.check()


def test_who_cannot_fit_even_alone_is_refused_clearly() -> None:
    store = KvStore(64, BLOCK, 64, 64)
    hold(store, "p1", 1, 60)
    line = Pipeline(store, quota=32)
    line.submit(1, prompt=20, tokens=8)
    line.run(20)
    assert line.refused[1].code is RefusalCode.OVERLOADED, "elsewhere or later: it is not the request's fault"
    assert "20 tokens do not fit" in line.refused[1].message
    assert line.failures == 1
    line.submit(2, prompt=3, tokens=2)
    line.run(20)
    assert line.ended == {2: FinishReason.LENGTH}


def test_the_quota_is_tried_again_and_less_often_each_time() -> None:
    store = KvStore(64, BLOCK, 64, 64)
    hold(store, "p1", 1, 60)
    line = Pipeline(store, quota=32)
    for round_ in range(3):
        line.submit(round_, prompt=20, tokens=8)
        line.run(20)
        assert line.failures == round_ + 1
        assert line.scheduler.batcher.quota_blocks < 32
        line.run(int(SPACE_RETRY_S * 2**round_ * 100))
        assert line.scheduler.batcher.quota_blocks == 32
    store.leave("p1", demote=False)
    line.submit(9, prompt=20, tokens=8)
    line.run(50)
    assert line.ended == {9: FinishReason.LENGTH}
    assert line.failures == 3


def test_a_new_quota_counts_at_once() -> None:
    store = KvStore(64, BLOCK, 64, 64)
    hold(store, "p1", 1, 60)
    line = Pipeline(store, quota=32)
    line.submit(1, prompt=20, tokens=8)
    line.run(5)
    assert line.scheduler.batcher.quota_blocks < 32
    line.tell(CapacityChanged(32, 1))  # each topology says it again: nothing has changed
    assert line.scheduler.batcher.quota_blocks < 32
    line.tell(CapacityChanged(21, 1))
    assert line.scheduler.batcher.quota_blocks == 21


def test_kv_of_a_pipeline_that_is_down_makes_room() -> None:
    """It kept half of the pool, its old quota, while two others thought that they had a third each."""
    store = KvStore(60, BLOCK, 64, 64)
    for rid in range(6):
        hold(store, "p1", rid, 5)
    hold(store, "p2", 1, 20)
    line = Pipeline(store, quota=quota_blocks(60, 3))
    store.idle = frozenset({"p1"})
    copy(store, "p3", 1, 2)
    line.submit(1, prompt=64, tokens=4)  # 17 blocks of 8 that are free
    line.run(30)
    assert line.ended == {1: FinishReason.LENGTH}
    assert line.failures == 0
    assert ("p3", 1) not in store.copies.rows, "copies go first"
    assert list(store.own["p1"]) == [0, 1, 2, 3], "and then no more than has to, the youngest first"
    assert store.tokens(("p2", 1)) == 20 * BLOCK
    store.check()


def test_copies_are_not_evicted_for_a_step_that_cannot_run() -> None:
    store = KvStore(32, BLOCK, 64, 64)
    hold(store, "p1", 1, 20)
    copy(store, "p3", 1, 4)
    assert store.begin("p0", rows_of((5, 0, 15 * BLOCK, False))) is None
    assert store.missing == 15 - 12
    assert store.copies.tokens(("p3", 1)) == 4 * BLOCK
    store.check()


@pytest.mark.parametrize("pool", [4, 7, 64, 2048])
def test_quotas_of_all_pipelines_of_a_node_never_exceed_its_pool(pool: int) -> None:
    for served in range(1, 9):
        for copies in (True, False):
            assert served * quota_blocks(pool, served, copies) <= pool


def test_no_room_is_kept_for_copies_where_there_are_none() -> None:
    stage = topology.Stage(("n0",), (Member("n0", "a"),))
    alone = Topology("g", 1, Mode.REPLICATE, (topology.Pipeline("p0", 1, (stage,)),))
    two = replace(alone, pipelines=(*alone.pipelines, topology.Pipeline("p1", 1, (stage,))))
    assert [t.copies for t in (alone, two, replace(two, mode=Mode.NONE))] == [False, True, False]
    assert (quota_blocks(100, 1), quota_blocks(100, 1, False), quota_blocks(100, 2, False)) == (50, 100, 50)


def test_no_row_of_the_table_is_want_of_space() -> None:
    """What is missing is not computed again, so the same was tried for ever: with less there is room."""
    store = KvStore(1000, BLOCK, 2, 64)

    def begin(pipeline: str, rid: int, names: tuple[bytes, ...] = ()) -> Prepared | str:
        meta = StepMeta(
            pipeline,
            Fence(1, 0),
            0,
            pack_rows([(rid, 0, 4, False)]),
            admits=(),
            begins=(Begin(rid, b"".join(names)),),
        )
        return Stage(pipeline, 1, 3, 1, store).prepare(meta)

    hold(store, "p1", 1, 1)
    assert isinstance(begin("p0", 2), Prepared)
    assert (begin("p0", 3), store.missing) == ("space", 1)
    assert begin("p0", 3, (bytes(16),)) == "gap"
    store.release(("p1", 1))
    assert isinstance(begin("p0", 3), Prepared)
