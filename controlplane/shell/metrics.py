"""The controller's Prometheus text, made from the status at the moment it is asked for.

What is of the cluster (pipelines, nodes and what these count) comes from the leader alone: from each controller it
would be there several times, and every sum would be wrong. What is of the process comes from every controller."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from controlplane.contract.status import ClusterStatus, NodeState
from controlplane.etcd.values import EtcdCounters
from controlplane.history.writer import HistoryWriter
from controlplane.shell.exposition import Family, labelled, one
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry
from controlplane.shell.rpc import ReportServer
from controlplane.shell.runtime import Runtime

PREFIX = "kevlarflow_"
NOW = frozenset({"parity_bytes", "parity_lag_blocks"})  # what nodes tell that also falls
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


def render(status: ClusterStatus, me: str, sources: Sources) -> Generator[None, None, bytes]:
    """Prometheus' text format as the generator's result; it yields after each small piece of the work."""
    families = list(_process(status, me, sources))
    if sources.runtime.is_leader:
        families += _whole(status)
        families += yield from _pipelines(status)
        families += yield from _nodes(status)
    parts = []
    for family in families:
        parts.append(family.text().encode())
        yield
    return b"".join(parts)


def _whole(status: ClusterStatus) -> list[Family]:
    return [
        _gauge("blemishes", "What is wrong in the topology", len(status.blemishes)),
        _gauge("available", "1 while at least one pipeline serves", status.available),
    ]


def _pipelines(status: ClusterStatus) -> Generator[None, None, list[Family]]:
    epoch = Family(PREFIX + "epoch", "gauge", "Epoch of a pipeline")
    running = Family(PREFIX + "num_requests_running", "gauge", "Requests in a pipeline's batches")
    waiting = Family(PREFIX + "num_requests_waiting", "gauge", "Requests in a pipeline's queue")
    state = Family(PREFIX + "pipeline_state", "gauge", "1 for the state it is in")
    lag = Family(PREFIX + "replica_lag_tokens", "gauge", "Of the slowest replica; -1: unprotected")
    for pipeline in status.pipelines:
        labels = labelled({"pipeline": pipeline.id})
        epoch.add(labels, pipeline.epoch)
        running.add(labels, pipeline.running)
        waiting.add(labels, pipeline.waiting)
        state.add(labelled({"pipeline": pipeline.id, "state": pipeline.state.value}), 1)
        for index, stage in enumerate(pipeline.stages):
            lag.add(labelled({"pipeline": pipeline.id, "stage": str(index)}), stage.lag_tokens)
        yield
    return [epoch, running, waiting, state, lag]


def _nodes(status: ClusterStatus) -> Generator[None, None, list[Family]]:
    state = Family(PREFIX + "node_state", "gauge", "1 for the state it is in")
    blocks = Family(PREFIX + "node_kv_blocks", "gauge", "KV blocks by use")
    counters: dict[str, Family] = {}  # by the nodes' name for it
    families: dict[str, Family] = {}  # by the name that it has here
    for node in status.nodes:
        for each in NodeState:
            state.add(labelled({"node": node.node, "state": each.value}), node.state is each)
        uses = {"own": node.blocks_used, "replica": node.blocks_replica, "total": node.blocks_total}
        for use, count in uses.items():
            blocks.add(labelled({"node": node.node, "use": use}), count)
        labels = labelled({"node": node.node})
        for name, value in node.counters.items():
            family = counters.get(name)
            if family is None:
                clean = _NOT_A_NAME.sub("_", name).removesuffix("_total")
                kind = "gauge" if name in NOW else "counter"
                family = families.setdefault(clean, Family(PREFIX + clean, kind, f"Nodes' {name}"))
                counters[name] = family
            family.add(labels, value)
        yield
    return [state, blocks, *families.values()]


def _process(status: ClusterStatus, me: str, sources: Sources) -> Iterator[Family]:
    runtime, reports, history = sources.runtime, sources.reports, sources.history
    yield _gauge("is_leader", "1 while this controller leads", runtime.is_leader)
    yield _gauge(
        "topology_counter", "Counter of the newest topology that this process has read", status.counter
    )
    yield _gauge("etcd_watch_age_seconds", "Since this process last heard etcd", status.etcd_age_s)
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
    writes = Family(PREFIX + "controller_writes", "counter", "Guarded writes")
    for outcome, count in sources.performer.writes.items():
        writes.add(labelled({"outcome": outcome}), count)
    failover = Family(
        PREFIX + "failover_seconds", "histogram", "Phases of failures that this controller led through"
    )
    for phase, buckets in sources.performer.failover_s.items():
        failover.add_buckets({"phase": phase}, buckets)
    switch = Family(PREFIX + "planned_switch_seconds", "histogram", "Phases of planned switches, likewise")
    for phase, buckets in sources.performer.switch_s.items():
        switch.add_buckets({"phase": phase}, buckets)
    info = Family(PREFIX + "controller_info", "gauge", "Which controller this is")
    info.add(labelled({"controller": me}), 1)
    yield from (writes, failover, switch, info)


def _gauge(name: str, text: str, value: float) -> Family:
    return one(PREFIX + name, "gauge", text, value)


def _counter(name: str, text: str, value: float) -> Family:
    return one(PREFIX + name, "counter", text, value)
