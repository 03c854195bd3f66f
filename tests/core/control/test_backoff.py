"""Pauses between attempts: doubled, jittered, bounded, counted."""

from __future__ import annotations

import asyncio
import time

import pytest

from controlplane.backoff import Backoff


def test_pauses_double_up_to_a_bound_and_begin_anew_after_a_success() -> None:
    backoff = Backoff(0.1, 1.0)
    for longest in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert longest / 2 <= backoff.next_s() <= longest
    assert (backoff.attempts, backoff.total) == (6, 6)
    backoff.succeeded()
    assert backoff.attempts == 0
    assert backoff.next_s() <= 0.1
    assert backoff.total == 7


def test_processes_that_failed_together_do_not_come_back_together() -> None:
    assert len({Backoff(1.0, 8.0).next_s() for _ in range(20)}) > 10


def test_a_pause_ends_with_the_deadline() -> None:
    backoff = Backoff(30.0, 60.0)
    began = time.monotonic()
    asyncio.run(backoff.pause(0.01))
    asyncio.run(backoff.pause(-1.0))
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0)])
def test_bounds_that_do_not_fit_are_refused(first: float, last: float) -> None:
    with pytest.raises(ValueError, match="back-off"):
        Backoff(first, last)
