"""What CI runs of the simulator: the first seeds, in pieces that each end in time and say how far they are. Of seeds
that the committed soak has played with this very code (the digest tells), a tenth is played again."""

from __future__ import annotations

import json

import pytest

from tests.sim.soaking import ROOT, simulator

SEEDS = 2000
PIECE = 250
AGAIN = PIECE // 10
SOAK = ROOT / "bench" / "results" / "soak.json"


@pytest.fixture(scope="module")
def recorded() -> list[tuple[int, int]]:
    """Seeds [first, end) that the committed soak has found clean, with this code."""
    soak = json.loads(SOAK.read_text())
    code = json.loads(simulator("soak", "0").stdout.splitlines()[-1])["code"]
    same = soak["code"] == code and soak["without"] is None and not soak["failures"]
    return [(first, end) for first, end in soak["pieces"]] if same else []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, SEEDS, PIECE))
def test_seeds(first: int, recorded: list[tuple[int, int]]) -> None:
    known = any(begin <= first and first + PIECE <= end for begin, end in recorded)
    count = AGAIN if known else PIECE
    ended = simulator("soak", str(count), "--first", str(first), limit_s=890.0)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"soak: {count} seeds from {first}, 0 failed" in ended.stdout
