"""docs/feature-matrix.md: what was played, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.features.cells import Cell, Fault, cells
from tests.features.record import Played, played_digest
from tests.features.requests import alone, pairs

TEMPLATE = Path(__file__).with_name("page.md")


def page(results: Sequence[Played]) -> str:
    """Of each cell the last time that it was played; earlier failures of the same code are listed."""
    last = {result.cell: result for result in results}
    played = [last[cell.name] for cell in cells() if cell.name in last]
    failures = [result for result in results if result.problems]
    loads = [result.load for result in played] or [0.0]
    text = [
        f"{len(cells())} cells, {len(played)} played, {sum(not result.problems for result in played)} passed, "
        f"{sum(not (result.problems or result.cut) for result in played)} of these to their end: "
        f"{sum(result.runs for result in played):,} runs with a fault, {sum(result.answers for result in played):,} "
        f"answers compared, in {sum(result.seconds for result in played) / 60:.0f} minutes. Code {played_digest()}. "
        f"{os.cpu_count()} cores, load average from {min(loads):.0f} to {max(loads):.0f}.",
        "",
        f"| engine | requests | {' | '.join(Fault)} |",
        "|---|---|" + "---|" * len(Fault),
    ]
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells():
        rows.setdefault((cell.engine.name, cell.group), []).append(cell)
    for (engine, group), of_row in rows.items():
        told = [_told(last.get(cell.name)) for cell in of_row]
        text.append(f"| {engine} | {group} ({len(of_row[0].requests)}) | {' | '.join(told)} |")
    if failures:
        text += ["", "What failed, the last time or before:", ""]
        text += [f"- {failed.cell}: {failed.problems[0].splitlines()[0]}" for failed in failures]
    names = "; ".join(asked.name for asked in alone())
    said = TEMPLATE.read_text().replace("RESULTS", "\n".join(text)).replace("FEATURES", names)
    return said.replace("PAIRS", str(len(pairs())))


def _told(result: Played | None) -> str:
    if result is None:
        return "not played"
    if result.problems:
        return f"**FAILS** ({len(result.problems)} answers)"
    drafts = f", {result.drafts} drafts" if result.drafts else ""
    return f"passes{' so far' if result.cut else ''}: {result.indices} of {result.indices_all}{drafts}"
