"""`python -m tests.matrix`: plays every cell and writes docs/fault-matrix.md from what was measured.

`--only EXPRESSION` plays some (pytest's -k) and writes nothing; `--from FILE` writes the table from results that
KF_MATRIX_RESULTS has gathered.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from tests.matrix.streams import Result
from tests.matrix.table import page

PAGE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="The fault matrix.")
    parser.add_argument(
        "--only", default="", help="which cells, as pytest's -k has it; the page is not written"
    )
    parser.add_argument(
        "--from", dest="results", type=Path, help="write the page from results of earlier runs"
    )
    options = parser.parse_args()
    if options.results is not None:
        return write(options.results)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.jsonl")
        os.environ["KF_MATRIX_RESULTS"] = str(results)
        status = pytest.main(["-v", str(Path(__file__).parent / "test_matrix.py"), "-k", options.only])
        if options.only or not results.exists():  # it says itself what was skipped, and why
            return int(status)
        return write(results) or int(status)


def write(file: Path) -> int:
    results = [msgspec.json.decode(line, type=Result) for line in file.read_bytes().splitlines()]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({result.cell: result for result in results}))  # the last one of each cell
    print(f"{PAGE}: {len(results)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
