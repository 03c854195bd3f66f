"""The text that Prometheus reads: what its own parser makes of it, and that no piece of it grows with the group."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from controlplane.contract.keys import Keys
from controlplane.contract.status import ClusterStatus
from controlplane.core.controller import Controller
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
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


def sources() -> Sources:
    """Of a controller that has done something, as `controlplane.main` puts it together."""
    config = make_config(16, STAGES)
    keys, inbox, client = Keys(config.cluster), Inbox(), EtcdClient(("127.0.0.1:1",))
    history = HistoryWriter(HistoryStore(config.database, config.cluster, "c1"))
    registry = Registry(client, keys, config.group, inbox)
    performer = Performer(client, keys, config.group, inbox, history)
    election = Election(client, keys.leader, b"")
    runtime = Runtime(Controller(config, "c1"), inbox, registry, performer, election)
    reports = ReportServer("token", inbox, config.timing)
    performer.writes["done"], performer.failover_s["detect"] = 4, (2, 0.5)
    reports.beats, runtime.steps, history.written, client.counters.calls = 11, 12, 13, 14
    return Sources(inbox, registry, reports, runtime, performer, history, client.counters)


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


def in_pieces(status: ClusterStatus) -> tuple[list[int], bytes]:
    async def made() -> tuple[list[int], bytes]:
        return lines_of_pieces(render(status, "c1", sources()))

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
    assert found["kevlarflow_failover_seconds_count", (("phase", "detect"),)] == 2.0
    assert found["kevlarflow_failover_seconds_sum", (("phase", "detect"),)] == 0.5
    assert found["kevlarflow_controller_info", (("controller", "c1"),)] == 1.0


def test_no_piece_of_it_grows_with_the_group() -> None:
    longest = {nodes: max(in_pieces(status_of(nodes))[0]) for nodes in (64, 512)}
    assert longest[64] == longest[512]
