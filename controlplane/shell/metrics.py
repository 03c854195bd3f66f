"""The controller's Prometheus text, made from the status at the moment it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from controlplane.contract.status import ClusterStatus, NodeState
from controlplane.etcd.values import EtcdCounters
from controlplane.history.writer import HistoryWriter
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry
from controlplane.shell.rpc import ReportServer
from controlplane.shell.runtime import Runtime

Family = GaugeMetricFamily | CounterMetricFamily | SummaryMetricFamily
PREFIX = "kevlarflow_"
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


@dataclass(frozen=True, slots=True)
class Sources:
    """What is counted in this process."""

    inbox: Inbox
    registry: Registry
    reports: ReportServer
    runtime: Runtime
    performer: Performer
    history: HistoryWriter
    etcd: EtcdCounters


def render(status: ClusterStatus, me: str, sources: Sources) -> bytes:
    """Prometheus' text format."""
    families = [*_cluster(status), *_nodes(status), *_process(status, me, sources)]

    class Once(Collector):
        def collect(self) -> Iterator[Family]:
            return iter(families)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry)


def _cluster(status: ClusterStatus) -> Iterator[Family]:
    yield _gauge("topology_counter", "Counter of the newest topology", status.counter)
    yield _gauge("blemishes", "What is wrong in the topology", len(status.blemishes))
    yield _gauge("available", "1 while at least one pipeline serves", status.available)
    epoch = GaugeMetricFamily(PREFIX + "epoch", "Epoch of a pipeline", labels=["pipeline"])
    running = GaugeMetricFamily(PREFIX + "num_requests_running", "Requests in batches", labels=["pipeline"])
    waiting = GaugeMetricFamily(PREFIX + "num_requests_waiting", "Requests queued", labels=["pipeline"])
    state = GaugeMetricFamily(
        PREFIX + "pipeline_state", "1 for the state it is in", labels=["pipeline", "state"]
    )
    lag = GaugeMetricFamily(
        PREFIX + "replica_lag_tokens", "Of the slowest replica; -1: unprotected", labels=["pipeline", "stage"]
    )
    for pipeline in status.pipelines:
        epoch.add_metric([pipeline.id], pipeline.epoch)
        running.add_metric([pipeline.id], pipeline.running)
        waiting.add_metric([pipeline.id], pipeline.waiting)
        state.add_metric([pipeline.id, pipeline.state.value], 1)
        for index, stage in enumerate(pipeline.stages):
            lag.add_metric([pipeline.id, str(index)], stage.lag_tokens)
    yield from (epoch, running, waiting, state, lag)


def _nodes(status: ClusterStatus) -> Iterator[Family]:
    state = GaugeMetricFamily(PREFIX + "node_state", "1 for the state it is in", labels=["node", "state"])
    blocks = GaugeMetricFamily(PREFIX + "node_kv_blocks", "KV blocks by use", labels=["node", "use"])
    counters: dict[str, CounterMetricFamily] = {}
    for node in status.nodes:
        for each in NodeState:
            state.add_metric([node.node, each.value], float(node.state is each))
        blocks.add_metric([node.node, "own"], node.blocks_used)
        blocks.add_metric([node.node, "replica"], node.blocks_replica)
        blocks.add_metric([node.node, "total"], node.blocks_total)
        for name, value in node.counters.items():
            clean = _NOT_A_NAME.sub("_", name).removesuffix("_total")
            family = counters.setdefault(
                clean, CounterMetricFamily(PREFIX + clean, f"Nodes' {name}", labels=["node"])
            )
            family.add_metric([node.node], value)
    yield state
    yield blocks
    yield from counters.values()


def _process(status: ClusterStatus, me: str, sources: Sources) -> Iterator[Family]:
    runtime, reports, history = sources.runtime, sources.reports, sources.history
    yield _gauge("is_leader", "1 while this controller leads", runtime.is_leader)
    yield _gauge("etcd_watch_age_seconds", "Since etcd was last heard", status.etcd_age_s)
    yield _gauge("controller_inbox_events", "Events that wait for the core", len(sources.inbox))
    yield _gauge(
        "controller_step_seconds_max",
        "Longest time from taking events in to having decided",
        runtime.step_s_max,
    )
    yield _gauge("report_streams", "Nodes that report to this controller", reports.streams)
    yield _gauge(
        "report_senders", "Streams that bring these reports, of nodes and of relays", reports.senders
    )
    yield _gauge("history_healthy", "1 while the history database takes events", history.healthy)
    yield _counter("controller_steps", "Events that the core took in", runtime.steps)
    yield _counter("controller_decisions", "Times that the core decided", runtime.decisions)
    yield _counter("leader_terms", "Times that this controller became leader", runtime.terms)
    yield _counter("node_reports", "Reports received", reports.reports)
    yield _counter("node_beats", "Heartbeats received that said nothing new", reports.beats)
    yield _counter("node_report_messages", "Messages that brought them", reports.batches)
    yield _counter("node_reports_refused", "Streams and reports refused", reports.refused)
    yield _counter("etcd_junk_values", "Values in etcd that cannot be read", sources.registry.junk_values)
    yield _counter("history_written", "History records written", history.written)
    yield _counter("history_dropped", "History records dropped", history.dropped)
    yield _counter("history_failures", "Failed attempts to write history", history.failures)
    yield _counter("etcd_calls", "Calls to etcd", sources.etcd.calls)
    yield _counter("etcd_unavailable", "Calls that etcd did not serve", sources.etcd.unavailable)
    yield _counter("etcd_unknown", "Writes whose outcome stayed unknown", sources.etcd.unknown)
    yield _counter("etcd_watch_reconnects", "Watches resumed", sources.etcd.watch_reconnects)
    writes = CounterMetricFamily(PREFIX + "controller_writes", "Guarded writes", labels=["outcome"])
    for outcome, count in sources.performer.writes.items():
        writes.add_metric([outcome], count)
    failover = SummaryMetricFamily(PREFIX + "failover_seconds", "Recoveries by phase", labels=["phase"])
    for phase, (count, total_s) in sources.performer.failover_s.items():
        failover.add_metric([phase], count_value=count, sum_value=total_s)
    info = GaugeMetricFamily(PREFIX + "controller_info", "Which controller this is", labels=["controller"])
    info.add_metric([me], 1)
    yield from (writes, failover, info)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=float(value))
