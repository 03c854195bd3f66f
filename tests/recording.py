"""Results in a file that a later run goes on from, since all of them take longer than a machine is there for.

Its first line says which code was played, and each further one what came of a cell, written as soon as it was over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.sources import ROOT

T = TypeVar("T", bound=msgspec.Struct)


class _Head(msgspec.Struct):
    code: str


def modules_of(folders: Sequence[str], player: Path, judges: Sequence[str]) -> Iterator[Path]:
    """The modules in these folders of the project, without those of the folder `player` that only read results."""
    for path in (file for folder in folders for file in (ROOT / folder).rglob("*.py*")):
        if path.suffix in (".py", ".pyx") and not (path.parent == player and path.name in judges):
            yield path


def begin(file: Path, code: str, what: str) -> None:
    """Make it a record of this code. Results of other code are dropped. Raises ValueError if it is something else."""
    if not file.exists() or _head(file, what).code != code:
        file.write_bytes(msgspec.json.encode(_Head(code)) + b"\n")


def add(file: Path, result: msgspec.Struct) -> None:
    with file.open("ab") as record:
        record.write(msgspec.json.encode(result) + b"\n")


def results(file: Path, kind: type[T], what: str) -> list[T]:
    """Of each cell as often as it was played. Raises ValueError for a file that is no record."""
    _head(file, what)
    try:
        return [msgspec.json.decode(line, type=kind) for line in file.read_bytes().splitlines()[1:]]
    except msgspec.MsgspecError as error:
        raise _no_record(file, what, error) from error


def _head(file: Path, what: str) -> _Head:
    try:
        return msgspec.json.decode(file.read_bytes().partition(b"\n")[0], type=_Head)
    except msgspec.MsgspecError as error:
        raise _no_record(file, what, error) from error


def _no_record(file: Path, what: str, error: Exception) -> ValueError:
    return ValueError(f"{file} is not a record of {what} ({error}): name another file")
