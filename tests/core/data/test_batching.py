"""Which rows steps have, whatever the settings: never too many, and everybody gets on."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.requests import Sampling, Token
from dataplane.core.batching import Batcher, Limits
from dataplane.core.prefix import PrefixHasher
from dataplane.core.request import Phase, Request
from dataplane.core.speed import StepSpeed

LIMITS = Limits(
    block_size=4,
    max_batch_tokens=32,
    max_running=32,
    max_waiting=1 << 20,
    context_len=4096,
    orphan_grace_s=1.0,
)


def request(rid: int, prompt: int, tokens: int) -> Request:
    return Request(rid, [3] * prompt, prompt, Sampling(tokens, seed=1), 0, rid, 1)


class Line:
    """A batcher with its steps in flight, which come back in order; a step takes `fixed + token * rows` seconds."""

    def __init__(self, limits: Limits, microbatches: int, quota: int, fixed: float, token: float) -> None:
        self.batcher = Batcher(limits)
        self.batcher.microbatches, self.batcher.quota_blocks = microbatches, quota
        self.flying: deque[tuple[list[tuple[Request, int, int]], float, int, int]] = deque()
        self.fixed, self.token = fixed, token
        self.sizes: list[int] = []
        self.prompt_tokens: list[int] = []
        # Steps since a request that decodes could have had a row and had none.
        self.waited: dict[int, int] = {}
        self.waited_max = 0
        self.done: list[int] = []

    def issue(self) -> bool:
        rows, preempted = self.batcher.next_rows(True, len(self.flying))
        for victim in preempted:
            victim.rewind(Phase.WAITING)
            self.batcher.enqueue(victim)
        if not rows:
            # The stages are told who makes room, by a step without rows, and then comes the next one.
            return bool(preempted) and self.issue()
        chosen = []
        decodes = 0
        for request, count in rows:
            assert count > 0
            request.issued += count
            assert request.issued <= request.total
            decodes += count == 1 and request.issued == request.total and bool(request.output)
            chosen.append((request, request.attempt, request.issued))
        self.sizes.append(sum(count for _, count in rows))
        self.prompt_tokens.append(self.sizes[-1] - decodes)
        had = {request.rid for request, _ in rows}
        for request in self.batcher.running.values():
            ready = request.rid not in had and request.output and request.total == request.issued + 1
            self.waited[request.rid] = self.waited.get(request.rid, 0) + 1 if ready else 0
            self.waited_max = max(self.waited_max, self.waited[request.rid])
        self.flying.append(
            (chosen, self.fixed + self.token * self.sizes[-1], decodes, self.prompt_tokens[-1])
        )
        return True

    def land(self) -> None:
        chosen, took_s, decodes, prompt_tokens = self.flying.popleft()
        self.batcher.speed.ran(
            decodes, prompt_tokens, took_s, beside_chunk=any(flight[3] for flight in self.flying)
        )
        for request, attempt, issued in chosen:
            if request.attempt != attempt or issued < request.total:
                continue
            request.append(Token(request.rid, len(request.output), 5))
            if len(request.output) == request.sampling.max_tokens:
                self.batcher.remove(request)
                self.done.append(request.rid)

    def run(self, steps_max: int) -> None:
        for _ in range(steps_max):
            while len(self.flying) < self.batcher.microbatches and self.issue():
                pass
            if not self.flying:
                return
            self.land()
        raise AssertionError(
            f"after {steps_max} steps {self.batcher.waiting} wait, {len(self.batcher.running)} run"
        )


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=40),
    max_batch_tokens=st.integers(1, 40),
    max_running=st.integers(1, 40),
    microbatches=st.integers(1, 5),
    quota=st.integers(18, 300),
    rows_min=st.integers(1, 64),
    token=st.sampled_from([0.0, 0.001, 1.0]),
    fixed=st.sampled_from([0.0, 0.01]),
    step_target_s=st.sampled_from([0.0, 0.001, 0.02, 60.0]),
    shared=st.integers(1, 3),
)
def test_every_request_ends_and_no_step_is_too_large(
    sizes: list[tuple[int, int]],
    max_batch_tokens: int,
    max_running: int,
    microbatches: int,
    quota: int,
    rows_min: int,
    token: float,
    fixed: float,
    step_target_s: float,
    shared: int,
) -> None:
    limits = replace(
        LIMITS,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        rows_min=rows_min,
        step_target_s=step_target_s,
    )
    line = Line(limits, microbatches, quota, fixed, token)
    line.batcher.shared = shared
    for rid, (prompt, tokens) in enumerate(sizes):
        line.batcher.enqueue(request(rid, prompt, tokens))
    work = sum(prompt + tokens for prompt, tokens in sizes)
    line.run(steps_max=20 * work + 1000)
    assert sorted(line.done) == list(range(len(sizes)))
    assert max(line.sizes) <= max_batch_tokens
    assert line.batcher.used_blocks == 0
    assert line.batcher.waiting == 0


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    max_batch_tokens=st.integers(1, 48),
    max_running=st.integers(1, 44),
    microbatches=st.integers(1, 4),
    rows_min=st.integers(1, 64),
)
def test_who_decodes_has_its_turn(
    sizes: list[int], max_batch_tokens: int, max_running: int, microbatches: int, rows_min: int
) -> None:
    """A row in every round of steps, or in as many rounds as it takes for all to have one; prompts change nothing."""
    limits = replace(LIMITS, max_batch_tokens=max_batch_tokens, max_running=max_running, rows_min=rows_min)
    line = Line(limits, microbatches, 1 << 20, 0.01, 0.0001)
    for rid, prompt in enumerate(sizes):
        line.batcher.enqueue(request(rid, prompt, 20))
    line.run(steps_max=100_000)
    decodes_max = max(1, max_batch_tokens - max(1, max_batch_tokens // 4))
    turns = 2 if max_batch_tokens == 1 else 1
    steps = turns * -(-min(max_running, len(sizes)) // decodes_max)
    assert line.waited_max <= steps + microbatches


def test_who_has_to_make_room_for_itself_lets_the_others_go_on() -> None:
    """The youngest, alone in a step of one row, needs a block that is not there."""
    line = Line(replace(LIMITS, max_batch_tokens=1, max_running=2, rows_min=1), 1, 18, 0.0, 0.0)
    line.batcher.enqueue(request(0, 54, 10))
    line.batcher.enqueue(request(1, 1, 9))
    line.run(steps_max=1000)
    assert sorted(line.done) == [0, 1]


def test_more_decodes_than_rows() -> None:
    """They exceeded the budget silently, and one more waiting request ended the node: ZeroDivisionError."""
    line = Line(replace(LIMITS, max_waiting=200), 1, 1 << 20, 0.01, 0.0001)
    for rid in range(140):
        line.batcher.enqueue(request(rid, 1, 5))
    line.run(steps_max=200)
    assert max(line.sizes) == 32
    assert len(line.done) == 140


def speed(decodes: int, decode_s: float, token_s: float, **settings: float) -> StepSpeed:
    made = StepSpeed(**settings)
    made.ran(decodes, 0, decode_s, beside_chunk=False)
    made.ran(decodes, 64, decode_s + 64 * token_s, beside_chunk=False)
    return made


def test_chunks_keep_a_step_to_a_multiple_of_a_decode_step() -> None:
    assert speed(12, 0.16, 0.002).chunk_tokens(12, 512) == pytest.approx(40, abs=1)
    assert speed(12, 0.16, 0.002, target_s=0.26).chunk_tokens(12, 512) == pytest.approx(50, abs=1)
    # A device that computes a whole chunk in the time that it reads the weights is not slowed down.
    for token_s in (0.0001, 0.0):
        made = speed(12, 0.16, token_s)
        for tokens in (128, 256):
            assert made.chunk_tokens(12, 512) == tokens, "not much more than what has been measured"
            made.ran(12, tokens, 0.16 + tokens * token_s, beside_chunk=False)
        assert made.chunk_tokens(12, 512) == 512
    # What is asked for cannot be kept: prompts get on all the same.
    assert speed(12, 0.16, 0.002, target_s=0.01).chunk_tokens(12, 512) == 16
    assert speed(12, 0.16, 0.002, target_s=0.01).chunk_tokens(12, 7) == 7
    assert StepSpeed().chunk_tokens(12, 512) == 32


def test_chunks_that_follow_one_another_tell_the_pace_of_a_long_prompt() -> None:
    made = speed(12, 0.16, 0.002)
    made.passed(100, since=0.0, now=1.0)
    assert made.pace_s == 0.0, "nothing was in the stages with it"
    made.passed(100, since=0.5, now=1.2)
    made.passed(300, since=0.9, now=1.5)
    assert made.pace_s == pytest.approx(0.3 / 300), "most tokens were in that one"
    made.passed(900, since=5.0, now=6.0)  # launched when the stages were empty
    assert made.pace_s == pytest.approx(0.3 / 300)


SECONDS = st.sampled_from([0.0, 1e-9, 0.001, 0.01, 1.0, 60.0])


@settings(max_examples=500, deadline=None)
@given(
    target_s=st.sampled_from([0.0, 1e-300, 0.001, 0.02, 60.0]),
    steps=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 512), SECONDS, st.booleans()), max_size=40),
    decodes=st.integers(0, 64),
    tokens_max=st.integers(1, 4096),
    multiple=st.sampled_from([1.5, 3.0]),
    lost=st.booleans(),
)
def test_whatever_is_set_and_measured_a_prompt_gets_on(
    target_s: float,
    steps: list[tuple[int, int, float, bool]],
    decodes: int,
    tokens_max: int,
    multiple: float,
    lost: bool,
) -> None:
    """A target below a decode step, and tokens that seemed to cost nothing: ZeroDivisionError, which ended the node."""
    made = StepSpeed(target_s)
    for rows, prompt_tokens, took_s, beside_chunk in steps:
        made.ran(rows, prompt_tokens, took_s, beside_chunk=beside_chunk)
    tokens = made.chunk_tokens(decodes, tokens_max, multiple, lost=lost)
    assert min(16, tokens_max) <= tokens <= tokens_max


def test_a_target_below_a_decode_step_where_tokens_cost_nothing() -> None:
    assert speed(12, 0.01, 0.0, target_s=0.005).chunk_tokens(12, 512) == 16


def test_more_rows_take_longer() -> None:
    """One row was measured, 30 decode now: they take what their tokens take, and a chunk may take as long again."""
    assert speed(1, 0.02, 0.002).chunk_tokens(31, 512) == pytest.approx(20, abs=1)


def test_single_late_steps_change_nothing() -> None:
    made = speed(12, 0.16, 0.002)
    for _ in range(8):
        made.ran(12, 0, 0.16, beside_chunk=False)
        made.ran(12, 80, 0.32, beside_chunk=False)
    made.ran(12, 0, 3.0, beside_chunk=False)
    made.ran(12, 80, 9.0, beside_chunk=False)
    made.ran(12, 0, 9.0, beside_chunk=True)  # it waited behind a chunk: that says nothing of decoding
    assert made.chunk_tokens(12, 512) == pytest.approx(40, abs=1)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_readers_do_not_wait_for_others_prompts(microbatches: int) -> None:
    """Twelve streams and prompts of 300 tokens, on nodes where a chunk of 512 tokens takes six decode steps."""
    limits = replace(LIMITS, max_batch_tokens=512, max_running=64)
    line = Line(limits, microbatches, 1 << 20, 0.136, 0.002)
    for rid in range(12):
        line.batcher.enqueue(request(rid, 8, 400))
    for _ in range(200):
        while len(line.flying) < microbatches and line.issue():
            pass
        line.land()
    line.prompt_tokens.clear()
    for rid in range(20):
        line.batcher.enqueue(request(100 + rid, 300, 100))
    while not all(line.batcher.running.get(100 + rid) is None for rid in range(20)) or line.batcher.waiting:
        while len(line.flying) < microbatches and line.issue():
            pass
        line.land()
    first = line.prompt_tokens[0]
    # 32 rows take 0.2 s in the end, and so may a chunk.
    assert max(line.prompt_tokens) * 0.002 <= 0.5 * (0.136 + 0.002 * 32) * 1.01
    assert first > 32


def test_a_lone_prompt_goes_whole() -> None:
    line = Line(replace(LIMITS, max_batch_tokens=512), 1, 1 << 20, 0.1, 0.002)
    line.batcher.speed = speed(1, 0.1, 0.002)
    line.batcher.enqueue(request(1, 500, 3))
    line.run(100)
    assert line.prompt_tokens[0] == 500


def test_a_burst_from_idle_does_not_hold_its_own_first_readers_up() -> None:
    """Nobody reads yet when the first step is chosen; with several in flight the next ones are chosen before its result
    is there, and each of them was a whole batch of prompts in front of the first readers' second token."""
    batcher = Batcher(replace(LIMITS, max_batch_tokens=512))
    batcher.microbatches, batcher.quota_blocks = 4, 1 << 20
    batcher.speed = speed(4, 0.05, 0.004)
    for rid in range(12):
        batcher.enqueue(request(rid, 160, 48))
    sizes = []
    for in_flight in range(4):
        rows, _ = batcher.next_rows(True, in_flight)
        for chosen, count in rows:
            chosen.issued += count
        sizes.append(sum(count for _, count in rows))
    assert min(sizes[:2]) > 300, "first tokens do not wait for it"
    assert all(0 < size * 0.004 <= 2 * 0.05 for size in sizes[2:])


