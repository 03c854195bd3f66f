"""Figures 5, 6, 8 and 9 of the paper, with our measurements in them; needs matplotlib.

5: latency over the request rate. 6: time to first token over the request rate. 8: recovery time over the request rate.
9: what replication costs while nothing fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is asked for

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.kevlarflow_paper import COLUMNS, Latency, Record, Recovery, Table

OURS, BASELINE, PAPER = "#1f6feb", "#d1242f", "#8b949e"
Place = tuple[int, float]  # scene, requests per second
Measured = TypeVar("Measured")
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
    latencies = {(r.scene, r.rate): r.latency for r in records if r.latency is not None}
    recoveries = {(r.scene, r.rate): r.recovery for r in records if r.recovery is not None}
    if latencies:
        for number, name, what in ((5, "latency", "Latency"), (6, "ttft", "Time to first token")):
            figure = _over_rate(latencies, paper, name, f"Figure {number}: {what} over the request rate")
            yield from _save(figure, folder / f"figure{number}_{name}")
        yield from _save(_overhead(latencies, paper_overhead), folder / "figure9_overhead")
    if recoveries:
        yield from _save(_recovery(recoveries, paper_recovery_s), folder / "figure8_recovery")


def _save(figure: Figure, path: Path) -> Iterator[Path]:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
        yield path.with_suffix(suffix)


def _by_scene(measured: Mapping[Place, Measured]) -> dict[int, tuple[list[float], list[Measured]]]:
    """Rates and what was measured at them."""
    scenes: dict[int, tuple[list[float], list[Measured]]] = {}
    for (scene, rate), values in sorted(measured.items(), key=itemgetter(0)):
        rates, found = scenes.setdefault(scene, ([], []))
        rates.append(rate)
        found.append(values)
    return scenes


def _over_rate(latencies: Mapping[Place, Latency], paper: Table, name: str, title: str) -> Figure:
    scenes = _by_scene(latencies)
    figure = Figure(figsize=(5 * len(scenes), 7.5), layout="constrained")
    axes = figure.subplots(2, len(scenes), squeeze=False)
    for column, (scene, (rates, found)) in enumerate(scenes.items()):
        for row, statistic in enumerate(("mean", "p99")):
            measure = f"{name}_{statistic}"
            ax = axes[row][column]
            _published(ax, paper, scene, measure)
            theirs, ours = [at.baseline[measure] for at in found], [at.ours[measure] for at in found]
            ax.plot(rates, theirs, "o-", color=BASELINE, label="stop-restart, measured")
            ax.plot(rates, ours, "o-", color=OURS, label="KevlarFlow, measured")
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


def _recovery(recoveries: Mapping[Place, Recovery], paper_s: Mapping[int, float]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    ax = figure.subplots()
    for scene, (rates, found) in _by_scene(recoveries).items():
        (line,) = ax.plot(rates, [at.p99_s for at in found], "o-", label=f"scene {scene}, measured p99")
        colour = line.get_color()
        ax.plot(rates, [at.p50_s for at in found], "o:", color=colour, label=f"scene {scene}, p50")
        ax.axhline(paper_s[scene], ls="--", color=colour, alpha=0.5, label=f"scene {scene}, paper")
    ax.set_yscale("log")
    ax.set_xlabel("requests per second")
    ax.set_ylabel("seconds from the kill to the next token")
    ax.set_title("Figure 8: recovery time")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def _overhead(latencies: Mapping[Place, Latency], paper: Mapping[int, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(1.5 + 1.6 * len(latencies), 4.5), layout="constrained")
    ax = figure.subplots()
    at = sorted(latencies)
    places = range(len(at))
    bars = (
        (-0.3, [100 * latencies[p].overhead_mean for p in at], OURS, 1.0, "mean, measured"),
        (-0.1, [100 * latencies[p].overhead_p99 for p in at], OURS, 0.5, "p99, measured"),
        (0.1, [100 * paper[scene][0] for scene, _ in at], PAPER, 1.0, "mean, paper"),
        (0.3, [100 * paper[scene][1] for scene, _ in at], PAPER, 0.5, "p99, paper"),
    )
    for shift, values, colour, alpha, label in bars:
        ax.bar([p + shift for p in places], values, width=0.2, color=colour, alpha=alpha, label=label)
    ax.axhline(0.0, color="black", lw=0.8)
    ax.set_xticks(list(places), [f"scene {scene}\n{rate:g} req/s" for scene, rate in at])
    ax.set_ylabel("latency added, percent")
    ax.set_title("Figure 9: what replication costs while nothing fails")
    ax.legend(fontsize=8)
    return figure
