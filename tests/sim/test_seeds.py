"""What CI runs of the simulator: the first seeds, in pieces that each end in time and say how far they are."""

from __future__ import annotations

import pytest

from tests.sim.soaking import simulator

SEEDS = 2000
PIECE = 250


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, SEEDS, PIECE))
def test_seeds(first: int) -> None:
    ended = simulator("soak", str(PIECE), "--first", str(first), limit_s=890.0)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"soak: {PIECE} seeds from {first}, 0 failed" in ended.stdout
