"""The FailSafe paper's figures from a simulation of `bench failsafe`; needs matplotlib.

throughput: tokens a second over time under a trace. ranks: over the number of ranks, without faults. recovery: seconds
until all is there again, by how many ranks are lost. balance: fullest and slowest ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is asked for

from matplotlib.figure import Figure

from bench.contract import Result
from bench.failsafe_systems import Outcome

COLOURS = {"ours": "#1f6feb", "float": "#8250df", "standard": "#d1242f"}
LABELS = {"ours": "ours, exact sums", "float": "ours, usual sums", "standard": "standard"}
BIN_S = 60.0  # of Served.completed
Timelines = Mapping[str, Mapping[str, Sequence[Outcome]]]
PAPER_RECOVERY = 183  # times faster than computing again


def draw_all(folder: Path, result: Result, timelines: Timelines) -> Iterator[Path]:
    """Draws into `folder`, and yields each file."""
    for title, systems in timelines.items():
        name = title.replace(", ", "_").replace(".", "")
        yield from _save(_over_time(title, systems), folder / f"throughput_{name}")
    yield from _save(_over_ranks(result), folder / "ranks")
    yield from _save(_recovery(result), folder / "recovery")
    yield from _save(_balance(result), folder / "balance")


def _save(figure: Figure, path: Path) -> Iterator[Path]:
    figure.text(0.99, 0.005, "simulated: no GPU was used", ha="right", fontsize=7, color="#57606a")
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
        yield path.with_suffix(suffix)


def _over_time(title: str, systems: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Requests that ended, in tokens a second, of all groups."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, outcomes in systems.items():
        bins = int(outcomes[0].seconds / BIN_S)
        totals = [
            sum(each.served.completed.get(place, 0) for each in outcomes) / BIN_S for place in range(bins)
        ]
        ax.plot(
            [place * BIN_S / 60 for place in range(bins)], totals, color=COLOURS[name], label=LABELS[name]
        )
    ax.set_xlabel("minutes")
    ax.set_ylabel("tokens a second, all groups")
    ax.set_title(f"Throughput over time: {title}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def _rows(result: Result, part: str) -> dict[tuple[str, str], list[dict[str, float]]]:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in result.rows:
        if row["part"] == part:
            numbers = {name: float(value) for name, value in row.items() if not isinstance(value, str)}
            found.setdefault((str(row["model"]), str(row.get("requests", ""))), []).append(numbers)
    return found


def _over_ranks(result: Result) -> Figure:
    places = _rows(result, "full")
    figure = Figure(figsize=(4 * len(places), 4), layout="constrained")
    for ax, ((model, requests), rows) in zip(
        figure.subplots(1, len(places), squeeze=False)[0], places.items(), strict=True
    ):
        for name, column in (("ours", "tokens_per_s"), ("float", "tokens_per_s_float")):
            ax.plot(
                [r["ranks"] for r in rows],
                [r[column] for r in rows],
                "o-",
                color=COLOURS[name],
                label=LABELS[name],
            )
        powers = {r["ranks"]: r["tokens_per_s_float"] for r in rows if r["ranks"] in (1, 2, 4, 8)}
        below = [max((powers[p] for p in powers if p <= r["ranks"]), default=0.0) for r in rows]
        ax.step(
            [r["ranks"] for r in rows],
            below,
            where="pre",
            color=COLOURS["standard"],
            label=LABELS["standard"],
        )
        ax.set_title(f"{model}, {requests}", fontsize=9)
        ax.set_xlabel("ranks")
        ax.set_ylabel("tokens a second")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure


def _recovery(result: Result) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for (model, _), rows in _rows(result, "recovery").items():
        lost = [r["lost"] for r in rows]
        (line,) = ax.plot(lost, [r["recovery_s"] for r in rows], "o-", label=f"{model}, restored")
        ax.plot(
            lost,
            [r["recompute_s"] for r in rows],
            "o:",
            color=line.get_color(),
            label=f"{model}, computed again",
        )
    ax.set_yscale("log")
    ax.set_xticks([1, 2, 3])
    ax.set_xlabel("ranks lost of eight")
    ax.set_ylabel("seconds")
    ax.set_title(f"Contexts of 16K tokens (published: {PAPER_RECOVERY}x between the two)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def _balance(result: Result) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, column, title in (
        (axes[0], "kv_max_min", "KV: fullest against emptiest rank"),
        (axes[1], "compute_max_mean", "compute: slowest rank against the mean"),
    ):
        for (model, requests), rows in _rows(result, "full").items():
            kept = [r for r in rows if r["ranks"] >= 5]
            ax.plot([r["ranks"] for r in kept], [r[column] for r in kept], "o-", label=f"{model}, {requests}")
        ax.axhline(1.05, ls="--", color="#8b949e")
        ax.set_xticks([5, 6, 7, 8])
        ax.set_xlabel("ranks")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure
