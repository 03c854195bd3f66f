"""What the matrix has played so far: the whole of it takes half an hour, and machines have less."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests import recording
from tests.matrix.cells import CELLS, Cell
from tests.matrix.streams import Result
from tests.recording import modules_of
from tests.sources import ROOT, code_digest

WHAT = "the matrix"
PLAYED = ("controlplane", "dataplane", "kernels", "web", "tests/matrix")  # what runs in a cell, or plays it
ALSO = ("tests/e2e/cluster.py", "tests/e2e/faults.py")  # which the last imports
JUDGES = ("__main__.py", "record.py", "table.py")  # of the last, what only reads results


def played_digest() -> str:
    """Of the sources that decide how a cell ends: what passed with other code says nothing of this one."""
    return code_digest([*(ROOT / file for file in ALSO), *modules_of(PLAYED, Path(__file__).parent, JUDGES)])


def begin(file: Path) -> None:
    """See recording.py."""
    recording.begin(file, played_digest(), WHAT)


def add(file: Path, result: Result) -> None:
    recording.add(file, result)


def results(file: Path) -> list[Result]:
    """See recording.py."""
    return recording.results(file, Result, WHAT)


def missing(played: Sequence[Result], cells: Sequence[Cell] = CELLS) -> list[Cell]:
    """Which cells have not passed, in order."""
    passed = {result.cell for result in played if not result.problems}
    return [cell for cell in cells if cell.name not in passed]
