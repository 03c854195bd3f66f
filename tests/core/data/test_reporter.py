"""When a node says more than that its last report still holds."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.reports import LinkReport, NodeReport, PipelineReport
from dataplane.reporter import FULL_BEATS, FULL_IDLE_BEATS, Reporter

ME, PEER = Member("n0", "a"), Member("n1", "b")
TOLD = NodeReport(ME, 1, 0.0, 7, pipelines=(PipelineReport("p0", 3, 0, 5),), overdue_s=4.0)


def is_news(beats: int = 0, hurried: bool = False, **now: Any) -> bool:
    reporter = Reporter("token", 0.1, lambda seq, sent: (TOLD, sent), lambda: hurried)
    return reporter._is_news(replace(TOLD, **now), TOLD, beats)


def test_a_node_at_rest_beats() -> None:
    assert [is_news(beats) for beats in range(FULL_IDLE_BEATS)] == [False] * (FULL_IDLE_BEATS - 1) + [True]
    computing = [is_news(beats, progress=8) for beats in range(FULL_BEATS)]
    assert computing == [False] * (FULL_BEATS - 1) + [True]


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
