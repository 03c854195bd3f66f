"""`python -m tests.features`: plays every cell and writes docs/feature-matrix.md from what came of them.

In parts: `--record FILE --for SECONDS`, again and again. Cells that passed with this very code are not played again.
With `--runs COUNT` all cells get so many runs first.
`--only TEXT` plays those whose name has it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import structlog

from tests.features import record
from tests.features.cells import cells
from tests.features.play import Player
from tests.features.table import page

PAGE = Path(__file__).parents[2] / "docs" / "feature-matrix.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.features", description=__doc__)
    parser.add_argument("--record", type=Path, help="file of results, which a later run goes on from")
    parser.add_argument("--for", dest="seconds", type=float, help="begin no cell later than so many seconds")
    parser.add_argument(
        "--runs", type=int, help="at most so many of a cell; without it later, it is played to its end"
    )
    parser.add_argument(
        "--only", default="", help="only cells whose name has this text; the page is not written"
    )
    given = parser.parse_args()
    logging.disable(logging.ERROR)  # nodes tell of each death
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory(prefix="kf-features-") as folder:
        file = given.record or Path(folder, "record")
        try:
            record.begin(file)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        _play(file, given.only, given.seconds, given.runs)
        results = record.results(file)
        left = record.missing(results)
        print(f"{len(cells()) - len(left)} of {len(cells())} cells have passed, each place that can be hit")
        if results and not given.only:
            PAGE.write_text(page(results))
            print(f"{PAGE}: {len(results)} results")
        last = {result.cell: result for result in results}
        failed = any(result.problems for result in last.values())
        return (
            1 if failed or (left and not given.only and given.seconds is None and given.runs is None) else 0
        )


def _play(file: Path, only: str, seconds: float | None, runs: int | None) -> None:
    missing = record.missing(record.results(file), cut=runs is not None)
    todo = [cell for cell in missing if only in cell.name]
    began = time.monotonic()
    with Player() as player:
        for number, cell in enumerate(todo, 1):
            if seconds is not None and time.monotonic() - began > seconds:
                break
            result = player.play(cell, runs)
            record.add(file, result, cut=result.runs == runs)
            verdict = f"{len(result.problems)} answers FAIL" if result.problems else "passes"
            print(
                f"[{number}/{len(todo)}] {cell.name}: {verdict}, {result.indices} of {result.indices_all} places "
                f"in {result.runs} runs, {result.seconds:.0f} s",
                flush=True,
            )
            for problem in result.problems[:5]:
                print(f"    {problem}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
