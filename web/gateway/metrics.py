"""What a gateway knows, in Prometheus' terms: vLLM's names under our prefix, and our own."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from controlplane.contract import figures as contract
from web.gateway.access_log import AccessLog
from web.gateway.key_usage import KeyUsage
from web.gateway.routing.router import Router

PREFIX = "kevlarflow_"
OPENMETRICS = "application/openmetrics-text"
NOT_WANTED = re.compile(r"q\s*=\s*0(\.0*)?")
LATENCIES_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 4, 8, 15, 30, 60, 120, 300)
GAPS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)

# The router's count -> label of fenced_rejections_total, of requests_recovered_total.
FENCED = {
    "duplicate": "duplicate",
    "stale_epoch": "stale_epoch",
    "wrong_member": "wrong_member",
    "stale_refusal": "stale_refusal",
    "gap": "gap",
    "mismatch": "mismatch",
}
RECOVERED = ("resubmitted", "continued", "moved", "resumed")
# The router's count -> name of a metric of its own.
COUNTED = {
    "quarantined": ("quarantined_requests", "Requests that ended since they broke nodes or steps"),
    "asked_again": ("resubmits_for_missing_tokens", "Times that a scheduler was asked for tokens again"),
    "overtaken": ("readers_overtaken", "Connections that came after one that its scheduler knew as newer"),
}


Example = dict[str, str] | None  # of a histogram's value: labels that lead to its trace


def accepts_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics, as Prometheus' does, and does not rule it out."""
    for wanted in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in wanted.split(";"))
        if kind == OPENMETRICS and not any(NOT_WANTED.fullmatch(parameter) for parameter in parameters):
            return True
    return False


class Tokens(Collector):
    """What is counted for each token: with plain numbers, since a prometheus_client metric takes a lock each time."""

    def __init__(self) -> None:
        self.given = 0
        self._counts = [0] * (len(LATENCIES_S) + 1)  # of waits, by bucket; the last one is without bound
        self._examples: dict[int, tuple[dict[str, str], float]] = {}  # the last one of a bucket
        self._waited_s = 0.0

    def waited(self, seconds: float, example: Example = None) -> None:
        """Between two tokens of a stream."""
        bucket = bisect_left(LATENCIES_S, seconds)
        self._counts[bucket] += 1
        self._waited_s += seconds
        if example is not None:
            self._examples[bucket] = (example, seconds)

    def waits(self) -> contract.Histogram:
        return contract.Histogram(LATENCIES_S, tuple(self._counts))

    def collect(self) -> Iterable[Metric]:
        name = PREFIX + "inter_token_latency_seconds"
        bounds = map(floatToGoString, (*LATENCIES_S, math.inf))
        family = HistogramMetricFamily(name, "Between two tokens of a stream")
        counts = zip(bounds, accumulate(self._counts), strict=True)
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        for bucket, (bound, count) in enumerate(counts):
            exemplar = self._exemplar(bucket)
            buckets.append((bound, count) if exemplar is None else (bound, count, exemplar))
        family.add_metric([], buckets, self._waited_s)
        yield family
        yield CounterMetricFamily(PREFIX + "generation_tokens", "Tokens given to clients", self.given)

    def _exemplar(self, bucket: int) -> Exemplar | None:
        found = self._examples.get(bucket)
        return None if found is None else Exemplar(*found)


