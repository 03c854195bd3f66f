"""What a stream's times say of the pause around a kill."""

from __future__ import annotations

import pytest

from bench.recovery import Kill, parts_of, that_ended_before
from controlplane.contract.events import Event, EventKind
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


def recovery(pipeline: str, seen: float, first_token: float) -> Event:
    details = {"seen_unix_s": seen, "connect_s": 0.001, "restore_s": 0.004, "first_token_s": first_token}
    return Event(EventKind.RECOVERED, pipeline, "", details=details)


def test_the_parts_of_a_pause_are_of_the_recovery_that_ended_it() -> None:
    """p0 and p1 both lost a stage; the slowest stream was one of p1, which had its token after 0.4 s."""
    quick, slow, later = recovery("p0", 100.08, 0.05), recovery("p1", 100.1, 0.29), recovery("p0", 103.0, 0.2)
    for order in ([quick, slow, later], [later, slow, quick]):
        assert that_ended_before(order, 100.4) is slow
        assert that_ended_before(order, 100.2) is quick
        assert that_ended_before(order, 104.0) is later
        assert that_ended_before(order, 100.0) is quick, "clocks differ by a little"
    assert that_ended_before([], 100.4) is None
    parts = {"plan": 0.02, "watch": 0.02, "connect": 0.001, "restore": 0.004, "first_token": 0.29}
    assert parts_of(slow, 100.06, 0.02) == pytest.approx(parts)
    assert "plan" not in parts_of(slow, 100.06, None)