def test_decoding_is_measured_again_though_prompts_never_end() -> None:
    """Chunks in all steps: nothing would tell that decodes have become slower, and chunks would shrink for it."""
    line = Line(replace(LIMITS, max_batch_tokens=512, max_running=40), 2, 1 << 20, 0.01, 0.001)
    line.batcher.enqueue(request(0, 8, 4000))
    for rid in range(1, 2000):
        line.batcher.enqueue(request(rid, 100, 1))

    def some(steps: int) -> list[int]:
        line.prompt_tokens.clear()
        for _ in range(steps):
            while len(line.flying) < 2 and line.issue():
                pass
            line.land()
        return sorted(line.prompt_tokens)

    before = some(200)
    line.fixed = 0.1
    some(400)
    after = some(100)
    assert 3 * before[100] < after[50]


def test_short_chunks_that_seem_to_cost_nothing_do_not_make_a_long_one() -> None:
    """On a busy machine decode steps came late more often than chunks of 16 tokens did, and the next chunk was of 422
    tokens and took as long as 40 decode steps."""
    made = StepSpeed()
    for late_s in (0.02, 0.01, 0.0, 0.02, 0.0, 0.01, 0.02, 0.0):
        made.ran(6, 0, 0.005 + late_s, beside_chunk=False)
        made.ran(6, 16, 0.007, beside_chunk=False)
    assert made.chunk_tokens(6, 512) == 32
    assert made.chunk_tokens(6, 60, lost=True) == 60, (
        "who was interrupted gains by few steps, whatever they take"
    )
    assert made.chunk_tokens(6, 508, lost=True) == 64, "nor a tail of 508 tokens that is one step"
    for _ in range(6):
        made.ran(6, 0, 0.005, beside_chunk=False)
    made.ran(6, 300, 0.035, beside_chunk=False)
    assert made.chunk_tokens(6, 512) < 40, "a long chunk tells more of tokens than many short ones"


