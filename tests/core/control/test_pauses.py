"""What a stream's times say of the pause around a kill."""

from __future__ import annotations

import pytest

from bench.recovery import Kill
from controlplane.kfadmin.loadgen import Prompt, Stream


def stream(*times: float) -> Stream:
    return Stream(Prompt("", 1), tokens=[0] * len(times), times=list(times))


def test_the_longest_pause_and_when_it_ended() -> None:
    """A token that was on its way at the kill is not the end of it, nor is what comes after the window."""
    seen = stream(1.0, 1.9, 2.1, 2.5, 2.6, 9.0)
    assert seen.longest_pause(2.0, 5.0) == pytest.approx((0.4, 2.5))
    assert seen.longest_pause_s(2.0, 5.0) == pytest.approx(0.4)
    assert stream(1.0).longest_pause(2.0) is None


def test_a_kill_tells_what_its_slowest_stream_waited_for() -> None:
    kill = Kill("n4", "scheduler", 0.35, 0.0245, 0.351, {"detect": 0.059, "plan": 0.023}, 70)
    assert kill.row()["detect_s"] == 0.059
    for part in ("n4 (scheduler)", "350 ms", "24.5 ms", "detect 59, plan 23", "70 tokens"):
        assert part in str(kill)
