"""From counters to rows of figures: differences within one process, quantiles, and what nobody measured."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.contract.figures import GatewayReport, Histogram
from controlplane.contract.status import ClusterStatus, NodeState, NodeStatus, PipelineState, PipelineStatus
from controlplane.contract.topology import Mode
from controlplane.core.figures import GATEWAYS_MAX, HITS, QUERIES, SILENT_S, Meter, quantiles

BOUNDS = (0.01, 0.1, 1.0)


def histogram(*counts: int) -> Histogram:
    return Histogram(BOUNDS, counts)


def report(
    tokens: int, age_s: float, gateway: str = "g1", incarnation: str = "a", waits: int = 0
) -> GatewayReport:
    return GatewayReport(
        gateway, incarnation, age_s, tokens, histogram(0, waits, 0, 0), histogram(waits, 0, 0, 0)
    )


def node(name: str, queries: int = 0, hits: int = 0, incarnation: str = "a") -> NodeStatus:
    return NodeStatus(
        name, NodeState.GREEN, incarnation, pid=1, blocks_used=10, blocks_replica=5, blocks_total=100,
        counters={QUERIES: queries, HITS: hits},
    )  # fmt: skip


def status(*nodes: NodeStatus) -> ClusterStatus:
    pipelines = tuple(PipelineStatus(f"p{k}", PipelineState.UP, 1, (), 3 + k, k) for k in range(2))
    return ClusterStatus(
        "c", "default", "m", Mode.REPLICATE, True, 1, False, "c1", "c1", 0.0, nodes, pipelines, (), (), ()
    )


def test_sums_over_the_cluster() -> None:
    row = Meter().figures(status(node("n0"), replace(node("n1"), pid=0)), 5.0, 1.0)
    assert (row.unix_s, row.running, row.waiting) == (5.0, 7, 1)
    assert (row.blocks_used, row.blocks_replica, row.blocks_total) == (
        20,
        10,
        100,
    )  # a node that is gone has none
    assert row.tokens_per_s is None
    assert row.cache_hit_ratio is None
    assert row.first_token_p50_s is row.inter_token_p99_s is None


def test_rates_are_over_the_senders_time_and_within_one_process() -> None:
    meter = Meter()
    assert meter.heard(report(1000, 60.0), 0.0) == ""
    assert meter.figures(status(), 0.0, 1.0).tokens_per_s is None  # since when is not known
    meter.heard(report(1400, 64.0, waits=10), 4.0)
    meter.heard(report(70, 8.0, "g2"), 4.0)
    row = meter.figures(status(), 5.0, 5.0)
    assert row.tokens_per_s == 100.0
    assert row.first_token_p50_s == pytest.approx(0.055)
    assert row.inter_token_p99_s == pytest.approx(0.0099)
    meter.heard(report(90, 10.0, "g2"), 6.0)
    meter.heard(report(5, 1.0, incarnation="b"), 6.0)  # the other one was started anew
    assert meter.figures(status(), 10.0, 10.0).tokens_per_s == 10.0
    # Nothing was said since: that is no rate, and not one of zero.
    assert meter.figures(status(), 15.0, 15.0).tokens_per_s is None
    meter.heard(report(105, 20.0, incarnation="b"), 16.0)
    assert meter.figures(status(), 20.0, 20.0).tokens_per_s == pytest.approx(100 / 19, abs=0.1)


def test_a_gateway_that_is_gone_is_forgotten() -> None:
    meter = Meter()
    meter.heard(report(0, 1.0), 0.0)
    meter.figures(status(), 0.0, 0.0)
    meter.heard(report(10, 2.0), 1.0)
    assert meter.figures(status(), 0.0, SILENT_S + 2.0).tokens_per_s is None
    for k in range(GATEWAYS_MAX):
        assert meter.heard(report(0, 1.0, f"h{k}"), 100.0) == ""
    assert "gateways report" in meter.heard(report(0, 1.0, "one more"), 100.0)


def test_a_histogram_that_is_none_is_refused() -> None:
    for bad in (Histogram((), (1,)), Histogram((1.0,), (1,)), Histogram((1.0,) * 64, (1,) * 65)):
        assert Meter().heard(GatewayReport("g", "a", 1.0, 0, bad, histogram(0, 0, 0, 0)), 0.0) != ""


def test_histograms_of_another_release_are_left_out() -> None:
    meter = Meter()
    other = Histogram((5.0,), (0, 0))
    for age_s, tokens in ((1.0, 0), (2.0, 10)):
        meter.heard(replace(report(tokens, age_s, waits=tokens), gateway="g1"), 0.0)
        meter.heard(GatewayReport("g2", "a", age_s, tokens, other, other), 0.0)
        row = meter.figures(status(), 0.0, 0.0)
    assert row.tokens_per_s == 20.0
    assert row.first_token_p50_s == pytest.approx(0.055)


def test_cache_hits_are_differences_within_one_process() -> None:
    meter = Meter()
    meter.figures(status(node("n0", 100, 10), node("n4", 50, 0)), 0.0, 0.0)
    row = meter.figures(status(node("n0", 180, 70), node("n4", 70, 0)), 0.0, 5.0)
    assert row.cache_hit_ratio == 0.6
    # One without counters in its last report keeps what was known; one that was started anew begins anew.
    bare = replace(node("n0"), counters={})
    assert meter.figures(status(bare, node("n4", 5, 5, "b")), 0.0, 10.0).cache_hit_ratio is None
    row = meter.figures(status(node("n0", 190, 75), node("n4", 15, 5, "b")), 0.0, 15.0)
    assert row.cache_hit_ratio == 0.25


def test_quantiles() -> None:
    assert quantiles(None) == (None, None)
    assert quantiles(histogram(0, 0, 0, 0)) == (None, None)
    assert quantiles(histogram(100, 0, 0, 0)) == (0.005, 0.0099)
    assert quantiles(histogram(0, 100, 0, 0))[0] == pytest.approx(0.055)
    assert quantiles(histogram(98, 0, 2, 0)) == (pytest.approx(0.005102), pytest.approx(0.55))
    assert quantiles(histogram(0, 0, 0, 7)) == (1.0, 1.0)  # beyond the last bound: that bound