def test_chunks_that_came_late_do_not_make_what_was_lost_many_steps() -> None:
    """Around a failure every step is late, those with what was lost as well: their tokens seemed so dear that 134 of
    them were five steps, and the last reader waited for all five."""
    made = speed(4, 0.01, 0.0001)
    for late_s in (0.01, 0.03, 0.02, 0.015, 0.02):
        made.ran(4, 24, 0.0124 + late_s, beside_chunk=True)
    assert made.chunk_tokens(4, 512) < 32, "beside readers the median counts"
    assert made.chunk_tokens(4, 134, lost=True, multiple=3.0) == 134


@pytest.mark.parametrize("slower", [1, 20])
def test_what_a_token_costs_follows_the_load(slower: int) -> None:
    """A chunk was measured while other work slowed everything down; now steps are quick again, and no chunk has come
    since. In seconds that chunk's tokens would cost many times what they do."""
    made = speed(12, 0.01 * slower, 0.0001 * slower)
    for _ in range(40):
        made.ran(12, 0, 0.01, beside_chunk=False)
    assert made.chunk_tokens(12, 512) == pytest.approx(50, abs=1)


@pytest.mark.parametrize("now", [4, 48])
def test_what_a_token_costs_does_not_follow_the_rows(now: int) -> None:
    made = speed(16, 0.1 + 16 * 0.002, 0.002)
    for _ in range(40):
        made.ran(now, 0, 0.1 + now * 0.002, beside_chunk=False)
    assert made.chunk_tokens(now, 512) == pytest.approx((50 + now) / 2, abs=1)


