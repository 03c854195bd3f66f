"""Emulated time: what is real counts once in it, however much faster than the clock it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from dataplane.devices import EmulatedDevice
from dataplane.moment import MOMENT


@pytest.fixture
def scale() -> Iterator[float]:
    MOMENT.time_scale = 4.0
    yield 4.0
    MOMENT.time_scale = 1.0
    MOMENT.end()


def test_a_moment_goes_on_from_when_something_was_due(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    clock, spent = 100.0, 7.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "thread_time", lambda: spent)
    assert MOMENT.now() == 100.0
    MOMENT.begin(99.0)  # we come a second late: in emulated time that would be four
    assert MOMENT.now() == 99.0
    clock, spent = 100.4, 7.2  # and compute: what would be 0.8 is 0.2
    assert MOMENT.now() == pytest.approx(99.05)
    clock, spent = 100.5, 99.0  # never more than the clock says
    assert MOMENT.now() == pytest.approx(99.375)
    MOMENT.end()
    assert MOMENT.now() == clock


def test_at_time_scale_one_it_is_the_clock() -> None:
    MOMENT.begin(time.monotonic() - 5.0)
    try:
        assert MOMENT.now() == pytest.approx(time.monotonic(), abs=0.1)
    finally:
        MOMENT.end()


def test_a_device_makes_up_for_our_lateness_but_is_busy_with_one_step_at_a_time(scale: float) -> None:
    async def steps() -> tuple[float, float, float]:
        device, started = EmulatedDevice(), time.monotonic()
        done = []
        # The inputs of the first came 0.08 s before we took it up, but nothing was computed; the next ones must wait.
        for came in (started - 0.08, started, started):
            await device.run(came, time.monotonic(), 0.1)
            done.append(MOMENT.now() - started)
            MOMENT.end()
        first, second, third = done
        return first, second, third

    first, second, third = asyncio.run(steps())
    assert first == pytest.approx(0.02, abs=0.015)
    assert second - first == pytest.approx(0.1, abs=0.015)
    assert third - second == pytest.approx(0.1, abs=0.015)
