"""The text that Prometheus reads: what its own parser makes of it, and that no piece of it grows with the group."""

from __future__ import annotations

import asyncio
from typing import cast

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from controlplane.contract.events import Event, EventKind
from controlplane.contract.keys import Keys
from controlplane.contract.status import ClusterStatus
from controlplane.core.controller import Controller
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election, Leadership
from controlplane.history.store import HistoryStore
from controlplane.history.writer import HistoryWriter
from controlplane.shell.inbox import Inbox
from controlplane.shell.metrics import Sources, render
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry
from controlplane.shell.rpc import ReportServer
from controlplane.shell.runtime import Runtime
from tests.core.control.test_cost import STAGES, Group
from tests.core.control.world import make_config
from tests.core.counting import lines_of_pieces


class Lead:
    """Of a controller that leads."""

    def valid(self) -> bool:
        return True


def sources(leads: bool = True) -> Sources:
    """Of a controller that has done something, as `controlplane.main` puts it together."""
    config = make_config(16, STAGES)
    keys, inbox, client = Keys(config.cluster), Inbox(), EtcdClient(("127.0.0.1:1",))
    history = HistoryWriter(HistoryStore(config.database, config.cluster, "c1"))
    registry = Registry(client, keys, config.group, inbox)
    performer = Performer(client, keys, config.group, inbox, history)
    election = Election(client, keys.leader, b"")
    runtime = Runtime(Controller(config, "c1"), inbox, registry, performer, election)
    reports = ReportServer("token", inbox, config.timing)
    performer.writes["done"] = 4
    performer.leadership = cast(Leadership, Lead()) if leads else None
    for event in EVENTS:
        performer._count_phases(event)
    reports.beats, runtime.steps, history.written, client.counters.calls = 11, 12, 13, 14
    return Sources(inbox, registry, reports, runtime, performer, history, client.counters)


EVENTS = [
    Event(EventKind.DIED, "n1", "", 0.0, details={"silent_s": 0.125, "evidence": "a"}),
    Event(EventKind.DIED, "n2", "", 0.0, details={"silent_s": 0.375}),
    Event(EventKind.EPOCH, "p0", "", 0.0, 2, {"died": "n1@a", "plan_s": 0.002}),
    Event(
        EventKind.RECOVERED,
        "p0",
        "",
        0.0,
        2,
        {"connect_s": 70.0, "restore_s": 0.5, "planned": 0, "seen_unix_s": 1e9},
    ),
    Event(EventKind.RECOVERED, "p1", "", 0.0, 3, {"connect_s": 0.25, "restore_s": 0.5, "planned": 1}),
]


def status_of(nodes: int) -> ClusterStatus:
    group = Group(nodes)
    status = group.core.status(group.now)
    counters = {"link_bytes_sent": 1 << 40, "odd name": 2, "seen_total": 3}
    return replace(status, nodes=tuple(replace(node, counters=counters) for node in status.nodes))


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def in_pieces(status: ClusterStatus, leads: bool = True) -> tuple[list[int], bytes]:
    async def made() -> tuple[list[int], bytes]:
        return lines_of_pieces(render(status, "c1", sources(leads)))

    return asyncio.run(made())


def test_prometheus_reads_what_was_written() -> None:
    status = status_of(16)
    odd = replace(status.nodes[0], node='n"0\\\n')
    _, text = in_pieces(replace(status, nodes=(odd, *status.nodes[1:])))
    found = read(text)
    assert found["kevlarflow_topology_counter", ()] == status.counter
    assert found["kevlarflow_node_state", (("node", "n1"), ("state", "green"))] == 1.0
    assert found["kevlarflow_node_state", (("node", "n1"), ("state", "red"))] == 0.0
    assert found["kevlarflow_link_bytes_sent_total", (("node", "n1"),)] == 2.0**40
    assert found["kevlarflow_odd_name_total", (("node", 'n"0\\\n'),)] == 2.0
    assert found["kevlarflow_seen_total", (("node", "n15"),)] == 3.0
    assert found["kevlarflow_epoch", (("pipeline", "p3"),)] == status.pipelines[3].epoch
    assert found["kevlarflow_replica_lag_tokens", (("pipeline", "p0"), ("stage", "2"))] == 0.0
    assert found["kevlarflow_controller_writes_total", (("outcome", "done"),)] == 4.0
    assert found["kevlarflow_node_beats_total", ()] == 11.0
    assert found["kevlarflow_controller_steps_total", ()] == 12.0
    assert found["kevlarflow_history_written_total", ()] == 13.0
    assert found["kevlarflow_etcd_calls_total", ()] == 14.0
    assert found["kevlarflow_history_healthy", ()] == 0.0
    detect = (("phase", "detect"),)
    assert found["kevlarflow_failover_seconds_count", detect] == 2.0
    assert found["kevlarflow_failover_seconds_sum", detect] == 0.5
    assert found["kevlarflow_failover_seconds_bucket", (("le", "0.1"), *detect)] == 0.0
    assert found["kevlarflow_failover_seconds_bucket", (("le", "0.25"), *detect)] == 1.0
    assert found["kevlarflow_failover_seconds_bucket", (("le", "0.5"), *detect)] == 2.0
    assert found["kevlarflow_failover_seconds_bucket", (("le", "60.0"), ("phase", "connect"))] == 0.0
    assert found["kevlarflow_failover_seconds_bucket", (("le", "+Inf"), ("phase", "connect"))] == 1.0
    assert found["kevlarflow_failover_seconds_count", (("phase", "plan"),)] == 1.0
    assert found["kevlarflow_planned_switch_seconds_sum", (("phase", "connect"),)] == 0.25
    assert not [key for key in found if ("phase", "seen_unix") in key[1]]
    assert found["kevlarflow_controller_info", (("controller", "c1"),)] == 1.0


def test_what_is_of_the_cluster_comes_from_the_leader_alone() -> None:
    leader, other = (read(in_pieces(status_of(16), leads)[1]) for leads in (True, False))
    assert {name for name, _ in leader} - {name for name, _ in other} == {
        "kevlarflow_available", "kevlarflow_blemishes", "kevlarflow_epoch", "kevlarflow_pipeline_state",
        "kevlarflow_num_requests_running", "kevlarflow_num_requests_waiting", "kevlarflow_replica_lag_tokens",
        "kevlarflow_node_state", "kevlarflow_node_kv_blocks", "kevlarflow_link_bytes_sent_total",
        "kevlarflow_odd_name_total", "kevlarflow_seen_total",
    }  # fmt: skip
    assert other["kevlarflow_is_leader", ()] == 0.0
    assert other["kevlarflow_topology_counter", ()] == leader["kevlarflow_topology_counter", ()]


def test_what_also_falls_is_no_counter() -> None:
    status = status_of(16)
    coded = replace(status.nodes[0], counters={"parity_bytes": 7, "parity_evicted": 1})
    found = read(in_pieces(replace(status, nodes=(coded, *status.nodes[1:])))[1])
    assert found["kevlarflow_parity_bytes", (("node", "n0"),)] == 7.0
    assert found["kevlarflow_parity_evicted_total", (("node", "n0"),)] == 1.0


def test_no_piece_of_it_grows_with_the_group() -> None:
    longest = {nodes: max(in_pieces(status_of(nodes))[0]) for nodes in (64, 512)}
    assert longest[64] == longest[512]
