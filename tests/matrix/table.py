"""docs/fault-matrix.md: the cells, what was measured in each, and what no cell covers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from tests.matrix.cells import CELLS, Cell, Cut, DiskFull, Fault, Hang, Kill, Refuse, Shape, Slow, Stop, Twin
from tests.matrix.record import played_digest
from tests.matrix.streams import Result

TEMPLATE = Path(__file__).with_name("page.md")
COLUMNS = ("fault", "hits", "while", "verdict", "longest pause", "lost / doubled / different", "streams (tokens)",
           "home again", "moved")  # fmt: skip


def page(results: Sequence[Result]) -> str:
    """Of each cell the last time that it was played; earlier failures of the same code are listed."""
    last = {result.cell: result for result in results}
    played = [last[cell.name] for cell in CELLS if cell.name in last]
    passed = sum(not result.problems for result in played)
    failures = [result for result in results if result.problems]
    loads = [result.load for result in played] or [0.0]
    minutes = sum(result.seconds for result in played) / 60
    text = [
        f"{len(CELLS)} cells, {len(played)} played, {passed} passed; in {minutes:.0f} minutes, without the starts of "
        f"clusters. Code {played_digest()}. Linux {os.uname().release}, {os.cpu_count()} cores, load average from "
        f"{min(loads):.0f} to {max(loads):.0f}.",
    ]
    for shape in Shape:
        text += [
            "",
            f"### {shape.capitalize()}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *(row(cell, last.get(cell.name)) for cell in CELLS if cell.shape is shape),
        ]
    if failures:
        text += ["", "What failed, the last time or before:", ""]
        text += [f"- {failed.cell}: {failed.problems[0].splitlines()[0]}" for failed in failures]
    return TEMPLATE.read_text().replace("RESULTS", "\n".join(text))


def row(cell: Cell, result: Result | None) -> str:
    fault, whom = words(cell.fault)
    start = f"| {fault} | {whom} | {cell.phase} "
    if result is None:
        return start + "| not played | | | | | |"
    tokens = f"{result.lost} / {result.duplicated} / {result.different}"
    verdict = "**FAILS**" if result.problems else "passes"
    return (
        f"{start}| {verdict} | {seconds(result.longest_pause_s)} | {tokens} "
        f"| {result.streams} ({result.tokens}) | {seconds(result.home_s)} | {', '.join(result.ended) or '-'} |"
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
        case Hang():
            return f"hung {fault.thread or 'event loop'}, {fault.hold_s:g} s", fault.whom
        case Twin():
            return f"a second process of its name, {fault.hold_s:g} s", fault.whom
        case Refuse():
            killed = f", kill -9 of {fault.kills}" if fault.kills else ""
            return f"{fault.why}{killed}, {fault.hold_s:g} s", fault.whom
        case _:
            assert_never(fault)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
