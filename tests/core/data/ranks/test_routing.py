"""Who owns a request, and what the next batch has."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.core.ranks.routing import Router, chunk_cost

BUDGET = 8192


def costs(router: Router, budget: int = BUDGET, busy: dict[int, int] | None = None) -> dict[int, int]:
    total = dict.fromkeys(router.ranks, 0)
    for rank, cost in (busy or {}).items():
        total[rank] += cost
    for chunk in router.draw(budget, busy):
        total[chunk.rank] += chunk_cost(chunk.tokens, chunk.start)
    return total


def test_a_request_goes_to_the_rank_with_the_fewest_pending_tokens() -> None:
    router = Router(range(3))
    owners = []
    for number, tokens in enumerate((500, 100, 300, 100, 150)):
        router.submit(number, tokens, 1)
        owners.append(router.owner(number))
    assert owners == [0, 1, 2, 1, 1]
    assert [router.pending(rank) for rank in range(3)] == [499, 99 + 99 + 149, 299]


def test_of_ranks_without_anything_pending_the_one_that_has_fewest_tokens() -> None:
    router = Router(range(2))
    router.submit(0, 100)
    assert router.owner(0) is None
    router.draw(1000)
    router.submit(1, 10)
    (chunk,) = router.draw(1000)
    assert (chunk.request, chunk.rank, router.owner(0)) == (1, 1, 0)


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_batches_of_long_prompts_are_even_while_requests_wait(ranks: int) -> None:
    """Over all batches the slowest rank has at most 1.05 times the mean to do."""
    router, numbers = Router(range(ranks)), random.Random(ranks)
    for number in range(120):
        router.submit(number, numbers.randint(3_000, 30_000))
    slowest = mean = 0.0
    while router.waiting:
        total = costs(router)
        slowest, mean = slowest + max(total.values()), mean + sum(total.values()) / ranks
    assert slowest <= 1.05 * mean


def test_a_full_stage_computes_prompts_of_several_ranks_together() -> None:
    """No room but for one request a step: at once, each would be a batch of its rank alone."""
    router = Router(range(5))
    for number in range(40):
        router.submit(number, 8000)
    slowest = mean = 0.0
    for _ in range(60):
        room = [True]
        chunks = router.draw(BUDGET, may_start=lambda start, room=room: bool(room) and room.pop())
        total = dict.fromkeys(router.ranks, 0)
        for chunk in chunks:
            total[chunk.rank] += chunk.tokens
        slowest, mean = slowest + max(total.values()), mean + sum(total.values()) / 5
    assert slowest <= 1.1 * mean


def test_after_a_no_nothing_starts_and_what_has_started_goes_on() -> None:
    router = Router(range(2))
    router.submit(0, 1000)
    router.draw(100)
    router.submit(1, 1000)
    asked = []
    (chunk,) = router.draw(100, may_start=lambda start: bool(asked.append((start.request, start.rank))))
    assert asked == [(1, 1)]
    assert (chunk.request, router.owner(1), router.waiting) == (0, None, 1)


def test_a_batch_of_equal_requests_is_even_within_five_percent() -> None:
    router = Router(range(7), quantum_tokens=256)
    for number in range(140):
        router.submit(number, 2000 + 37 * number)
    for _ in range(8):
        total = costs(router)
        assert max(total.values()) <= 1.05 * sum(total.values()) / 7


def test_a_rank_that_decodes_more_gets_less_of_the_batch() -> None:
    router = Router(range(2), quantum_tokens=16)
    for number in range(8):
        router.submit(number, 4000)
    total = costs(router, 2000, {0: 400_000, 1: 0})
    assert max(total.values()) <= 1.05 * sum(total.values()) / 2


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_token_is_drawn_once_and_in_order(data: st.DataObject) -> None:
    """Also when ranks go and come, requests end, and a request without room waits."""
    router = Router(range(4), quantum_tokens=7)
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    computed = dict.fromkeys(range(len(lengths)), 0)
    for number, tokens in enumerate(lengths):
        router.submit(number, tokens)
    ended = set()
    for _ in range(40):
        match data.draw(st.sampled_from(("draw", "draw", "draw", "change", "end", "rewind"))):
            case "draw":
                refused = data.draw(st.sampled_from((-1, 0, 1)))
                chunks = router.draw(
                    data.draw(st.integers(1, 40)), may_start=lambda start, no=refused: start.request != no
                )
                for chunk in chunks:
                    assert chunk.request not in ended
                    assert chunk.start == computed[chunk.request]
                    assert chunk.rank == router.owner(chunk.request)
                    computed[chunk.request] += chunk.tokens
            case "change":
                moved = router.change(data.draw(st.sets(st.integers(0, 5), min_size=1)))
                assert set(moved.values()) <= set(router.ranks)
            case "end":
                number = data.draw(st.integers(0, len(lengths) - 1))
                router.end(number)
                ended.add(number)
            case "rewind":
                number = data.draw(st.integers(0, len(lengths) - 1))
                if router.owner(number) is not None:
                    computed[number] = data.draw(st.integers(0, computed[number]))
                    router.rewind(number, computed[number])
        living = set(computed) - ended
        assert sum(map(router.held, router.ranks)) == sum(computed[number] for number in living)
        begun = [number for number in living if router.owner(number) is not None]
        assert sum(map(router.pending, router.ranks)) == sum(
            lengths[number] - computed[number] for number in begun
        )
    while chunks := router.draw(1000):
        for chunk in chunks:
            computed[chunk.request] += chunk.tokens
    assert all(computed[number] == lengths[number] for number in set(computed) - ended)


def test_requests_of_a_lost_rank_are_spread_over_those_that_are_left() -> None:
    router = Router(range(8))
    for number in range(160):
        router.submit(number, 1000 + number % 7, 1000 + number % 7)
    moved = router.change([rank for rank in range(8) if rank != 5])
    assert len(moved) == 20
    held = [router.held(rank) for rank in router.ranks]
    assert max(held) <= 1.05 * sum(held) / 7


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="0 ranks"):
        Router([])
    router = Router([0])
    router.submit(1, 5)
    with pytest.raises(ValueError, match="submitted twice"):
        router.submit(1, 5)
    with pytest.raises(ValueError, match="6 of 5 tokens"):
        router.submit(2, 5, 6)
    with pytest.raises(ValueError, match="has 0 tokens, not 3"):
        router.rewind(1, 3)
    with pytest.raises(ValueError, match="no ranks are left"):
        router.change([])