class Metrics:
    """One registry per gateway, so that several can live in one process (tests)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        self.ttft = histogram("time_to_first_token_seconds", "Request to first token", LATENCIES_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Request to its last token", LATENCIES_S)
        self.failover_gap = histogram(
            "failover_gap_seconds", "Longest wait of a stream around a failure or a switch", GAPS_S, ("how",)
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests")
        self.success = counter("request_success", "Choices that ended well", ("finished_reason",))
        self.errors = counter("request_errors", "Requests that ended with an error", ("status",))
        self.rejections = counter(
            "admission_rejections", "Requests refused for load or lack of service", ("reason",)
        )
        self.resumed = counter("streams_resumed", "Connections that took a request up again", ("how",))
        self.handed_over = counter("streams_handed_over", "Streams sent to another gateway at a stop")
        self.disconnects = counter("client_disconnects", "Clients that left before the end")
        self._routers: list[Router] = []
        self._past: Counts[str] = Counts()  # of routers that are no more
        self.tokens = Tokens()
        self.registry.register(self.tokens)

    def attach(self, router: Router, etcd_age_s: Callable[[], float]) -> None:
        """Export what the router counts by itself. The first one is the gateway's own group's."""
        self._routers.append(router)
        self.registry.register(_RouterCollector(self._routers, self._past, etcd_age_s))

    def add(self, router: Router) -> None:
        """Another group's: what both count is told as one sum."""
        self._routers.append(router)

    def remove(self, router: Router) -> None:
        self._routers.remove(router)
        self._past.update(router.counts)

    def attach_access_log(self, access: AccessLog) -> None:
        """Export what became of its lines."""
        self.registry.register(_AccessLogCollector(access))

    def attach_keys(self, usages: Callable[[], Sequence[KeyUsage]]) -> None:
        """Export what each API key uses."""
        self.registry.register(_KeyCollector(usages))

    def first_token(self) -> contract.Histogram:
        """Time to first token, as controllers are told of it."""
        samples = [sample for metric in self.ttft.collect() for sample in metric.samples]
        upto = [int(sample.value) for sample in samples if sample.name.endswith("_bucket")]
        counts = [after - before for before, after in zip([0, *upto], upto, strict=False)]
        return contract.Histogram(LATENCIES_S, tuple(counts))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The text and its content type. `accept`: of the scraper; only OpenMetrics has exemplars."""
        exact = accepts_openmetrics(accept)
        text: bytes = (openmetrics.generate_latest if exact else generate_latest)(self.registry)
        return text, openmetrics.CONTENT_TYPE_LATEST if exact else CONTENT_TYPE_LATEST


class _AccessLogCollector(Collector):
    def __init__(self, access: AccessLog) -> None:
        self._access = access

    def collect(self) -> Iterable[Metric]:
        access = self._access
        yield CounterMetricFamily(PREFIX + "access_log_lines", "Lines written", value=access.written)
        yield CounterMetricFamily(
            PREFIX + "access_log_dropped", "Lines lost: no room, no disk", value=access.dropped
        )


class _KeyCollector(Collector):
    def __init__(self, usages: Callable[[], Sequence[KeyUsage]]) -> None:
        self._usages = usages

    def collect(self) -> Iterable[Metric]:
        usages = self._usages()
        counted = {
            "key_requests": ("Requests by API key", "requests"),
            "key_rejections": ("Requests refused by an API key's own limits", "refused"),
            "key_prompt_tokens": ("Prompt tokens by API key", "prompt_tokens"),
            "key_generation_tokens": ("Tokens given by API key", "generation_tokens"),
        }
        for name, (text, field) in counted.items():
            sums: dict[str, int] = {}
            for usage in usages:  # a key that was revoked may have left its name to another
                sums[usage.name] = sums.get(usage.name, 0) + getattr(usage, field)
            family = CounterMetricFamily(PREFIX + name, text, labels=["key"])
            for key, total in sums.items():
                family.add_metric([key], total)
            yield family


class _RouterCollector(Collector):
    def __init__(self, routers: Sequence[Router], past: Counts[str], etcd_age_s: Callable[[], float]) -> None:
        self._routers = routers
        self._past = past
        self._etcd_age_s = etcd_age_s

    def collect(self) -> Iterable[Metric]:
        routers = self._routers
        topology = routers[0].topology
        counts = sum((router.counts for router in routers), self._past)
        gauges = {
            "gateway_requests_live": (
                "Requests of this gateway's clients that have not ended",
                sum(r.live for r in routers),
            ),
            "pipelines_up": (
                "Pipelines that serve, by the newest topology",
                sum(r.pipelines_up for r in routers),
            ),
            "pipelines_reachable": (
                "Those whose scheduler this gateway has a stream to",
                sum(r.reachable for r in routers),
            ),
            "topology_counter": (
                "Counter of the newest topology that this process has read",
                topology.counter if topology else 0,
            ),
            "etcd_watch_age_seconds": ("Since this process last heard etcd", self._etcd_age_s()),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        fenced = CounterMetricFamily(
            PREFIX + "fenced_rejections", "Deliveries that were dropped", labels=["kind"]
        )
        for count, label in FENCED.items():
            fenced.add_metric([label], counts[count])
        yield fenced
        recovered = CounterMetricFamily(PREFIX + "requests_recovered", "Streams that went on", labels=["how"])
        for how in RECOVERED:
            recovered.add_metric([how], counts[f"recovered_{how}"])
        yield recovered
        for name, (label, text) in COUNTED.items():
            yield CounterMetricFamily(PREFIX + label, text, value=counts[name])
