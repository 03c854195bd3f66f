"""Traces of requests for OpenTelemetry, made from their lives when they have ended. Off unless an endpoint is named.

One span for each connection of a client, by the conventions for generative AI, and below it: waiting here, queueing and
prefill at the scheduler, decoding, and every pause with its cause. Schedulers and stages put theirs below the same one,
whose id they are told before it is made (dataplane/tracing.py).
"""

from __future__ import annotations

from typing import Any

from controlplane.contract.lives import Life
from controlplane.contract.otlp import Otlp, ns
from controlplane.contract.trace_context import context_of, root_span

OPERATIONS = {"completion": "text_completion", "chat": "chat", "responses": "chat"}


class Tracer:
    """Belongs to one event loop; the exporter's thread is its own."""

    def __init__(self, endpoint: str, gateway: str, version: str) -> None:
        """Raises ConfigError."""
        self._otlp = Otlp(endpoint, "kevlarflow-gateway", gateway, version, _ids)
        self._ids = self._otlp.ids
        self._trace, self._tracer = self._otlp.trace, self._otlp.tracer

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
            start_time=ns(life.began_unix_s),
        )
        if error:
            root.set_status(trace.StatusCode.ERROR, life.end)
        inside = trace.set_span_in_context(root)

        def child(name: str, began_s: float, ended_s: float, told: dict[str, Any]) -> None:
            start, end = (ns(life.began_unix_s + at_s) for at_s in (began_s, max(began_s, ended_s)))
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
            root.add_event("sent", _named(told), ns(life.began_unix_s + place.at_s))
        if life.first_token_s is not None:
            child("queue and prefill", sent_s, life.first_token_s, {})
            child("decode", life.first_token_s, life.lasted_s, {"gen_ai.usage.output_tokens": life.tokens})
        for pause in life.pauses:
            told = {
                "choice": pause.choice, "how": pause.how, "pipeline": pause.pipeline, "epoch": pause.epoch,
                "cause": pause.cause,
            }  # fmt: skip
            child("pause", pause.at_s - pause.lasted_s, pause.at_s, _named(told))
        root.end(ns(life.began_unix_s + life.lasted_s))

    def close(self) -> None:
        """Send what waits, for a moment."""
        self._otlp.close()

    def _parent(self, life: Life) -> Any:
        """The client's span, if it named one."""
        trace, context = self._trace, context_of(life.request, life.trace)
        self._ids.trace_id = int(context.trace, 16)
        self._ids.next_span_id = int(root_span(life.request, life.gateway, life.began_unix_s), 16)
        if not context.parent:
            return trace.set_span_in_context(trace.INVALID_SPAN)
        return self._otlp.below(context.trace, context.parent, context.sampled)


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


def _ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Spans at random but for the next one, the trace as it was set."""

        trace_id = 0
        next_span_id = 0

        def generate_span_id(self) -> int:
            given, self.next_span_id = self.next_span_id, 0
            return given or super().generate_span_id()

        def generate_trace_id(self) -> int:
            return self.trace_id or super().generate_trace_id()

    return Ids()
