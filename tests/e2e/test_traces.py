"""A trace through gateway, scheduler and stages of real processes, while a node dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from controlplane.contract.config import GatewayConfig
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.web.gateway.test_tracing import Collector, told

PROMPTS = sample_prompts(4, 200)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()


def decodes(collector: Collector) -> list[Any]:
    """Spans of schedulers whose stream and its reference are over, and whose gateway has told of it, too."""
    roots = {span.trace_id for span in collector.spans if span.name.startswith("text_completion")}
    return [
        span for span in collector.spans if span.trace_id in roots and is_nodes(collector, span, "decode")
    ]


def is_nodes(collector: Collector, span: Any, name: str) -> bool:
    return span.name == name and collector.services[span.span_id] == "kevlarflow-node"


@pytest.mark.usefixtures("etcd_binary")
def test_a_stream_that_outlives_a_node_is_one_trace(collector: Collector) -> None:
    with Cluster(
        instances=2, stages=2, controllers=1, gateway=GatewayConfig(otlp_endpoint=collector.url)
    ) as cluster:

        async def kill(streams: list[Stream]) -> None:
            await until(lambda: all(len(stream.tokens) > 10 for stream in streams), "tokens flow")
            cluster.local.kill("n1")

        streams = asyncio.run(while_streaming(cluster, PROMPTS, kill))
        asyncio.run(cluster.expect_equal(streams))
        asyncio.run(
            until(
                lambda: len(decodes(collector)) >= len(PROMPTS) + len(set(PROMPTS)),
                "every stream's spans have come",
            )
        )
    roots = [span for span in collector.spans if span.name.startswith("text_completion")]
    assert len(roots) >= len(PROMPTS)
    paused = whole = 0
    for root in roots:
        below = [span for span in collector.spans if span.trace_id == root.trace_id and span is not root]
        assert {span.parent_span_id for span in below} == {root.span_id}
        assert len(below) < 40  # none is of a token
        nodes = [span for span in below if collector.services[span.span_id] == "kevlarflow-node"]
        assert {"queue", "prefill", "decode", "prefill step"} <= {span.name for span in nodes}
        steps = [told(span) for span in nodes if span.name == "prefill step"]
        stages = {step["kevlarflow.stage"] for step in steps}
        assert 0 in stages  # what n1 had not sent yet went with it
        whole += stages == {0, 1}
        assert all(step["gen_ai.request.model"] == cluster.local.config.model_name for step in steps)
        (decode,) = (span for span in nodes if span.name == "decode")
        assert told(decode)["gen_ai.usage.output_tokens"] > 0
        for pause in (span for span in nodes if span.name == "pause"):
            if "n1 -> " in told(pause)["kevlarflow.cause"]:
                paused += 1
                assert decode.start_time_unix_nano <= pause.start_time_unix_nano
                assert pause.end_time_unix_nano <= decode.end_time_unix_nano
    assert whole > 0
    assert paused > 0