def test_a_scheduler_that_takes_over_begins_with_what_its_node_knows() -> None:
    fresh = StepSpeed()
    fresh.learn(speed(12, 0.16, 0.002))
    assert fresh.chunk_tokens(12, 512) == pytest.approx(40, abs=1)
    fresh.learn(speed(12, 0.16, 0.0))
    assert fresh.chunk_tokens(12, 512) < 512, "what it knows itself goes before"


def test_who_was_interrupted_goes_first_and_in_few_steps() -> None:
    """After a recovery the last reader waits for all steps before its own: with chunks as short as beside others'
    prompts these were four, six times as long as a decode step. And a prompt that had come before them went first."""
    batcher = Batcher(replace(LIMITS, max_batch_tokens=512))
    batcher.microbatches, batcher.quota_blocks = 1, 1 << 20
    batcher.speed = speed(12, 0.16, 0.002)
    fresh = request(0, 400, 5)
    assert batcher.adopt(fresh, 0)
    fresh.issued = 100
    streams = [request(rid, 50, 100) for rid in range(1, 13)]
    for stream in streams:
        stream.append(Token(stream.rid, 0, 5))
        assert batcher.adopt(stream, 0)
        stream.issued = stream.total - 2 * stream.rid  # so many have to be computed again
    sizes, began, took_s = [], [], 0.0
    while any(stream.total > stream.issued for stream in streams):
        rows, _ = batcher.next_rows(True, 0)
        for chosen, count in rows:
            chosen.issued += count
            began.append(chosen.rid)
        sizes.append(sum(count for _, count in rows))
        took_s += 0.16 + 0.002 * sizes[-1]
    assert sum(sizes) <= 2 * sum(range(1, 13)) + 16, "the fresh prompt has what is left"
    assert max(sizes) * 0.002 <= 2 * 0.16
    assert took_s < 4 * 0.16
    assert list(dict.fromkeys(began))[:12] == list(range(1, 13))


