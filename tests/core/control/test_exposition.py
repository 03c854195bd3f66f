"""The text that Prometheus reads: what its own parser makes of it, and that no piece of it grows with the group."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from controlplane.contract.status import ClusterStatus
from controlplane.etcd.values import EtcdCounters
from controlplane.shell.metrics import Sources, render
from tests.core.control.test_cost import Group, calls


@dataclass
class Sized:
    """What counts, as far as it is asked: everything is 3."""

    def __getattr__(self, _name: str) -> int:
        return 3

    def __len__(self) -> int:
        return 3


def sources() -> Sources:
    performer = SimpleNamespace(writes={"done": 4}, failover_s={"detect": (2, 0.5)})
    sized: Any = Sized()
    return Sources(sized, sized, sized, sized, cast(Any, performer), sized, EtcdCounters())


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


def text_of(status: ClusterStatus) -> bytes:
    pieces = render(status, "c1", sources())
    while True:
        try:
            next(pieces)
        except StopIteration as done:
            return cast(bytes, done.value)


def test_prometheus_reads_what_was_written() -> None:
    status = status_of(16)
    odd = replace(status.nodes[0], node='n"0\\\n')
    found = read(text_of(replace(status, nodes=(odd, *status.nodes[1:]))))
    assert found["kevlarflow_topology_counter", ()] == status.counter
    assert found["kevlarflow_node_state", (("node", "n1"), ("state", "green"))] == 1.0
    assert found["kevlarflow_node_state", (("node", "n1"), ("state", "red"))] == 0.0
    assert found["kevlarflow_link_bytes_sent_total", (("node", "n1"),)] == 2.0**40
    assert found["kevlarflow_odd_name_total", (("node", 'n"0\\\n'),)] == 2.0
    assert found["kevlarflow_seen_total", (("node", "n15"),)] == 3.0
    assert found["kevlarflow_epoch", (("pipeline", "p3"),)] == status.pipelines[3].epoch
    assert found["kevlarflow_replica_lag_tokens", (("pipeline", "p0"), ("stage", "2"))] == 0.0
    assert found["kevlarflow_controller_writes_total", (("outcome", "done"),)] == 4.0
    assert found["kevlarflow_failover_seconds_count", (("phase", "detect"),)] == 2.0
    assert found["kevlarflow_failover_seconds_sum", (("phase", "detect"),)] == 0.5
    assert found["kevlarflow_controller_info", (("controller", "c1"),)] == 1.0


def test_no_piece_of_it_grows_with_the_group() -> None:
    longest = {}
    for nodes in (64, 512):
        pieces = render(status_of(nodes), "c1", sources())
        costs = []
        while True:
            try:
                costs.append(calls(lambda pieces=pieces: next(pieces)))
            except StopIteration:
                break
        longest[nodes] = max(costs)
    assert longest[64] == longest[512]
