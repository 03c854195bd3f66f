"""`python -m tests.matrix`: plays every cell and writes docs/fault-matrix.md from what was measured.

In parts: `--record FILE --for SECONDS`, again and again. Cells that passed with this very code are not played again,
and once none is missing the page is written. `--only EXPRESSION` (pytest's -k) plays some cells.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.matrix import record
from tests.matrix.table import page

PAGE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="The fault matrix.")
    parser.add_argument("--only", default="", help="which cells, as pytest's -k has it")
    parser.add_argument("--record", type=Path, help="keep results in this file, and go on from what it has")
    parser.add_argument(
        "--for", dest="limit_s", type=float, help="no cell begins later than so many seconds from now"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.record or Path(folder, "results.jsonl")
        try:
            record.begin(file)
            return play(file, options.only, options.limit_s)
        except ValueError as error:
            parser.error(str(error))


def play(file: Path, only: str, limit_s: float | None) -> int:
    """What pytest returns; writes the page once every cell has passed, or if all were to be played."""
    os.environ["KF_MATRIX_RESULTS"] = str(file)
    if limit_s is not None:
        os.environ["KF_MATRIX_UNTIL"] = str(time.monotonic() + limit_s)
    status = pytest.main(["-v", str(Path(__file__).parent / "test_matrix.py"), "-k", only])
    results = record.results(file)
    missing = record.missing(results)
    print(f"{len(record.CELLS) - len(missing)} of {len(record.CELLS)} cells have passed")
    if results and not (missing and (only or limit_s is not None)):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(results))
        print(f"{PAGE}: {len(results)} results")
    return 1 if missing and not only and limit_s is None else int(status)


if __name__ == "__main__":
    sys.exit(main())
