"""Traces of requests as a collector receives them over HTTP."""

from __future__ import annotations

import asyncio
import builtins
import gzip
import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest

from controlplane.contract.errors import ConfigError
from controlplane.contract.lives import Life, Pause, Place
from controlplane.contract.trace_context import root_span
from tests.web.gateway.stack import Events, running, stream
from web.gateway.tracing import Tracer

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CAUSE = "failure of p0, epoch 4 -> 5: stage 1: n1 -> n3"
LIFE = Life(
    "abc", "g1", "chat", "alice", "m", True, False, 1, 7, 1.7e9, 0.25, 0.5, 3.0, 64, 200, "length",
    (Place(0.25, 0, "p0", "n0", 4),), (Pause(2.0, 0.5, 0, "continued", "p0", 5, CAUSE),), 0, 0.5,
)  # fmt: skip


class Collector:
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        pytest.importorskip("opentelemetry.sdk")
        service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: list[Any] = []
        self.services: dict[bytes, str] = {}  # by span: the kind of process that sent it
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                request = service.ExportTraceServiceRequest.FromString(body)
                assert self.path == "/v1/traces"
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        name = told(resource.resource)["service.name"]
                        collector.services.update((span.span_id, name) for span in scope.spans)
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def named(self, name: str) -> Any:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()


def told(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_life_becomes_spans(collector: Collector) -> None:
    tracer = Tracer(collector.url, "g1", "1.0")
    tracer.put(LIFE)
    tracer.close()
    root, pause = collector.named("chat m"), collector.named("pause")
    assert root.trace_id == hashlib.sha256(b"abc").digest()[:16]
    assert (root.parent_span_id, root.start_time_unix_nano) == (b"", 1_700_000_000_000_000_000)
    assert root.end_time_unix_nano - root.start_time_unix_nano == 3_000_000_000
    found = told(root)
    assert found["gen_ai.operation.name"] == "chat"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (7, 64)
    assert found["kevlarflow.key"] == "alice"
    assert [event.name for event in root.events] == ["sent"]
    assert {span.name for span in collector.spans} == {
        "chat m", "wait at the gateway", "queue and prefill", "decode", "pause",
    }  # fmt: skip
    assert {span.trace_id for span in collector.spans} == {root.trace_id}
    assert {span.parent_span_id for span in collector.spans} == {b"", root.span_id}
    assert root.span_id.hex() == root_span("abc", "g1", 1.7e9)  # schedulers know it before it is made
    assert told(pause)["kevlarflow.cause"] == CAUSE
    assert told(pause)["kevlarflow.epoch"] == 5
    assert (pause.start_time_unix_nano, pause.end_time_unix_nano) == (
        1_700_000_001_500_000_000, 1_700_000_002_000_000_000,
    )  # fmt: skip


def test_a_real_stream_belongs_to_its_clients_trace(collector: Collector) -> None:
    tracer = Tracer(collector.url, "g1", "1.0")

    async def run() -> None:
        async with running(2) as stack, stack.http() as client, asyncio.timeout(20):
            stack.dispatcher.lives.listeners.append(tracer.put)
            client.headers["traceparent"] = CLIENT
            events = await stream(client, {"prompt": [400, 401], "seed": 1, "max_tokens": 8}, into=Events())
            assert events.done
            client.headers["traceparent"] = "junk"
            assert (
                await client.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
            ).status_code == 400

    asyncio.run(run())
    tracer.close()
    (root,) = [span for span in collector.spans if span.name.startswith("text_completion")]
    assert root.trace_id.hex() == CLIENT.split("-")[1]
    assert root.parent_span_id.hex() == CLIENT.split("-")[2]
    assert told(root)["gen_ai.usage.output_tokens"] == 8


def test_failures_have_their_status(collector: Collector) -> None:
    tracer = Tracer(collector.url, "g1", "1.0")
    tracer.put(msgspec.structs.replace(LIFE, status=503, end="no pipeline serves"))
    tracer.close()
    root = collector.named("chat m")
    assert (root.status.code, root.status.message) == (2, "no pipeline serves")
    assert told(root)["error.type"] == "503"


def test_a_collector_that_is_away_costs_nothing_but_spans() -> None:
    pytest.importorskip("opentelemetry.sdk")
    tracer = Tracer("http://127.0.0.1:1", "g1", "1.0")
    for _ in range(3):
        tracer.put(LIFE)
    began = time.monotonic()
    tracer.close()
    assert time.monotonic() - began < 10  # and not as long as its exporter would try


def test_without_the_packages_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="kevlarflow\\[otel\\]"):
        Tracer("http://127.0.0.1:4318", "g1", "1.0")
