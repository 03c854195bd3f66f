"""Traces of requests for OpenTelemetry, made from their lives when they have ended. Off unless an endpoint is named.

One span for each connection of a client, by the conventions for generative AI, and below it: waiting here, queueing and
prefill at the scheduler, decoding, and every pause with its cause. A thread of the exporter sends them; what it cannot
send is dropped.
"""

from __future__ import annotations

import hashlib
import re
import threading
from typing import Any

from controlplane.contract.errors import ConfigError
from controlplane.contract.lives import Life

OPERATIONS = {"completion": "text_completion", "chat": "chat", "responses": "chat"}
PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
QUEUE_SPANS = 2048  # that wait for the exporter; more are dropped
SEND_LIMIT_S = 5
CLOSE_LIMIT_S = 1.0


class Tracer:
    """Belongs to one event loop; the exporter's thread is its own."""

    def __init__(self, endpoint: str, gateway: str, version: str) -> None:
        """`endpoint`: "http://HOST:4318", of a collector that speaks OTLP over HTTP. Raises ConfigError."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"gateway.otlp_endpoint needs the extra otel: pip install 'kevlarflow[otel]' ({error})"
            ) from error
        self._trace: Any = trace
        resource = Resource.create(
            {"service.name": "kevlarflow-gateway", "service.instance.id": gateway, "service.version": version}
        )
        self._ids = _ids()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_LIMIT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS))
        self._tracer = self._provider.get_tracer("kevlarflow")

    def put(self, life: Life) -> None:
        """Of a request that has ended; one that never began has no span."""
        if life.lasted_s is None or not life.choices:
            return
        trace = self._trace
        error = life.status >= 500
        operation = OPERATIONS.get(life.kind, life.kind)
        root = self._tracer.start_span(
            f"{operation} {life.model}",
            context=self._parent(life),
            kind=trace.SpanKind.SERVER,
            attributes=attributes(life, operation),
            start_time=_ns(life.began_unix_s),
        )
        if error:
            root.set_status(trace.StatusCode.ERROR, life.end)
        inside = trace.set_span_in_context(root)

        def child(name: str, began_s: float, ended_s: float, told: dict[str, Any]) -> None:
            start, end = (_ns(life.began_unix_s + at_s) for at_s in (began_s, max(began_s, ended_s)))
            self._tracer.start_span(name, inside, attributes=told, start_time=start).end(end)

        sent_s = life.sent_s if life.sent_s is not None else life.lasted_s
        child("wait at the gateway", 0.0, sent_s, {})
        for place in life.places:
            told = {
                "choice": place.choice,
                "pipeline": place.pipeline,
                "node": place.node,
                "epoch": place.epoch,
            }
            root.add_event("sent", _named(told), _ns(life.began_unix_s + place.at_s))
        if life.first_token_s is not None:
            child("queue and prefill", sent_s, life.first_token_s, {})
            child("decode", life.first_token_s, life.lasted_s, {"gen_ai.usage.output_tokens": life.tokens})
        for pause in life.pauses:
            told = {
                "choice": pause.choice, "how": pause.how, "pipeline": pause.pipeline, "epoch": pause.epoch,
                "cause": pause.cause,
            }  # fmt: skip
            child("pause", pause.at_s - pause.lasted_s, pause.at_s, _named(told))
        root.end(_ns(life.began_unix_s + life.lasted_s))

    def close(self) -> None:
        """Send what waits, within `CLOSE_LIMIT_S`: a collector that is away does not keep a process from its end."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        sending.start()
        sending.join(CLOSE_LIMIT_S)

    def _parent(self, life: Life) -> Any:
        """The client's span, if it named one; else the request's id decides the trace: a stream that goes on elsewhere
        stays in it."""
        trace = self._trace
        self._ids.trace_id = int.from_bytes(hashlib.sha256(life.request.encode()).digest()[:16], "big")
        found = PARENT.fullmatch(life.trace)
        if found is None:
            return trace.set_span_in_context(trace.INVALID_SPAN)
        flags = trace.TraceFlags(int(found[3], 16))
        of_client = trace.SpanContext(int(found[1], 16), int(found[2], 16), True, flags)
        return trace.set_span_in_context(trace.NonRecordingSpan(of_client))


def attributes(life: Life, operation: str) -> dict[str, Any]:
    """Of the whole request. Never a prompt."""
    finished = [word for word in life.end.split(", ") if word] if life.status == 200 else []
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "kevlarflow",
        "gen_ai.request.model": life.model,
        "gen_ai.response.model": life.model,
        "gen_ai.response.id": life.request,
        "gen_ai.request.choice.count": life.choices,
        "gen_ai.usage.input_tokens": life.prompt_tokens,
        "gen_ai.usage.output_tokens": life.tokens,
        "gen_ai.response.finish_reasons": finished,
        "http.response.status_code": life.status,
    }
    if life.status >= 400:
        found["error.type"] = str(life.status)
    told = {"key": life.key, "stream": life.stream, "resumed": life.resumed, "pauses": len(life.pauses)}
    return found | _named(told)


def _named(told: dict[str, Any]) -> dict[str, Any]:
    return {f"kevlarflow.{name}": value for name, value in told.items()}


def _ns(unix_s: float) -> int:
    return int(unix_s * 1e9)


def _ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Spans at random, the trace as it was set."""

        trace_id = 0

        def generate_trace_id(self) -> int:
            return self.trace_id or super().generate_trace_id()

    return Ids()
