"""Rows with numbers that are not finite, what steps of a size usually take, and whether a computation advances."""

from __future__ import annotations

import numpy as np
import pytest

from dataplane.core.finite import nonfinite_rows
from dataplane.core.pace import LOOK_MAX_S, SPENT_MAX_S, Pace, Progress, Standstill


def activations(kind: str, rows: int = 5, hidden: int = 33) -> np.ndarray:
    """Random ones, with the largest and smallest finite numbers among them; bfloat16 as uint16."""
    made = np.random.default_rng(3).standard_normal((rows, hidden)).astype(np.float32)
    made[0, :4] = 3.3e38, -3.3e38, 1e-45, 0.0
    return made if kind == "float32" else (made.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_rows_are_found(kind: str, bad: float) -> None:
    data = activations(kind)
    assert nonfinite_rows(data).tolist() == []
    bits = np.array([bad], np.float32).view(np.uint32)[0]
    for row, column in ((1, 0), (4, 32)):
        data.view(np.uint16 if kind == "bfloat16" else np.uint32)[row, column] = (
            bits >> 16 if kind == "bfloat16" else bits
        )
    assert nonfinite_rows(data).tolist() == [1, 4]


def test_nothing_is_finite() -> None:
    assert nonfinite_rows(np.empty((0, 8), np.float32)).tolist() == []


def test_what_steps_usually_take() -> None:
    pace = Pace()
    assert pace.usual_s(10) == 0.0
    for _ in range(3):
        pace.ran(1, 100, 0.01)
        pace.ran(512, 512, 0.4)
    assert pace.usual_s(1) == pytest.approx(0.01)
    assert pace.usual_s(600) == pytest.approx(0.4 * 600 / 512)
    assert pace.usual_s(256) == pytest.approx(0.4)  # rather too long than too short
    assert [(t.steps, t.busy_us) for t in pace.report()] == [(3, 30_000), (3, 1_200_000)]


def looks(*progress: Progress | None, every_s: float = 0.05) -> float:
    watch = Standstill()
    for k, found in enumerate(progress):
        watch.look(100.0 + k * every_s, found)
    return watch.still_s


def test_a_computation_that_advances_does_not_stand_still_however_long_it_takes() -> None:
    assert looks(*(Progress(1, beats, 0.0) for beats in range(10_000))) == 0.0
    assert looks(*(Progress(number, 0, 0.0) for number in range(100))) == 0.0, "each is another one"
    assert looks(*[Progress(1, 7, 0.0)] * 41) == pytest.approx(2.0)
    assert looks(*[Progress(1, 7, 0.0)] * 41, None) == 0.0


def test_a_loop_without_end_in_the_kernels_stands_still_and_one_outside_does_not_at_once() -> None:
    assert looks(*(Progress(1, 7, 0.05 * k) for k in range(41))) == pytest.approx(2.0)
    assert looks(*(Progress(1, -1, 0.05 * k) for k in range(41))) == 0.0
    endless = int((SPENT_MAX_S + 2.0) / 0.05)
    assert looks(*(Progress(1, -1, 0.05 * k) for k in range(endless))) == pytest.approx(2.0, abs=0.2)
    assert looks(*[Progress(1, -1, 0.3)] * 41) == pytest.approx(2.0), "it waits for something outside"


def test_what_did_not_run_itself_has_not_seen_anybody_stand_still() -> None:
    """Stopped for ten seconds, and with it the computation."""
    assert looks(Progress(1, 7, 0.0), Progress(1, 7, 0.0), every_s=10.0) == LOOK_MAX_S
