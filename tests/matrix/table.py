"""docs/fault-matrix.md: the cells, what was measured in each, and what no cell covers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

from tests.matrix.cells import CELLS, Cell, Cut, DiskFull, Fault, Kill, Slow, Stop
from tests.matrix.streams import Result

TEMPLATE = Path(__file__).with_name("page.md")
COLUMNS = ("fault", "hits", "while", "verdict", "longest pause", "lost / doubled / different", "streams (tokens)",
           "home again")  # fmt: skip


def page(results: Mapping[str, Result]) -> str:
    played = [results[cell.name] for cell in CELLS if cell.name in results]
    failed = [result for result in played if result.problems]
    text = [
        f"{len(CELLS)} cells, {len(played)} played, {len(played) - len(failed)} passed. "
        f"Linux {os.uname().release}, {os.cpu_count()} cores, load average {os.getloadavg()[2]:.0f} "
        "in the last quarter of an hour.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(row(cell, results.get(cell.name)) for cell in CELLS),
    ]
    if failed:
        text += ["", "What failed:", "", *(f"- {result.cell}: {result.problems[0]}" for result in failed)]
    return TEMPLATE.read_text().replace("RESULTS", "\n".join(text))


def row(cell: Cell, result: Result | None) -> str:
    fault, whom = words(cell.fault)
    start = f"| {fault} | {whom} | {cell.phase} "
    if result is None:
        return start + "| not played | | | | |"
    tokens = f"{result.lost} / {result.duplicated} / {result.different}"
    verdict = "**FAILS**" if result.problems else "passes"
    return (
        f"{start}| {verdict} | {seconds(result.longest_pause_s)} | {tokens} "
        f"| {result.streams} ({result.tokens}) | {seconds(result.home_s)} |"
    )


def words(fault: Fault) -> tuple[str, str]:
    """What it is, and whom it hits."""
    match fault:
        case Cut(flaps=flaps):
            kind = "flapping" if flaps else "cut"
            where = f"{fault.whom}: {fault.others}" if fault.others != "all" else fault.whom
            return f"{kind}, {fault.direction}, {fault.hold_s:g} s", where
        case Slow():
            delay = f"delay {fault.delay_s * 1000:g} ms" if fault.delay_s else ""
            loss = f"loss {fault.loss * 100:g} %" if fault.loss else ""
            what = " and ".join(filter(None, (delay, loss)))
            return f"{what}, {fault.hold_s:g} s", f"{fault.whom}: {fault.others}"
        case Kill():
            return "kill -9", fault.whom
        case Stop():
            return f"stop, {fault.hold_s:g} s", fault.whom
        case DiskFull():
            return f"disk full, {fault.hold_s:g} s", fault.whom
        case _:
            assert_never(fault)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
