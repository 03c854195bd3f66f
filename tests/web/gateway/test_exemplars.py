"""Exemplars: from a latency in a histogram to the trace of a request that had it, for who scrapes OpenMetrics."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from controlplane.contract.trace_context import context_of, root_span
from tests.web.gateway.stack import Events, running, stream
from tests.web.gateway.test_tracing import CLIENT
from web.gateway.metrics import LATENCIES_S, Metrics, accepts_openmetrics

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
TRACE = CLIENT.split("-")[1]
LATENCIES = ("time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds")


def exemplars(text: str, name: str) -> list[Any]:
    (family,) = [one for one in openmetrics(text) if one.name == f"kevlarflow_{name}"]
    assert family.type == "histogram"
    return [sample.exemplar for sample in family.samples if sample.exemplar is not None]


async def scraped(traceparent: str, traces: bool, accept: str) -> tuple[str, str, str]:
    """(content type, text, id of the request) after one stream."""
    async with running(2) as stack, stack.http() as client, asyncio.timeout(20):
        stack.dispatcher.lives.traces = traces
        if traceparent:
            client.headers["traceparent"] = traceparent
        events = await stream(client, {"prompt": [400, 401], "seed": 1, "max_tokens": 8}, into=Events())
        assert events.done
        (life,) = stack.dispatcher.lives._ended.values()
        answer = await client.get("/metrics", headers={"accept": accept})
        return answer.headers["content-type"], answer.text, life.request


@pytest.mark.parametrize(
    ("traceparent", "traces", "found"),
    [
        (CLIENT, False, TRACE),  # its client keeps the trace
        (CLIENT, True, TRACE),
        (CLIENT[:-2] + "00", True, None),  # nobody keeps it
        ("", True, "of the request"),  # this gateway does
        ("junk", False, None),
        ("", False, None),
    ],
)
def test_latencies_lead_to_traces_that_somebody_keeps(
    traceparent: str, traces: bool, found: str | None
) -> None:
    kind, text, request = asyncio.run(scraped(traceparent, traces, PROMETHEUS))
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    wanted = context_of(request, "").trace if found == "of the request" else found
    for name in LATENCIES:
        told = exemplars(text, name)
        assert {one.labels["trace_id"] for one in told} == ({wanted} if wanted else set()), name
        assert all(0 <= one.value < 20 for one in told)


def test_other_scrapers_get_the_text_that_they_know() -> None:
    for accept in ("", "*/*", "text/plain", "application/openmetrics-text;q=0, text/plain"):
        kind, text, _ = asyncio.run(scraped(CLIENT, True, accept))
        assert kind.startswith("text/plain")
        assert TRACE not in text
        names = {family.name for family in plain(text)}
        assert {f"kevlarflow_{name}" for name in LATENCIES} <= names


def test_who_asks_for_openmetrics() -> None:
    assert accepts_openmetrics(PROMETHEUS)
    assert accepts_openmetrics("text/plain, Application/OpenMetrics-Text ; version = junk")
    for other in ("", "*/*", "application/openmetrics-text; q=0.000", ";;,,", "application/openmetrics"):
        assert not accepts_openmetrics(other)


def test_each_bucket_has_its_last_exemplar_and_the_count_that_it_had() -> None:
    metrics = Metrics()
    metrics.tokens.waited(0.03)
    for trace, waited_s in (("a" * 32, 0.031), ("b" * 32, 0.032), ("c" * 32, 1000.0)):
        metrics.tokens.waited(waited_s, {"trace_id": trace})
    metrics.failover_gap.labels("continued").observe(0.4, {"trace_id": "d" * 32})
    text, _ = metrics.render(PROMETHEUS)
    told = exemplars(text.decode(), LATENCIES[2])
    assert [(one.labels["trace_id"][0], one.value) for one in told] == [("b", 0.032), ("c", 1000.0)]
    assert [one.labels["trace_id"] for one in exemplars(text.decode(), "failover_gap_seconds")] == ["d" * 32]
    waits = metrics.tokens.waits()
    assert sum(waits.counts) == 4
    assert waits.bounds_s == LATENCIES_S


def test_a_trace_is_the_clients_or_follows_from_the_request() -> None:
    ours = context_of("abc", "")
    assert (ours.parent, ours.sampled) == ("", True)
    assert context_of("abc", CLIENT[:-2] + "00").sampled is False
    for junk in (
        CLIENT.upper(),
        CLIENT + "-x",
        "00-" + "0" * 32 + CLIENT[35:],
        CLIENT[:36] + "0" * 16 + "-01",
    ):
        assert context_of("abc", junk) == ours, junk
    assert context_of("abc", CLIENT).below("1" * 16) == f"00-{TRACE}-{'1' * 16}-01"
    assert root_span("abc", "g1", 1.5) != root_span("abc", "g2", 1.5)
