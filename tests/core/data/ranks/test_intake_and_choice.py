"""A rank that returns, and what a stage does when one is lost."""

from __future__ import annotations

from dataplane.core.ranks.choice import Prediction, Way, choose, unserved_tokens
from dataplane.core.ranks.intake import Copy, Intake

SHRINK = Prediction(Way.SHRINK, pause_s=0.2, capacity=700.0, recomputed_tokens=50)
BORROW = Prediction(Way.BORROW, pause_s=0.5, capacity=850.0)
RESTART = Prediction(Way.RESTART, pause_s=120.0, capacity=1000.0, recomputed_tokens=100_000)


def test_the_layout_changes_when_nearly_all_is_there() -> None:
    intake = Intake(window_blocks=8, tail_blocks_max=1)
    intake.filled(1, 10)
    intake.filled(2, 1)
    assert intake.next() == [Copy(1, 0, 8)]
    assert intake.next() == []
    intake.copied(Copy(1, 0, 8))
    assert intake.next() == [Copy(1, 8, 2), Copy(2, 0, 1)]
    intake.copied(Copy(1, 8, 2))
    assert intake.behind == 1
    assert not intake.due  # the weights are not there
    intake.weights = True
    assert intake.due
    intake.filled(1, 12)  # the stage serves on
    assert not intake.due
    intake.end(1)
    assert intake.due


def test_copies_keep_up_with_a_stage_that_serves_on() -> None:
    intake = Intake(window_blocks=4, tail_blocks_max=2, weights=True)
    intake.filled(1, 100)
    for blocks in range(101, 200):
        for copy in intake.next():
            intake.copied(copy)
        if intake.due:
            break
        intake.filled(1, blocks)
    assert intake.due
    assert intake.behind <= 2


def test_a_full_stage_borrows_and_a_half_empty_one_shrinks() -> None:
    ways = (SHRINK, BORROW, RESTART)
    # What is left is enough, and shrinking is the quickest.
    assert choose(ways, demand=600.0, repair_s=3600.0) == SHRINK
    assert choose(ways, demand=1000.0, repair_s=600.0) == BORROW
    assert choose((SHRINK, RESTART), demand=1000.0, repair_s=60.0) == SHRINK
    # Ten hours with less cost more than two minutes without anything.
    assert choose((SHRINK, RESTART), demand=1000.0, repair_s=36_000.0) == RESTART


def test_a_way_that_cannot_serve_is_never_chosen() -> None:
    none = Prediction(Way.SHRINK, 0.1, 0.0)
    assert choose((none,), 10.0, 60.0) is None
    assert choose((), 10.0, 60.0) is None
    assert choose((none, RESTART), 10.0, 600.0) == RESTART


def test_costs_are_in_tokens() -> None:
    assert unserved_tokens(SHRINK, 1000.0, 100.0) == 0.2 * 1000 + 99.8 * 300 + 50
    assert unserved_tokens(RESTART, 1000.0, 60.0) == 60_000.0  # it never comes to serve within the time
    assert unserved_tokens(Prediction(Way.SHRINK, 0.0, 0.0), 1.0, 1.0) == float("inf")