def test_what_was_lost_keeps_to_a_target_that_is_set() -> None:
    made = speed(6, 0.005, 0.0, target_s=0.5)
    assert made.chunk_tokens(6, 512, lost=True) == 128


def slow(**settings: int) -> Batcher:
    """Of a node where 512 tokens take six decode steps."""
    batcher = Batcher(replace(LIMITS, max_batch_tokens=512, max_running=64, **settings))
    batcher.microbatches, batcher.quota_blocks = 1, 1 << 20
    batcher.speed = speed(12, 0.16, 0.002)
    batcher.speed.ran(12, 400, 0.16 + 400 * 0.002, beside_chunk=False)
    return batcher


def stream(rid: int, tokens: int) -> Request:
    """Somebody reads it; nothing of it is computed."""
    made = request(rid, tokens - 1, 100)
    made.append(Token(rid, 0, 5))
    return made


def taken(batcher: Batcher, in_flight: int = 0) -> list[tuple[int, int]]:
    rows, preempted = batcher.next_rows(True, in_flight)
    assert not preempted
    for chosen, count in rows:
        chosen.issued += count
    return [(chosen.rid, count) for chosen, count in rows]


def test_readers_of_another_pipeline_on_the_same_node_do_not_wait_for_prompts() -> None:
    batcher = slow()
    batcher.enqueue(request(1, 500, 3))
    assert taken(batcher) == [(1, 500)]
    batcher = slow()
    batcher.shared = 2
    batcher.enqueue(request(1, 500, 3))
    # No row decodes here: (0.16 - 12 * 0.002) * 1.5 of 0.002 each.
    assert taken(batcher) == [(1, 34)]
    for _ in range(200):  # and it does not wait for a decode step to be measured that nobody asks for
        batcher.speed.ran(0, 34, 0.204, beside_chunk=False)
    assert taken(batcher)[0][1] > 16


