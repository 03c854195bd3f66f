"""`python -m bench.measurements`: docs/measurements.md from the committed results, beside what they have to reach.

Nothing on the page is typed by hand: who measures again writes the result into `bench/results` (`--json`) and runs it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.bars import BARS, Bar

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "measurements.md"
OTHERS_CORES = 0.1  # that others had meanwhile: more is a busy machine
BUSY = 3.0  # a load of more when it ended, of results that do not say that

HEAD = """# Measurements

Made by `python -m bench.measurements` from `bench/results`: what `python -m bench NAME` measured, and what it has to
reach. Ratios say how many times better ours is than what was measured in turns with it. *busy*: other work ran on the
machine meanwhile: others had more than a tenth of a core, or (older results, which do not say) the load was high.
Figures of a bench that no result here has are not known.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One committed result."""

    name: str  # of the file
    bench: str
    figures: Mapping[str, float]  # "metrics.NAME", "ratios.NAME"
    machine: str
    busy: bool
    day: str  # "": older results do not say


def read(folder: Path = RESULTS) -> list[Measured]:
    """Raises ValueError for a file that is no result."""
    found = []
    for path in sorted(folder.glob("*.json")):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"{path} is no result of a bench")
        if "bench" in value:
            found.append(_measured(path.stem, value))
    return found


def _measured(name: str, value: Mapping[str, Any]) -> Measured:
    machine = value.get("machine", {})
    unix_s = machine.get("unix_s")
    if "others_cores" in machine:
        busy = machine["others_cores"] + machine["stolen_cores"] > OTHERS_CORES
    else:  # an older result, whose load has the bench's own
        busy = machine.get("load_1m", 0.0) > BUSY
    figures = {
        f"{part}.{key}": float(v) for part in ("metrics", "ratios") for key, v in value.get(part, {}).items()
    }
    cpu = " ".join(str(machine.get("cpu", "unknown")).replace("(R)", "").replace("(TM)", "").split())
    day = datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d") if unix_s else ""
    return Measured(
        name, str(value["bench"]), figures, f"{cpu}, {machine.get('cores', '?')} cores", busy, day
    )


def page(results: Sequence[Measured], soak: Mapping[str, Any] | None) -> str:
    by_bench: dict[str, list[Measured]] = defaultdict(list)
    for result in results:
        by_bench[result.bench].append(result)
    lines = [HEAD, "| bench | figure | has to be | measured | |", "|---|---|---|---|---|"]
    for bar in BARS:
        lines += _rows(bar, by_bench[bar.bench])
    lines += ["", "## Results", "", "| file | machine | day | |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.machine} | {r.day or '-'} | {'busy' if r.busy else ''} |" for r in results]
    if soak is not None:
        lines += ["", "## The simulator", "", _soak(soak)]
    return "\n".join(lines) + "\n"


def _rows(bar: Bar, results: Sequence[Measured]) -> list[str]:
    bound = f"{'at most' if bar.most else 'at least'} {bar.bound:.5g}"
    told = [
        f"| {bar.bench} | {bar.what} | {bound} | {value:.4g} | {'held' if bar.held(value) else '**missed**'}"
        f"{', busy' if one.busy else ''} ({one.name}) |"
        for one in results
        if (value := one.figures.get(bar.figure)) is not None
    ]
    return told or [f"| {bar.bench} | {bar.what} | {bound} | - | not measured |"]


def _soak(record: Mapping[str, Any]) -> str:
    failures = "none failed" if not record["failures"] else f"{record['failures']} failed"
    return (
        f"{record['count']:,} of {record['wanted']:,} seeds, {failures}, {record['virtual_hours']:.1f} virtual hours, "
        f"of the code with the digest `{record['code']}` (`bench/results/soak.json`)."
    )


def current(folder: Path = RESULTS) -> str:
    soak = folder / "soak.json"
    return page(read(folder), json.loads(soak.read_text()) if soak.exists() else None)


if __name__ == "__main__":
    PAGE.write_text(current())
    print(f"wrote {PAGE.relative_to(ROOT)}")
