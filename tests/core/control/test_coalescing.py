"""News waits for more of it: for shares of what a decision takes, or for the answer to a write."""

from __future__ import annotations

import pytest

from controlplane.shell.coalescing import (
    COMING_S_MAX,
    GAP_SHARE,
    SHARE,
    SHARE_MAX,
    WAIT_S_MAX,
    Coalescing,
)


def after(decision_s: float) -> Coalescing:
    """As it is when a decision with effects has taken so long."""
    coalescing = Coalescing()
    coalescing.decided(1.0, 1.0 + decision_s, effects=True)
    return coalescing


def test_where_decisions_take_no_time_nothing_waits() -> None:
    assert Coalescing().due_at(7.0, 1, writing=False) == 7.0


def test_news_waits_for_a_share_of_what_a_decision_takes_from_the_first_of_it_on() -> None:
    coalescing = after(0.02)
    first = coalescing.due_at(2.0, 1, writing=False)
    assert abs(first - (2.0 + SHARE * 0.02)) < 1e-9
    assert coalescing.due_at(2.005, 1, writing=False) == first
    coalescing.decided(first, first + 0.02, effects=True)
    assert coalescing.due_at(3.0, 1, writing=False) > 3.0


def test_while_more_comes_it_waits_on() -> None:
    coalescing = after(0.04)
    coalescing.due_at(2.0, 1, writing=False)
    due = coalescing.due_at(2.019, 2, writing=False)
    assert abs(due - (2.019 + GAP_SHARE * 0.04)) < 1e-9
    assert coalescing.due_at(2.025, 2, writing=False) == due  # and that was all


@pytest.mark.parametrize("decision_s", [0.002, 0.04, 9.0])
def test_news_without_end_waits_no_longer_than_two_decisions(decision_s: float) -> None:
    coalescing = after(decision_s)
    due = [coalescing.due_at(2.0 + 0.001 * k, 1 + k, writing=False) for k in range(200)]
    assert abs(max(due) - (2.0 + min(COMING_S_MAX, SHARE_MAX * decision_s))) < 1e-9


def test_no_news_alone_waits_long() -> None:
    coalescing = after(9.0)
    assert coalescing.due_at(10.0, 1, writing=False) == 10.0 + WAIT_S_MAX
    assert coalescing.due_at(10.1, 1, writing=True) < 10.1


def test_it_waits_for_the_answer_to_a_write_and_no_longer() -> None:
    coalescing = Coalescing()
    assert coalescing.due_at(1.0, 1, writing=True) == 1.0 + WAIT_S_MAX
    assert coalescing.due_at(1.01, 1, writing=False) == 1.0


def test_a_decision_without_effects_says_nothing_of_what_the_next_one_takes() -> None:
    coalescing = after(0.04)
    coalescing.decided(2.0, 2.0001, effects=False)
    assert abs(coalescing.due_at(3.0, 1, writing=False) - (3.0 + SHARE * 0.04)) < 1e-9
    for k in range(100):
        coalescing.decided(4.0 + k, 4.0 + k, effects=True)
    assert coalescing.due_at(200.0, 1, writing=False) - 200.0 < 1e-5
