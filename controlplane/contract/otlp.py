"""Where traces go: a provider of OpenTelemetry's SDK that sends spans to a collector. Off unless an endpoint is named.

A thread of the exporter sends them; what it cannot send is dropped, and a process does not wait for it at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from controlplane.contract.errors import ConfigError

QUEUE_SPANS = 2048  # that wait for the exporter; more are dropped
SEND_LIMIT_S = 5
CLOSE_LIMIT_S = 1.0


class Otlp:
    def __init__(
        self,
        endpoint: str,
        service: str,
        instance: str,
        version: str,
        ids: Callable[[], Any] = lambda: None,
    ) -> None:
        """`endpoint`: "http://HOST:4318", of a collector that speaks OTLP over HTTP. `ids` gives who makes the ids;
        None: chance does. Raises ConfigError."""
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
        self.trace: Any = trace
        resource = Resource.create(
            {"service.name": service, "service.instance.id": instance, "service.version": version}
        )
        self.ids = ids()
        self._provider = TracerProvider(resource=resource, id_generator=self.ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_LIMIT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS))
        self.tracer: Any = self._provider.get_tracer("kevlarflow")

    def below(self, trace_id: str, span_id: str, sampled: bool) -> Any:
        """The context of what is done below a span of another process; ids in hexadecimal digits."""
        flags = self.trace.TraceFlags(int(sampled))
        parent = self.trace.SpanContext(int(trace_id, 16), int(span_id, 16), True, flags)
        return self.trace.set_span_in_context(self.trace.NonRecordingSpan(parent))

    def close(self) -> None:
        """Send what waits, within `CLOSE_LIMIT_S`: a collector that is away does not keep a process from its end."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        sending.start()
        sending.join(CLOSE_LIMIT_S)


def ns(unix_s: float) -> int:
    return int(unix_s * 1e9)
