"""When a node says more than that its last report still holds."""

from __future__ import annotations

from typing import Any, cast

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.reports import LinkReport, NodeReport, PipelineReport, ReportAck, report_every_s
from dataplane.reporter import Reporter, _Line

ME, PEER = Member("n0", "a"), Member("n1", "b")
TOLD = NodeReport(ME, 1, 0.0, 7, pipelines=(PipelineReport("p0", 3, 0, 5),), overdue_s=4.0)


def is_news(hurried: bool = False, **now: Any) -> bool:
    return reporter_of(hurried)._is_news(replace(TOLD, **now), TOLD)


def reporter_of(hurried: bool = False, *reports: NodeReport) -> Reporter:
    following = iter(reports)
    return Reporter("token", 0.1, lambda seq, sent: (next(following), sent), lambda: hurried)


def said(reports: list[NodeReport], every: int = 1, report_s: float = 0.0) -> str:
    """What a stream carries, a letter each heartbeat: a whole report, news, a beat, or nothing."""
    reporter, line = reporter_of(False, *reports), _Line("", cast(Any, None), news=False, every=every)
    reporter._heed(line, ReportAck(0, report_s=report_s))
    kinds = []
    for _ in reports:
        batch = reporter._next(line)
        kinds.append("." if batch is None else "b" if batch.beats else "r" if batch.calm else "N")
    return "".join(kinds)


def test_a_node_at_rest_beats() -> None:
    assert said([TOLD] * 21) == "N" + "bbbbbbbbbr" * 2
    computing = [replace(TOLD, progress=step) for step in range(11)]
    assert said(computing) == "N" + "bbbbr" * 2


def test_a_controller_of_many_is_told_more_rarely_that_nothing_is_new_and_news_at_once() -> None:
    assert said([TOLD] * 11, every=2) == "N" + ".b.b.b.b." + "r"
    computing = [replace(TOLD, progress=step) for step in range(31)]
    assert said(computing, report_s=1.5) == "N" + "bbbbbbbbbbbbbbr" * 2
    assert said([TOLD] * 16, report_s=1.5) == "N" + "bbbbbbbbbbbbbbr"
    assert said(computing[:6], report_s=0.2) == "Nbbbbr"
    poisoned = replace(TOLD, poisoned=1)
    assert said([TOLD] * 4 + [poisoned] * 5, every=3) == "N..b" + "N..b."


@pytest.mark.parametrize(
    ("nodes", "report_s"), [(8, 0.5), (500, 0.5), (501, 1.0), (1000, 1.0), (4000, 2.0), (50_000, 2.0)]
)
def test_a_controller_asks_for_a_thousand_whole_reports_a_second(nodes: int, report_s: float) -> None:
    assert report_every_s(nodes, heartbeat_s=0.1) == pytest.approx(report_s)


@pytest.mark.parametrize(
    "now",
    [
        {"leaving": True},
        {"poisoned": 1},
        {"busy_s": 0.4},
        {"overdue_s": 4.05},  # it hardly gets to run: found within two seconds only if each heartbeat says so
        {"pipelines": (PipelineReport("p0", 4, 0, 5),)},
        {"pipelines": (PipelineReport("p0", 3, 0, 5, stalled_s=0.4),)},
        {"links": (LinkReport(PEER, False, 0.0, "reset"),)},
        {"links": (LinkReport(PEER, True, 0.5),)},
    ],
)
def test_news_is_told_at_once(now: dict[str, Any]) -> None:
    assert is_news(**now)


def test_controllers_that_wait_are_told_each_time() -> None:
    assert is_news(hurried=True)
    assert not is_news(overdue_s=4.01, links=(LinkReport(PEER, True, 0.1),))


@pytest.mark.parametrize(("report_s", "every"), [(0.0, 20), (2.0, 80)])
def test_counters_go_with_few_reports_and_with_the_first_and_are_made_for_these_alone(
    report_s: float, every: int
) -> None:
    made: list[int] = []

    def counters() -> dict[str, int]:
        made.append(len(made))
        return {"x": made[-1]}

    news = iter([replace(TOLD, poisoned=number) for number in range(2 * every)])
    reporter = Reporter("token", 0.1, lambda seq, sent: (next(news, TOLD), sent), counters=counters)
    line = _Line("", cast(Any, None))
    reporter._heed(line, ReportAck(0, report_s=report_s))
    sent = [
        batch.reports[0][1].counters for _ in range(2 * every) if (batch := reporter._next(line)) is not None
    ]
    assert [(at, counters) for at, counters in enumerate(sent) if counters] == [
        (0, {"x": 0}),
        (every, {"x": 1}),
    ]
    for _ in range(every):  # mostly beats
        reporter._next(line)
    assert len(made) == 3


def test_a_controller_that_is_new_to_the_relay_is_told_counters_too() -> None:
    reporter = Reporter("token", 0.1, lambda seq, sent: (TOLD, sent), relay="r", counters=lambda: {"x": 1})
    line = _Line("")

    def counted() -> list[bool]:
        batches = [reporter._next(line) for _ in range(3)]
        return [bool(batch and batch.reports and batch.reports[0][1].counters) for batch in batches]

    assert counted() == [True, False, False]
    reporter._answered(line, ReportAck(1, heard_by=("c:1",)))
    assert counted() == [True, False, False]
    reporter._answered(line, ReportAck(1, heard_by=("c:1", "d:1")))
    assert counted() == [True, False, False]
