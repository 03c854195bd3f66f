"""What a dashboard is sent: a change that somebody acts on at once, figures now and then, the whole when it must be."""

from __future__ import annotations

import json

from msgspec.structs import replace

from controlplane.contract.status import ClusterStatus, NodeState
from tests.web.admin_service import healthy
from web.admin.difference import changed, difference, shown


def with_node(status: ClusterStatus, index: int, **changes: object) -> ClusterStatus:
    nodes = list(status.nodes)
    nodes[index] = replace(nodes[index], **changes)
    return replace(status, nodes=tuple(nodes))


def told(
    before: ClusterStatus, after: ClusterStatus, figures: bool = False
) -> dict[str, list[dict[str, object]]]:
    found = difference(before, after, figures)
    assert found is not None
    return json.loads(changed(before, found, 8))


def test_a_state_is_told_at_once_and_figures_wait() -> None:
    before = shown(healthy())
    assert told(before, before) == {"from": 7, "to": 8, "fields": {}, "nodes": [], "pipelines": []}
    busier = shown(with_node(healthy(), 3, blocks_used=411, silent_s=2.5))
    assert told(before, busier)["nodes"] == []
    assert [n["blocks_used"] for n in told(before, busier, figures=True)["nodes"]] == [411]
    dead = shown(with_node(healthy(), 3, state=NodeState.RED, blocks_used=411))
    assert [(n["node"], n["state"]) for n in told(before, dead)["nodes"]] == [("n3", "red")]


def test_counters_and_short_silences_are_nobodys_news() -> None:
    before = shown(healthy())
    after = shown(with_node(healthy(), 3, counters={"tokens": 101}, progress=1235, silent_s=0.7))
    assert told(before, after, figures=True)["nodes"] == []


def test_a_lost_rank_is_news() -> None:
    before = shown(healthy())
    after = shown(with_node(healthy(), 3, counters={"tokens": 101, "ranks_lost": 2}))
    assert [n["counters"] for n in told(before, after)["nodes"]] == [{"ranks_lost": 2}]


def test_a_pipeline_that_loses_its_protection_is_news_and_a_lag_is_a_figure() -> None:
    status = shown(healthy())
    p0 = status.pipelines[0]

    def lagging(tokens: int) -> ClusterStatus:
        stages = (replace(p0.stages[0], lag_tokens=tokens), *p0.stages[1:])
        return replace(status, pipelines=(replace(p0, stages=stages), *status.pipelines[1:]))

    assert told(status, lagging(48))["pipelines"] == []
    assert [p["id"] for p in told(status, lagging(48), figures=True)["pipelines"]] == ["p0"]
    assert [p["id"] for p in told(status, lagging(-1))["pipelines"]] == ["p0"]


def test_another_set_of_nodes_is_sent_whole() -> None:
    status = shown(healthy())
    assert difference(status, replace(status, nodes=status.nodes[1:]), figures=False) is None
    assert difference(status, replace(status, pipelines=status.pipelines[1:]), figures=False) is None


def test_what_has_not_changed_is_not_looked_at_again() -> None:
    first = healthy()
    seen = first, shown(first)
    second = with_node(first, 3, blocks_used=411)
    after = shown(second, seen)
    assert after == shown(second)
    assert [i for i, (a, b) in enumerate(zip(seen[1].nodes, after.nodes, strict=True)) if a is not b] == [3]
