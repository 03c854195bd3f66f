"""Drafts: a step brings several tokens of a request, and they are those that it would have had without."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.requests import Sampling, Submit, Token
from dataplane.core.batching import Batcher, Limits
from dataplane.core.ngrams import INDEX_BYTES, SIZES, NgramIndex
from dataplane.core.prefix import PrefixHasher
from dataplane.core.request import Phase, Request
from dataplane.core.speculation import BRINGS_MIN, GAIN_MIN, Rate, Speculator, StepCost, draft_counts
from dataplane.core.stats import SchedulerStats
from tests.core.data.pipeline import Cluster

STAGES = (1, 2, 4)


def start(stages: int, seed: int, right: float, requests: int = 5, **kwargs: int) -> Cluster:
    cluster = Cluster(stages, seed, drafts_right=right, **kwargs)
    for rid in range(1, requests + 1):
        prompt = [cluster.random.randrange(1000) for _ in range(cluster.random.randrange(1, 20))]
        if rid % 2:
            prompt = [0] * cluster.random.randrange(1, 30) + prompt[:5]  # many begin as others do
        cluster.submit(rid, prompt, max_tokens=cluster.random.randrange(8, 25))
    return cluster


# ---------------------------------------------------------------------------- equal streams


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_streams_equal_those_without_drafts(stages: int, right: float) -> None:
    cluster = start(stages, seed=stages, right=right)
    cluster.run_to_end()
    cluster.check()
    stats = cluster.scheduler.stats
    assert stats.spec_decode_num_drafts > 0
    assert stats.spec_decode_num_draft_tokens >= stats.spec_decode_num_drafts
    assert (stats.spec_decode_num_accepted_tokens > 0) == (right > 0)


def test_right_drafts_save_steps() -> None:
    steps = {}
    for right in (None, 1.0):
        cluster = Cluster(2, 1, drafts_right=right)
        cluster.submit(1, [1, 2, 3], max_tokens=40)
        cluster.run_to_end()
        cluster.check()
        steps[right] = cluster.scheduler.steps._next
    assert steps[1.0] < 0.6 * steps[None]


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("token", range(0, 18, 2))
def test_a_stage_that_dies_at_any_token_costs_none(stage: int, token: int) -> None:
    cluster = start(3, seed=stage * 100 + token, right=0.7)
    while len(cluster.received[1]) <= token and 1 not in cluster.finished:
        cluster.run(1)
    cluster.kill(stage)
    cluster.run_to_end()
    cluster.check()
    assert not cluster.refused


@pytest.mark.parametrize("seed", range(10))
def test_two_kills_and_hand_backs(seed: int) -> None:
    cluster = start(3, seed, right=0.8)
    chance = cluster.random
    cluster.run(chance.randrange(200))
    first, second = chance.sample(range(3), 2)
    cluster.kill(first)
    cluster.run(chance.randrange(6))
    cluster.kill(second)
    cluster.run(chance.randrange(100))
    for stage in (first, second):
        cluster.replace(stage, cluster.join(stage, f"n{stage}"), demote=chance.random() < 0.5)
        cluster.run(chance.randrange(60))
    cluster.run_to_end()
    cluster.check()


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_a_planned_move_computes_again_no_more_than_its_copy_lacks(stage: int, seed: int) -> None:
    cluster = start(3, seed, right=0.8, blocks=128, quota=60)
    cluster.run(cluster.random.randrange(20, 150))
    lacks = cluster.move(stage, cluster.join(stage, "x0"))
    cluster.run_to_end()
    cluster.check()
    stats = cluster.scheduler.stats
    assert stats.tokens_recomputed <= lacks + cluster.limits.max_draft_tokens * stats.requests_recovered


@pytest.mark.parametrize("seed", range(5))
def test_preemption_under_a_small_quota(seed: int) -> None:
    cluster = start(2, seed, right=0.8, requests=8, blocks=40, quota=18)
    cluster.run_to_end()
    cluster.check()


def test_no_copy_has_a_draft() -> None:
    """Half of them are wrong. What counts as held is never more than the log says, whenever one looks."""
    cluster = Cluster(2, seed=3, drafts_right=0.5)
    cluster.submit(1, list(range(9)), max_tokens=30)
    seen = 0
    while 1 not in cluster.finished:
        cluster.run(1)
        for stage in range(2):
            source, peer = cluster.nodes[cluster.serving[stage]], cluster.nodes[cluster.peers[stage]]
            request = cluster.scheduler.requests.get(1)
            assert request is None or source.store.tokens(("p0", 1)) <= request.total
            for row in peer.store.copies.rows.values():
                seen = max(seen, peer.store.table.valid(row))
                assert request is None or peer.store.table.valid(row) <= request.total
    cluster.check()
    assert seen >= 24
    stats = cluster.scheduler.stats
    assert stats.spec_decode_num_draft_tokens > stats.spec_decode_num_accepted_tokens + 5


def test_no_draft_is_written_into_a_block_that_others_may_have_had() -> None:
    """Where a request goes on within a block that its stages took up, its drafts begin with the next block."""
    request = Request.from_submit(Submit(1, "p0", (1, 2, 3, 4, 5), Sampling(50, seed=1), (6,)), 0, 0)
    request.hasher = PrefixHasher(4)
    room = {}
    request.rewind(Phase.RUNNING, 5)
    for token in range(6):
        room[request.total] = request.draft_room(100)
        request.append(Token(1, len(request.output), token))
    assert room == {6: 0, 7: 0, 8: 46, 9: 45, 10: 44, 11: 43}
    request.rewind(Phase.RUNNING, 8)
    assert request.draft_room(100) == 42
    assert request.draft_room(14) == 1  # the context leaves one token more


# ---------------------------------------------------------------------------- how many


def test_drafts_that_are_right_are_worth_rows_that_cost_little() -> None:
    cost = StepCost()
    for rows in (1, 4, 8) * 10:
        cost.ran(rows, 0.010 + 0.0001 * rows)
    assert draft_counts([0.9], [8], 1, cost) == [8]
    assert draft_counts([0.02], [8], 1, cost) == [0]
    assert draft_counts([0.9, 0.1], [3, 3], 2, cost)[0] == 3
    assert draft_counts([0.9], [0], 1, cost) == [0]
    assert 0 < draft_counts([0.9], [8], 1, cost, pass_s=0.003)[0] < 8
    assert draft_counts([0.9], [8], 1, cost, pass_s=0.02) == [0]


def test_a_full_step_has_no_drafts() -> None:
    """Where each row costs as much as the others a draft that may be wrong is a loss."""
    cost = StepCost()
    for rows in (16, 32, 48) * 10:
        cost.ran(rows, 0.001 * rows)
    assert draft_counts([0.95] * 32, [8] * 32, 32, cost) == [0] * 32


def test_what_is_not_known_is_tried_where_a_step_has_room_only() -> None:
    start = Rate().value
    assert draft_counts([start], [8], 1, StepCost())[0] >= 2
    assert draft_counts([start] * 32, [8] * 32, 32, StepCost()) == [0] * 32


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 5)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1.0)), max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_drafts_are_never_expected_to_cost_more_than_they_bring(
    requests: list[tuple[float, int]], measured: list[tuple[int, float]]
) -> None:
    cost = StepCost()
    for rows, took_s in measured:
        cost.ran(rows, took_s)
    rates, most = [rate for rate, _ in requests], [count for _, count in requests]
    counts = draft_counts(rates, most, len(rates), cost)
    assert all(0 <= count <= limit for count, limit in zip(counts, most, strict=True))
    if any(counts):
        brings = sum(
            rate**depth for rate, count in zip(rates, counts, strict=True) for depth in range(count + 1)
        )
        speed = brings / cost.seconds(len(rates) + sum(counts))
        assert speed >= GAIN_MIN * len(rates) / cost.seconds(len(rates)) * (1 - 1e-9)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1.0)), max_size=20),
    st.sampled_from([0.0, 1e-4, 0.01, 0.3]),
)
@settings(max_examples=200, deadline=None)
def test_as_many_drafts_as_bring_the_most_tokens_a_second(
    requests: list[tuple[float, int]], measured: list[tuple[int, float]], pass_s: float
) -> None:
    """As a search of every number of them finds, the best ones first."""
    cost = StepCost()
    for rows, took_s in measured:
        cost.ran(rows, took_s)
    rates, most = [rate for rate, _ in requests], [count for _, count in requests]
    rows = len(rates)
    drafts = [(rate**depth, depth) for rate, count in requests for depth in range(1, count + 1)]
    wanted = sorted(
        (draft for draft in drafts if draft[0] >= BRINGS_MIN), key=lambda draft: (-draft[0], draft[1])
    )
    plain = rows / cost.seconds(rows)
    speeds = [GAIN_MIN * plain]
    for number in range(1, len(wanted) + 1):
        deepest = max(depth for _, depth in wanted[:number])
        seconds = cost.seconds(rows + number) + pass_s * deepest
        speeds.append((rows + sum(brings for brings, _ in wanted[:number])) / seconds)
    count = sum(draft_counts(rates, most, rows, cost, pass_s))
    assert speeds[count] >= max(speeds) * (1 - 1e-9) or count == 0
    if count == 0 and max(speeds) > speeds[0]:  # none, since not even the first row is worth its time
        assert max(rate for rate, allowed in requests if allowed) <= plain * cost.line()[1] * (1 + 1e-9)


class Weighed(StepCost):
    """Rows cost what they bring, and it counts how often that is weighed up."""

    asked, of_row = 0, 1.0

    def line(self) -> tuple[float, float]:
        self.asked += 1
        return 1.0 - self.of_row, self.of_row


def test_many_rows_that_gain_nothing_are_rarely_weighed_up() -> None:
    """And where most of them have ended, drafts come at once if they pay then."""
    limits = Limits(4, 512, 64, 64, 2000, 1.0, speculation="ngram")
    batcher, requests = Batcher(limits), []
    batcher.account.set_quota(10_000)
    for rid in range(1, 33):
        request = Request.from_submit(Submit(rid, "p0", (7, 8, 9) * 4, Sampling(900, seed=1), (7,)), 0, 0)
        request.hasher = PrefixHasher(4)
        request.issued = 12
        batcher.account.begin(rid, [])
        requests.append(request)
    speculator = Speculator(limits, None, SchedulerStats())
    speculator.cost = weighed = Weighed()
    probes = 0
    for _ in range(400):
        assert not speculator.drafts([(request, 1) for request in requests], batcher)
        probes += len(speculator.probes)
        for rid in list(speculator.probes):
            speculator.verified(rid, 0, [8])
    assert 5 <= weighed.asked <= 9
    assert 20 <= probes <= 40
    weighed.of_row = 0.0
    assert speculator.drafts([(request, 1) for request in requests[:16]], batcher)


class Costly:
    """Drafts that are always wrong, of a model that takes a while."""

    def __init__(self) -> None:
        self.asked = 0

    def pass_s(self, requests: int) -> float:
        return 0.001

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        self.asked += 1
        return [[0] * count for _ in requests]

    def forget(self, rid: int) -> None:
        pass


def test_a_model_whose_drafts_were_wrong_is_asked_again_now_and_then() -> None:
    limits = Limits(4, 16, 16, 64, 1000, 1.0, speculation="draft")
    batcher, model = Batcher(limits), Costly()
    batcher.account.set_quota(1000)
    request = Request.from_submit(Submit(1, "p0", (1, 2, 3), Sampling(500, seed=1), (4,)), 0, 0)
    request.hasher = PrefixHasher(4)
    request.issued = 3
    batcher.account.begin(1, [])
    speculator = Speculator(limits, model, SchedulerStats())
    asked = []
    for _ in range(400):
        speculator.cost.ran(1, 0.01)
        drafts = speculator.drafts([(request, 1)], batcher).get(1, ())
        asked.append(bool(drafts))
        speculator.verified(1, len(drafts), [9])
        request.ids.append(9)
        request.issued += 1
    assert model.asked == sum(asked)
    assert 10 < sum(asked) < 120
    assert any(asked[-70:])


def test_a_rate_follows_what_is_seen() -> None:
    rate = Rate()
    for _ in range(30):
        rate.saw(0, 4)
    assert rate.value < 0.1
    for _ in range(60):
        rate.saw(4, 4)
    assert rate.value > 0.9
    before = rate.value
    rate.saw(0, 0)
    assert rate.value == before


def test_a_step_that_came_late_says_little_about_rows() -> None:
    cost = StepCost()
    for rows in (1, 2, 3, 4) * 10:
        cost.ran(rows, 0.01)
    cost.ran(4, 5.0)
    assert cost.seconds(4) < 0.02


# ---------------------------------------------------------------------------- n-grams


def test_what_followed_last_time_is_drafted() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4])
    assert index.after(3) == [5, 6, 7]
    index.extend([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 9])
    assert index.after(3) == []
    index.extend([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 9, 4, 9])
    assert index.after(5) == [4, 9, 4, 9, 4]  # what repeats is shorter than what is asked for


def test_the_longer_of_two_that_fit_counts() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 50, 9, 9, 3, 4, 60, 1, 2, 3, 4])
    assert index.after(1) == [50]


@given(st.integers(0, 2**32), st.integers(2, 6), st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_an_index_that_grows_equals_a_search(seed: int, vocab: int, grows: list[int]) -> None:
    """Its answers are the log's own tokens, behind an occurrence of its end; small logs have no clashes to speak of."""
    rng, index, ids = random.Random(seed), NgramIndex(), []
    for more in grows:
        ids += [rng.randrange(vocab) for _ in range(more)]
        index.extend(ids)
        assert index.bytes_kept <= INDEX_BYTES * max(64, 2 * len(ids))
        drafts = index.after(6)
        if drafts:
            assert any(
                [*ids[at:], *drafts][: len(drafts)] == drafts and ids[at - size : at] == ids[-size:]
                for size in SIZES
                for at in range(size, len(ids))
            )


def test_token_ids_of_any_size_are_indexed() -> None:
    index = NgramIndex()
    big = np.iinfo(np.int32).max
    index.extend([big, big - 1, 7, big, big - 1])
    assert index.after(1) == [7]
