"""Figures 5, 6, 8 and 9 of the paper, with our measurements in them; needs matplotlib.

5: latency over the request rate. 6: time to first token over the request rate. 8: recovery time over the request rate.
9: what replication costs while nothing fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is asked for

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.kevlarflow_paper import COLUMNS, Record, Table

OURS, BASELINE, PAPER = "#1f6feb", "#d1242f", "#8b949e"
TITLES = {
    1: "Scene 1: 8 nodes, one fails",
    2: "Scene 2: 16 nodes, one fails",
    3: "Scene 3: 16 nodes, two fail",
}


def draw_all(
    folder: Path,
    records: Sequence[Record],
    paper: Table,
    paper_recovery_s: Mapping[int, float],
    paper_overhead: Mapping[int, tuple[float, float]],
) -> Iterator[Path]:
    """Draws into `folder`, and yields each file."""
    if not records:
        return
    for number, name, what in ((5, "latency", "Latency"), (6, "ttft", "Time to first token")):
        figure = _over_rate(records, paper, name, f"Figure {number}: {what} over the request rate")
        yield from _save(figure, folder / f"figure{number}_{name}")
    yield from _save(_recovery(records, paper_recovery_s), folder / "figure8_recovery")
    yield from _save(_overhead(records, paper_overhead), folder / "figure9_overhead")


def _save(figure: Figure, path: Path) -> Iterator[Path]:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
        yield path.with_suffix(suffix)


def _scenes(records: Sequence[Record]) -> list[int]:
    return sorted({record.scene for record in records})


def _over_rate(records: Sequence[Record], paper: Table, name: str, title: str) -> Figure:
    scenes = _scenes(records)
    figure = Figure(figsize=(5 * len(scenes), 7.5), layout="constrained")
    axes = figure.subplots(2, len(scenes), squeeze=False)
    for column, scene in enumerate(scenes):
        mine = [record for record in records if record.scene == scene]
        for row, statistic in enumerate(("mean", "p99")):
            measure = f"{name}_{statistic}"
            ax = axes[row][column]
            _published(ax, paper, scene, measure)
            rates = [record.rate for record in mine]
            ax.plot(
                rates,
                [r.baseline[measure] for r in mine],
                "o-",
                color=BASELINE,
                label="stop-restart, measured",
            )
            ax.plot(rates, [r.ours[measure] for r in mine], "o-", color=OURS, label="KevlarFlow, measured")
            ax.set_yscale("log")
            ax.set_xlabel("requests per second")
            ax.set_ylabel(f"{statistic}, seconds (emulated)")
            ax.set_title(TITLES[scene] if row == 0 else "")
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def _published(ax: Axes, paper: Table, scene: int, measure: str) -> None:
    rates = sorted(rate for at, rate in paper if at == scene)
    for end, style, label in (("base", "--", "baseline, paper"), ("kevlarflow", ":", "KevlarFlow, paper")):
        values = [paper[scene, rate][f"{COLUMNS[measure]}_{end}"] for rate in rates]
        if values:
            ax.plot(rates, values, style, color=PAPER, label=label)


def _recovery(records: Sequence[Record], paper_s: Mapping[int, float]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    ax = figure.subplots()
    for scene in _scenes(records):
        mine = [record for record in records if record.scene == scene]
        rates = [record.rate for record in mine]
        (line,) = ax.plot(rates, [r.recovery_p99_s for r in mine], "o-", label=f"scene {scene}, measured p99")
        ax.plot(
            rates, [r.recovery_p50_s for r in mine], "o:", color=line.get_color(), label=f"scene {scene}, p50"
        )
        ax.axhline(paper_s[scene], ls="--", color=line.get_color(), alpha=0.5, label=f"scene {scene}, paper")
    ax.set_yscale("log")
    ax.set_xlabel("requests per second")
    ax.set_ylabel("seconds from the kill to the next token")
    ax.set_title("Figure 8: recovery time")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def _overhead(records: Sequence[Record], paper: Mapping[int, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(1.5 + 1.6 * len(records), 4.5), layout="constrained")
    ax = figure.subplots()
    places = range(len(records))
    bars = (
        (-0.3, [100 * r.overhead_mean for r in records], OURS, 1.0, "mean, measured"),
        (-0.1, [100 * r.overhead_p99 for r in records], OURS, 0.5, "p99, measured"),
        (0.1, [100 * paper[r.scene][0] for r in records], PAPER, 1.0, "mean, paper"),
        (0.3, [100 * paper[r.scene][1] for r in records], PAPER, 0.5, "p99, paper"),
    )
    for shift, values, colour, alpha, label in bars:
        ax.bar([p + shift for p in places], values, width=0.2, color=colour, alpha=alpha, label=label)
    ax.axhline(0.0, color="black", lw=0.8)
    ax.set_xticks(list(places), [f"scene {r.scene}\n{r.rate:g} req/s" for r in records])
    ax.set_ylabel("latency added, percent")
    ax.set_title("Figure 9: what replication costs while nothing fails")
    ax.legend(fontsize=8)
    return figure
