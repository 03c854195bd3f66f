"""What the failures of `bench protection` were said to cost, over what they cost; needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is asked for

from matplotlib.figure import Figure

from bench.protection_incident import WITHIN, Row

COLOURS = {"none": "#d1242f", "replicate": "#1f6feb", "xor41": "#2da44e"}


def draw(folder: Path, rows: Sequence[Row]) -> Iterator[Path]:
    """Draws into `folder`, and yields each file. Rows without a prediction are left out."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    ax = figure.subplots()
    told = [(row.policy, row.measured_s, row.predicted_s) for row in rows if row.predicted_s is not None]
    for policy, colour in COLOURS.items():
        points = [(measured, predicted) for name, measured, predicted in told if name == policy]
        if points:
            ax.scatter(*zip(*points, strict=True), color=colour, label=policy, alpha=0.8)
    seconds = [value for _, *both in told for value in both]
    low, high = 0.8 * min(seconds, default=0.1), 1.25 * max(seconds, default=1.0)
    ax.plot([low, high], [low, high], color="black", lw=0.8)
    ax.fill_between(
        [low, high], [low * (1 - WITHIN), high * (1 - WITHIN)], [low * (1 + WITHIN), high * (1 + WITHIN)],
        color="#8b949e", alpha=0.2, label=f"within {WITHIN:.0%}",
    )  # fmt: skip
    ax.set(
        xscale="log", yscale="log", xlabel="seconds to the next token, measured", ylabel="seconds, predicted"
    )
    ax.set_title("What a node's loss would cost: predicted and measured")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    for suffix in (".png", ".svg"):
        path = (folder / "protection_predicted").with_suffix(suffix)
        figure.savefig(path, dpi=150)
        yield path
