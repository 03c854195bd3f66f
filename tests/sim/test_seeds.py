"""What CI runs of the simulator: the first seeds, in pieces that each end in time and say how far they are."""

from __future__ import annotations

import pytest

from tests.sim.beside import PIECE, PIECES

SEEDS = 2000


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SEEDS, PIECE))
def test_seeds(first: int) -> None:
    """Begun before: see tests/conftest.py."""
    status, said = PIECES.ended[first].result(590.0)
    assert status == 0, said
    assert f"soak: {PIECE} seeds from {first}, 0 failed" in said
