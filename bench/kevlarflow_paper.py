"""The published figures beside ours: Table 1, and Figures 5, 6, 8 and 9.

The published table is not part of the project: `KF_PAPER_TABLE` names the CSV, else ../shared/data is looked at. A run
with `--figures DIR` leaves its figures there as JSON: so several runs (scenes, rates) come together in one drawing.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.contract import Result, progress

COLUMNS = {
    "latency_mean": "latency_avg_s",
    "ttft_mean": "ttft_avg_s",
    "latency_p99": "latency_p99_s",
    "ttft_p99": "ttft_p99_s",
}
# For scenes 1 to 3, from the text of the paper.
PAPER_RECOVERY_S = {1: 35.0, 2: 30.0, 3: 29.0}
PAPER_OVERHEAD = {1: (0.023, 0.028), 2: (0.040, 0.036), 3: (0.040, 0.036)}

Table = dict[tuple[int, float], dict[str, float]]


class Latency(msgspec.Struct):
    """Seconds by COLUMNS, and what replication adds while nothing fails (0.01: one percent)."""

    ours: dict[str, float]
    baseline: dict[str, float]
    overhead_mean: float
    overhead_p99: float


class Recovery(msgspec.Struct):
    """Seconds from a kill to the next token."""

    p50_s: float
    p99_s: float


class Record(msgspec.Struct):
    """One (scene, rate), for the figures. None: not measured."""

    scene: int
    rate: float
    latency: Latency | None = None
    recovery: Recovery | None = None


def paper_table() -> Table:
    """Rows of the published Table 1 by (scene, requests per second); empty when the file is not there."""
    given = os.environ.get("KF_PAPER_TABLE")
    root = Path(__file__).resolve().parents[1]
    path = Path(given) if given else root.parent / "shared" / "data" / "kevlarflow_table1.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {
            (int(row["scene"]), float(row["requests_per_s"])): {
                name: float(value) for name, value in row.items() if name not in ("scene", "requests_per_s")
            }
            for row in csv.DictReader(file)
        }


def compare_with_paper(result: Result, scene: int, rates: Sequence[float]) -> None:
    """Our Table 1 beside the paper's, on stdout."""
    table = paper_table()
    if not table:
        result.absent["paper"] = "the published table was not found: set KF_PAPER_TABLE to its CSV"
    rows = [("req/s", "", *COLUMNS)]
    for rate in rates:
        key = f"rate{rate:g}"
        published = table.get((scene, float(rate)))
        for name, source in (("baseline", result.baseline), ("KevlarFlow", result.metrics)):
            rows.append((f"{rate:g}", f"ours: {name}", *(f"{source[f'{key}_{m}_s']:.2f}" for m in COLUMNS)))
        rows.append((f"{rate:g}", "ours: ratio", *(f"{result.ratios[f'{key}_{m}']:.2f}x" for m in COLUMNS)))
        if published is None:
            continue
        for name, end in (("baseline", "base"), ("KevlarFlow", "kevlarflow")):
            rows.append(
                (f"{rate:g}", f"paper: {name}", *(f"{published[f'{c}_{end}']:.2f}" for c in COLUMNS.values()))
            )
        ratios = [published[f"{c}_base"] / published[f"{c}_kevlarflow"] for c in COLUMNS.values()]
        rows.append((f"{rate:g}", "paper: ratio", *(f"{ratio:.2f}x" for ratio in ratios)))
    print(f"Table 1, scene {scene} (seconds, emulated)")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def note_run(result: Result, scene: int, rate: float, figures: Path) -> None:
    """Keep what the figures need of one rate, with what earlier runs measured of it."""
    key = f"rate{rate:g}"
    path = figures / f"scene{scene}-{key}.json"
    record = msgspec.json.decode(path.read_bytes(), type=Record) if path.exists() else Record(scene, rate)
    metrics = result.metrics
    if f"{key}_ttft_mean_s" in metrics:
        record.latency = Latency(
            ours={m: float(metrics[f"{key}_{m}_s"]) for m in COLUMNS},
            baseline={m: float(result.baseline[f"{key}_{m}_s"]) for m in COLUMNS},
            overhead_mean=float(metrics[f"{key}_overhead_mean"]),
            overhead_p99=float(metrics[f"{key}_overhead_p99"]),
        )
    if f"{key}_recovery_p99_s" in metrics:
        p50_s, p99_s = (float(metrics[f"{key}_recovery_{name}_s"]) for name in ("p50", "p99"))
        record.recovery = Recovery(p50_s, p99_s)
    figures.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(record))


def records(figures: Path) -> list[Record]:
    """What earlier runs left, by scene and rate."""
    found = [msgspec.json.decode(p.read_bytes(), type=Record) for p in figures.glob("scene*-rate*.json")]
    return sorted(found, key=lambda record: (record.scene, record.rate))


def draw(figures: Path, result: Result) -> None:
    """PNG and SVG of every figure that there are measurements for."""
    try:
        from bench.kevlarflow_figures import draw_all
    except ModuleNotFoundError as error:
        result.absent["figures"] = f"{error.name} is not installed: pip install -e '.[bench]'"
        print(f"no figures: {result.absent['figures']}", file=sys.stderr)
        return
    for path in draw_all(figures, records(figures), paper_table(), PAPER_RECOVERY_S, PAPER_OVERHEAD):
        progress(f"  {path}")
