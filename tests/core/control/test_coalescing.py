"""News waits for more of it: for a share of what a decision takes, or for the answer to a write."""

from __future__ import annotations

from controlplane.shell.coalescing import SHARE, WAIT_S_MAX, Coalescing


def test_where_decisions_take_no_time_nothing_waits() -> None:
    assert Coalescing().due_at(7.0, writing=False) == 7.0


def test_news_waits_for_a_share_of_what_a_decision_takes_from_the_first_of_it_on() -> None:
    coalescing = Coalescing()
    coalescing.decided(1.0, 1.02, effects=True)
    first = coalescing.due_at(2.0, writing=False)
    assert abs(first - (2.0 + SHARE * 0.02)) < 1e-9
    assert coalescing.due_at(2.005, writing=False) == first
    coalescing.decided(first, first + 0.02, effects=True)
    assert coalescing.due_at(3.0, writing=False) > 3.0


def test_no_news_waits_long() -> None:
    coalescing = Coalescing()
    coalescing.decided(0.0, 9.0, effects=True)
    assert coalescing.due_at(10.0, writing=False) == 10.0 + WAIT_S_MAX
    assert coalescing.due_at(10.1, writing=True) < 10.1


def test_it_waits_for_the_answer_to_a_write_and_no_longer() -> None:
    coalescing = Coalescing()
    assert coalescing.due_at(1.0, writing=True) == 1.0 + WAIT_S_MAX
    assert coalescing.due_at(1.01, writing=False) == 1.0


def test_a_decision_without_effects_says_nothing_of_what_the_next_one_takes() -> None:
    coalescing = Coalescing()
    coalescing.decided(0.0, 0.04, effects=True)
    coalescing.decided(1.0, 1.0001, effects=False)
    assert abs(coalescing.due_at(2.0, writing=False) - (2.0 + SHARE * 0.04)) < 1e-9
    for k in range(100):
        coalescing.decided(3.0 + k, 3.0 + k, effects=True)
    assert coalescing.due_at(200.0, writing=False) - 200.0 < 1e-5
