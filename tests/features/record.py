"""What the matrix of features has played so far. The first seven cells took 25 minutes of a busy machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests import recording
from tests.features.cells import Cell, cells
from tests.features.play import Result
from tests.recording import modules_of
from tests.sources import code_digest

WHAT = "the features"
PLAYED = ("controlplane/contract", "dataplane", "kernels", "web/gateway", "tests/features")
# Of the last, what only reads results, or plays something else.
JUDGES = ("__main__.py", "record.py", "table.py", "schemas.py", "test_features.py")


class Played(Result):
    cut: bool = False  # after as many runs as were asked for, and not when no place was left


def played_digest() -> str:
    """Of the sources that decide how a cell ends: what passed with other code says nothing of this one."""
    return code_digest(modules_of(PLAYED, Path(__file__).parent, JUDGES))


def begin(file: Path) -> None:
    """See recording.py."""
    recording.begin(file, played_digest(), WHAT)


def add(file: Path, result: Result, cut: bool = False) -> None:
    recording.add(file, Played(**msgspec.structs.asdict(result), cut=cut))


def results(file: Path) -> list[Played]:
    """See recording.py."""
    return recording.results(file, Played, WHAT)


def missing(played: Sequence[Played], cut: bool = False) -> list[Cell]:
    """Which cells have not passed, in order. `cut`: those that were cut short will do."""
    passed = {result.cell for result in played if not result.problems and (cut or not result.cut)}
    return [cell for cell in cells() if cell.name not in passed]
