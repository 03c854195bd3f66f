"""A game day's report as one page of HTML: no script, nothing from elsewhere (pure)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape

from controlplane.kfadmin.chaos.report import FaultReport, Report

WIDTH, ROW, LEFT = 1000, 18, 150  # of the chart, in its own units
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
.good { color: #18794e; } .bad { color: #cd2b31; font-weight: 600; }
@media (prefers-color-scheme: dark) { .good { color: #3dd68c; } .bad { color: #ff9592; } }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
"""


def page(report: Report) -> str:
    """The whole document."""
    verdict = '<strong class="good">PASSED</strong>'
    if not report.ok:
        verdict = f'<strong class="bad">FAILED: {_t(report.why)}</strong>'
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(report.began_unix_s))
    facts = [
        f"{len(report.streams)} streams of {report.tokens} tokens were compared with undisturbed runs, "
        f"{report.different} differ",
        f"the longest pause while nothing was broken was {_s(report.calm_pause_max_s)}",
        f"at most {report.plan.max_unavailable} unavailable, pauses of at most {report.plan.pause_max_s:g} s, "
        f"{report.plan.streams} streams at a time, seed {report.plan.seed}",
    ]
    faults = (
        (
            str(f.number), f.kind, f.target, _s(f.began_s), _s(f.lasted_s), _s(f.home_s), str(f.streams),
            _s(f.pause_median_s), _s(f.pause_max_s), ", ".join(f"{k} {_s(v)}" for k, v in f.phases.items()),
            f"{f.outcome} {f.said}".strip(),
        )
        for f in report.faults
    )  # fmt: skip
    streams = (
        (
            str(o.number), str(o.seed), _s(o.began_s), _s(o.lasted_s), str(o.tokens), _s(o.pause_max_s), str(o.resumes),
            "equal" if o.equal and not o.error else o.error or "different",
        )
        for o in report.streams
    )  # fmt: skip
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Game day of {_t(report.cluster)}</title>',
            f"<style>{STYLE}</style><h1>Game day of {_t(report.cluster)}</h1>",
            f"<p>{_t(report.model)}, {began} UTC, {report.lasted_s:.0f} s: {verdict}</p>",
            "<ul>" + "".join(f"<li>{_t(fact)}</li>" for fact in facts) + "</ul>",
            "<h2>Faults</h2>",
            _chart(report),
            _table(
                "Fault|Kind|Target|Began|Lasted|Home after|Streams|Median pause|Longest pause|Phases|Outcome",
                faults,
            ),
            "<h2>Streams</h2>",
            _table("Stream|Seed|Began|Took|Tokens|Longest pause|Resumes|Against its reference", streams),
            "</html>",
        ]
    )


def _table(headers: str, rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in headers.split("|"))
    body = "".join("<tr>" + "".join(f"<td>{_t(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _chart(report: Report) -> str:
    """Each fault as a bar over the time of the day: dark until it was undone, light until all was home."""
    begun = [fault for fault in report.faults if fault.began_s is not None]
    scale = (WIDTH - LEFT) / max(report.lasted_s, 1.0)
    bars = "".join(_bar(row, fault, scale) for row, fault in enumerate(begun))
    height = ROW * max(1, len(begun))
    label = f"{len(begun)} faults over {report.lasted_s:.0f} seconds; the table below has the same"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{bars}</svg>'


def _bar(row: int, fault: FaultReport, scale: float) -> str:
    x, y = LEFT + (fault.began_s or 0.0) * scale, row * ROW
    undone = max(2.0, (fault.lasted_s or 0.0) * scale)
    home = max(undone, (fault.home_s or 0.0) * scale)
    return (
        f'<text x="0" y="{y + 12}">{_t(fault.kind)} {_t(fault.target)}</text>'
        f'<rect x="{x:.1f}" y="{y + 3}" width="{home:.1f}" height="{ROW - 7}" fill="#f5a623" opacity=".45"/>'
        f'<rect x="{x:.1f}" y="{y + 3}" width="{undone:.1f}" height="{ROW - 7}" fill="#cd2b31"/>'
    )


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"


def _t(text: str) -> str:
    return escape(text, quote=True)
