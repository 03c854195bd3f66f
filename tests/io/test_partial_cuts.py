"""A real leader whose report streams break, all but one's; and a topology that somebody has spoilt by hand."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace

from controlplane.contract.keys import decode, encode
from controlplane.contract.records import GatewayRecord, Hearing
from controlplane.contract.topology import Topology
from controlplane.core.edit import successor, with_stage
from tests.io.controllers import Cluster, scenario, until


def test_a_leader_that_hears_one_node_condemns_nobody_and_hands_over(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        other = "c2" if leader == "c1" else "c1"

        async def told() -> bool:
            found = await cluster.client.get(cluster.keys.hearing(other))
            return found is not None and b'"nodes":4' in found.value

        await until(told, 10, "the candidate says that it hears all", cluster)
        before = cluster.topology
        assert before is not None
        cluster.unheard.update((leader, node) for node in ("n1", "n2", "n3"))

        async def handed_over() -> bool:
            return await cluster.leader() == other

        await until(handed_over, 20, "the one that hears all leads", cluster)
        assert cluster.topology == before
        assert not [row for row in cluster.events() if row[0] == "died"]

        died_at = time.monotonic()
        victim = cluster.nodes["n1"]
        cluster.nodes["n0"].down_links.add(victim.record.member)
        victim.die()
        await until(lambda: len(topology(cluster).serving("n3")) == 2, 4, "n3 is borrowed for n1", cluster)
        assert time.monotonic() - died_at < 2

    scenario(tmp_path, body, controllers=2)


def test_a_spoilt_pipeline_costs_the_other_nothing_and_ends_nobody(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        now = topology(cluster)
        n1, n3 = (cluster.nodes[node].record.member for node in ("n1", "n3"))
        spoilt = with_stage(now.pipelines[0], 0, ranks=(n1,), replicas=(n1, n1))
        bad = replace(successor(now, spoilt), counter=now.counter + 50)
        await cluster.client.put(cluster.keys.topology(cluster.config.group), encode(bad))

        cluster.nodes["n1"].down_links.add(n3)
        cluster.nodes["n3"].die()
        await until(lambda: n3 not in topology(cluster).pipelines[1].members(), 4, "p1 is mended", cluster)
        assert topology(cluster).counter > bad.counter
        assert cluster.controllers[leader].poll() is None

        def on_record() -> bool:
            return ("blemish", "p0", leader) in cluster.events()

        await until(on_record, 5, "history has it", cluster)
        kinds = [kind for kind, _, _ in cluster.events()]
        assert kinds.count("blemish") < 10
        metrics = (await cluster.ask(leader, "GET", "/metrics")).text
        assert "kevlarflow_blemishes" in metrics

    scenario(tmp_path, body, controllers=1)


def test_epochs_go_on_from_what_a_gateway_knows_when_nobody_else_does(tmp_path: Path) -> None:
    """As after a restored snapshot, with controllers and nodes that are all fresh."""

    async def body(cluster: Cluster) -> None:
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        before = topology(cluster)

        async def told() -> bool:
            found = await cluster.client.get(cluster.keys.hearing(leader))
            return found is not None and decode(found.value, Hearing, "").topology_counter == before.counter

        await until(told, 10, "the others are told which topology the leader knows", cluster)
        later = GatewayRecord("g9", "127.0.0.1:9", 1, "e" * 12, topology_counter=before.counter + 50)
        await cluster.client.put(cluster.keys.gateway("g9"), encode(later))
        await until(
            lambda: topology(cluster).counter > later.topology_counter, 4, "epochs have gone on", cluster
        )
        assert all(p.epoch > later.topology_counter for p in topology(cluster).pipelines)
        after = [list(p.members()) for p in topology(cluster).pipelines]
        assert after == [list(p.members()) for p in before.pipelines]
        await until(told_again(cluster, leader, later), 10, "and this one is told, too", cluster)

    def told_again(cluster: Cluster, leader: str, later: GatewayRecord) -> Callable[[], Awaitable[bool]]:
        async def told() -> bool:
            found = await cluster.client.get(cluster.keys.hearing(leader))
            return (
                found is not None
                and decode(found.value, Hearing, "").topology_counter > later.topology_counter
            )

        return told

    scenario(tmp_path, body, controllers=1)


def topology(cluster: Cluster) -> Topology:
    assert cluster.topology is not None
    return cluster.topology
