"""Results in a file that a later run goes on from. The first seven cells took 25 minutes of a busy machine.

Its first line says which code was played, and each further one what came of a cell, written as soon as it was over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from tests.features.cells import Cell, cells
from tests.features.play import Result
from tests.sim.record import ROOT, code_digest

PLAYED = ("controlplane/contract", "dataplane", "kernels", "web/gateway", "tests/features")
# Of the last, what only reads results, or plays something else.
JUDGES = ("__main__.py", "record.py", "table.py", "schemas.py", "test_features.py")


class Played(Result):
    cut: bool = False  # after as many runs as were asked for, and not when no place was left


class _Head(msgspec.Struct):
    code: str


def played_digest() -> str:
    """Of the sources that decide how a cell ends: what passed with other code says nothing of this one."""

    def modules() -> Iterator[Path]:
        for path in (file for folder in PLAYED for file in (ROOT / folder).rglob("*.py*")):
            judge = path.parent == Path(__file__).parent and path.name in JUDGES
            if path.suffix in (".py", ".pyx") and not judge:
                yield path

    return code_digest(modules())


def begin(file: Path) -> None:
    """Make it a record of this code. Results of other code are dropped. Raises ValueError if it is something else."""
    code = played_digest()
    if not file.exists() or _head(file).code != code:
        file.write_bytes(msgspec.json.encode(_Head(code)) + b"\n")


def add(file: Path, result: Result, cut: bool = False) -> None:
    with file.open("ab") as record:
        record.write(msgspec.json.encode(Played(**msgspec.structs.asdict(result), cut=cut)) + b"\n")


def results(file: Path) -> list[Played]:
    """Of each cell as often as it was played. Raises ValueError for a file that is no record."""
    _head(file)
    try:
        return [msgspec.json.decode(line, type=Played) for line in file.read_bytes().splitlines()[1:]]
    except msgspec.MsgspecError as error:
        raise _no_record(file, error) from error


def missing(played: Sequence[Played], cut: bool = False) -> list[Cell]:
    """Which cells have not passed, in order. `cut`: those that were cut short will do."""
    passed = {result.cell for result in played if not result.problems and (cut or not result.cut)}
    return [cell for cell in cells() if cell.name not in passed]


def _head(file: Path) -> _Head:
    try:
        return msgspec.json.decode(file.read_bytes().partition(b"\n")[0], type=_Head)
    except msgspec.MsgspecError as error:
        raise _no_record(file, error) from error


def _no_record(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is not a record of the features ({error}): name another file")
