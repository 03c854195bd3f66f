"""The page of measurements says what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.bars import BARS
from bench.measurements import PAGE, Measured, current, page, read


def test_the_page_is_of_the_committed_results() -> None:
    assert PAGE.read_text() == current(), "python -m bench.measurements writes it"


def test_a_bar_is_held_or_missed_by_each_result() -> None:
    bar = next(bar for bar in BARS if bar.figure == "metrics.cpu_share_1000")
    results = [
        Measured("quick", "scale", {bar.figure: 0.2}, "a CPU", busy=False, day=""),
        Measured("slow", "scale", {bar.figure: 0.3}, "a CPU", busy=True, day=""),
        Measured("other", "parity", {bar.figure: 0.1}, "a CPU", busy=False, day=""),
    ]
    text = page(results, None)
    assert "| at most 0.25 | 0.2 | held (quick) |" in text
    assert "| at most 0.25 | 0.3 | **missed**, busy (slow) |" in text
    assert "(other)" not in text
    assert text.count("not measured") == len(BARS) - 1


def test_what_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "soak.json").write_text(json.dumps({"code": "x"}))
    assert read(tmp_path) == []
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of a bench"):
        read(tmp_path)
