"""Decisions leave half of the loop's time to others, and none of a storm's waits."""

from __future__ import annotations

import pytest

from controlplane.shell.allowance import BURST_S, PAUSE_S_MAX, Allowance


@pytest.mark.parametrize("decision_s", [0.001, 0.05, 0.3, PAUSE_S_MAX])
def test_decisions_without_end_take_half_of_the_time(decision_s: float) -> None:
    allowance, now, decided_s, pause_s_max = Allowance(), 100.0, 0.0, 0.0
    while now < 200.0:
        began = max(now, allowance.free_at)
        pause_s_max = max(pause_s_max, began - now)
        now = began + decision_s
        decided_s += decision_s
        allowance.spend(began, now)
    assert 0.45 * 100.0 < decided_s <= 0.5 * 100.0 + BURST_S + 2 * decision_s
    assert pause_s_max <= decision_s + 1e-9


def test_after_a_calm_time_a_few_decisions_follow_each_other_at_once() -> None:
    allowance = Allowance()
    allowance.spend(10.0, 11.0)
    for began in (20.0, 20.125, 20.25):  # each of them takes an eighth of a second
        assert allowance.free_at <= began
        allowance.spend(began, began + 0.125)
    assert allowance.free_at > 20.375


def test_a_stop_in_the_middle_of_a_decision_is_not_paid_for() -> None:
    allowance = Allowance()
    allowance.spend(10.0, 3600.0)
    assert allowance.free_at == pytest.approx(3600.0 + PAUSE_S_MAX)
