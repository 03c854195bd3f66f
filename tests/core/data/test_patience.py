"""Slow stages: what they compute counts, and a lost message is noticed all the same."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from controlplane.contract.requests import Sampling, Submit
from dataplane._fast.blocktable import Rows
from dataplane.core.batching import Limits
from dataplane.core.events import Ask, CapacityChanged, Deliver, Effect, EpochBegan, RunStep, Submitted, Tick
from dataplane.core.messages import Fence, HeldMeta, RejoinMeta, ResultMeta, StepMeta
from dataplane.core.patience import ROWS_MIN, STALL_LIMIT_MAX_S, STALL_LIMIT_S, UNBOUNDED, Patience
from dataplane.core.request import pack_tokens
from dataplane.core.scheduler import Scheduler

LIMITS = Limits(
    block_size=16,
    max_batch_tokens=512,
    max_running=256,
    max_waiting=512,
    context_len=32768,
    orphan_grace_s=60.0,
)
STAGES = 4


@dataclass
class SlowStage:
    inbox: deque[StepMeta | RejoinMeta] = field(default_factory=deque)
    busy: bool = False
    fence: Fence = field(default_factory=lambda: Fence(1, 0))
    held: dict[int, int] = field(default_factory=dict)


class SlowPipeline:
    """A scheduler and stages that compute one step after the other, drop those of older fences, and lose nothing."""

    def __init__(self, step_s: float, token_s: float) -> None:
        self.now = 0.0
        self.tokens = 0  # delivered
        self.losing = False  # the next result with tokens
        self._step_s, self._token_s = step_s, token_s
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._stages = [SlowStage() for _ in range(STAGES)]
        self.scheduler = Scheduler("p", 1, STAGES, LIMITS, takeover=False, now=0.0)
        self.scheduler.step(CapacityChanged(100_000, STAGES), 0.0)
        self._tick()

    def submit(self, rid: int, prompt: int, max_tokens: int) -> None:
        message = Submit(
            rid, "p", tuple(range(10_000 * rid, 10_000 * rid + prompt)), Sampling(max_tokens, seed=1)
        )
        self._perform(self.scheduler.step(Submitted(message, 1), self.now))

    def run_until_idle(self, limit_s: float) -> float:
        """For how long that took, at most the limit."""
        began = self.now
        while self.scheduler.requests and self.now - began < limit_s:
            self.now, _, call = heapq.heappop(self._calls)
            call()
        return self.now - began

    def _at(self, time: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._calls, (time, self._count, call))

    def _tick(self) -> None:
        self._perform(self.scheduler.step(Tick(), self.now))
        self._at(self.now + 0.1, self._tick)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case RunStep(meta):
                    self._push(0, meta)
                case Ask(meta):
                    for index in range(STAGES):
                        self._push(index, meta)
                case Deliver(_, items):
                    self.tokens += len(items)

    def _push(self, index: int, meta: StepMeta | RejoinMeta) -> None:
        self._stages[index].inbox.append(meta)
        self._pump(index)

    def _pump(self, index: int) -> None:
        stage = self._stages[index]
        while not stage.busy and stage.inbox:
            meta = stage.inbox.popleft()
            if meta.fence < stage.fence:
                continue
            stage.fence = meta.fence
            if isinstance(meta, RejoinMeta):
                held = tuple((rid, stage.held[rid]) for rid in meta.rids if rid in stage.held)
                answer = HeldMeta("p", meta.fence, meta.ask, index, held)
                self._at(self.now, lambda answer=answer: self._perform(self.scheduler.step(answer, self.now)))  # type: ignore[misc]
            else:
                stage.busy = True
                took_s = self._step_s + self._token_s * int(Rows(meta.rows).counts.sum())
                self._at(self.now + took_s, lambda meta=meta: self._computed(index, meta))  # type: ignore[misc]

    def _computed(self, index: int, meta: StepMeta) -> None:
        stage, rows = self._stages[index], Rows(meta.rows)
        stage.busy = False
        for rid, start, count in zip(
            rows.rids.tolist(), rows.starts.tolist(), rows.counts.tolist(), strict=True
        ):
            assert start <= stage.held.get(rid, 0), "a gap"
            stage.held[rid] = start + count
        if index + 1 < STAGES:
            self._push(index + 1, meta)
        elif self.losing and len(rows.sample_rids):
            self.losing = False
        else:
            tokens = pack_tokens([7] * len(rows.sample_rids))
            self._perform(self.scheduler.step(ResultMeta("p", meta.fence, meta.step, tokens), self.now))
        self._pump(index)


@pytest.mark.parametrize("chunk_s", [1.0, 3.0, 10.0, 20.0, 60.0])
def test_a_long_prompt_ends_however_slow_the_stages_are(chunk_s: float) -> None:
    """Four times as long as it takes at best, that is one step at a time: 60 s for 512 tokens took for ever."""
    line = SlowPipeline(0.0, chunk_s / 512)
    line.submit(1, 4096, 1)
    assert line.run_until_idle(5000.0) <= 4 * chunk_s * (4096 // 512 + STAGES - 1)
    assert line.tokens == 1


def test_tokens_of_a_slow_pipeline_are_computed_once() -> None:
    line = SlowPipeline(2.0, 0.0)
    line.submit(1, 8, 20)
    round_s = 2.0 * STAGES
    assert line.run_until_idle(1000.0) < 23 * round_s, (
        "the limit was found, and nothing was given up behind that"
    )
    assert line.scheduler.stats.resyncs <= 2


def test_the_next_long_prompt_is_expected_to_take_as_long() -> None:
    """Also where all the steps whose times are kept have only decoded since."""
    line = SlowPipeline(0.05, 2.0 / 512)
    line.submit(1, 4096, 200)
    line.run_until_idle(1000.0)
    assert line.scheduler.steps.round_s < 1.0
    before = line.scheduler.stats.resyncs
    line.submit(2, 4096, 1)
    line.run_until_idle(1000.0)
    assert line.scheduler.stats.resyncs == before


def test_a_lost_result_of_fast_stages_is_noticed_as_soon_as_ever_and_costs_little() -> None:
    line = SlowPipeline(0.01, 0.0)
    line.submit(1, 8, 5)
    line.run_until_idle(10.0)
    for rid in (2, 3):
        line.losing = True
        line.submit(rid, 60, 5)
        assert STALL_LIMIT_S < line.run_until_idle(10.0) < STALL_LIMIT_S + 0.8
    assert line.scheduler.batcher.microbatches == STAGES
    assert line.scheduler.stats.resyncs == 2


def test_the_limit_grows_with_each_thing_given_up_and_steps_shrink() -> None:
    patience = Patience(512)
    seen = []
    for _ in range(7):
        limit_s = patience.limit_s(0.0)
        patience.gave_up(limit_s, 512)
        seen.append((limit_s, patience.rows_max, patience.in_flight_max))
    assert [limit_s for limit_s, _, _ in seen] == [3.0, 6.0, 12.0, 24.0, 48.0, 60.0, STALL_LIMIT_MAX_S]
    assert [rows for _, rows, _ in seen] == [256, 128, 64, 32, ROWS_MIN, ROWS_MIN, ROWS_MIN]
    assert {flying for _, _, flying in seen} == {1}


def test_a_question_given_up_says_nothing_about_steps() -> None:
    patience = Patience(512)
    patience.gave_up(3.0, 0)
    assert (patience.limit_s(0.0), patience.rows_max, patience.in_flight_max) == (6.0, 512, UNBOUNDED)


def test_steps_grow_again_only_as_they_come_back_soon() -> None:
    patience = Patience(512)
    patience.gave_up(3.0, 512)
    patience.came_back(256, 5.0, patience.limit_s(5.0), 2)
    assert (patience.rows_max, patience.in_flight_max) == (256, 2), "the limit follows what it took"
    patience.came_back(256, 25.0, patience.limit_s(25.0), 2)
    patience.came_back(0, 0.01, patience.limit_s(25.0), 2)
    patience.came_back(8, 0.01, patience.limit_s(25.0), 2)
    assert patience.rows_max == 256, "late, without rows, or small"
    patience.came_back(200, 5.0, patience.limit_s(25.0), 2)
    assert patience.rows_max == 512


def test_other_nodes_are_given_all_at_once() -> None:
    line = SlowPipeline(20.0, 0.0)
    line.submit(1, 4096, 1)
    line.run_until_idle(10.0)
    assert line.scheduler.batcher.microbatches == 1
    assert line.scheduler.batcher.rows_max < 512
    line.scheduler.step(EpochBegan(2, planned=False), line.now)
    assert (line.scheduler.batcher.microbatches, line.scheduler.batcher.rows_max) == (STAGES, 512)