def test_readers_whose_requests_are_queued_do_not_wait_for_one_long_step() -> None:
    """No KV of them was left after a failure: they wait like new ones, and a step had as many of them as fit in."""
    batcher = slow()
    for rid in range(12):
        batcher.enqueue(again := stream(rid, 60))
        again.interrupted = True
    sizes = [sum(count for _, count in taken(batcher)) for _ in range(2)]
    assert max(sizes) * 0.002 <= 2 * 0.16, "a step may take as long as three that only decode"
    assert min(sizes) > 60, "in few steps: all wait for them"
    # Behind a preemption nobody waits but its reader: others' steps are as short as beside any prompt.
    batcher = slow()
    batcher.enqueue(stream(1, 400))
    assert sum(count for _, count in taken(batcher)) * 0.002 <= 0.5 * 0.16


def test_a_preempted_stream_is_no_failure() -> None:
    """What it had is computed again beside those who read on, as slowly as a prompt: 1.5 decode steps, not 3."""
    batcher = slow()
    readers = [stream(rid, 8) for rid in range(12)]
    for reader in readers:
        assert batcher.adopt(reader, 0)
    batcher.enqueue(stream(20, 400))
    for turn in (1, 2):  # when it is let in, and when it runs
        for reader in readers:
            reader.append(Token(reader.rid, turn, 5))
            reader.issued = reader.total - 1
        sizes = dict(taken(batcher))
        assert [sizes.pop(rid) for rid in range(12)] == [1] * 12
        assert sizes == {20: 37}  # in equal chunks of at most 40


def test_who_has_had_a_token_since_a_failure_is_not_interrupted_any_more() -> None:
    batcher = slow()
    again = stream(1, 60)
    assert batcher.adopt(again, 0)
    assert again.lost
    again.append(Token(1, 1, 5))
    assert not again.lost
    fresh = request(2, 60, 5)
    assert batcher.adopt(fresh, 0)
    assert not fresh.lost, "nobody reads it yet"


def test_a_request_that_cannot_be_taken_up_leaves_nothing_cached() -> None:
    """Stages are told to drop what they have of it: nobody may begin with that."""
    batcher = Batcher(LIMITS)
    batcher.quota_blocks = 3
    taken = request(1, 16, 4)
    taken.hasher = PrefixHasher(LIMITS.block_size)
    assert not batcher.adopt(taken, 8)  # two of its blocks are there, four are needed
    assert (batcher.account.used, batcher.account.cached) == (0, 0)
    batcher.quota_blocks = 4
    assert batcher.adopt(taken, 8)
