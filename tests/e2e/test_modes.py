"""The other modes, and a spare node taking a dead or living one's place."""

from __future__ import annotations

import asyncio
import signal

import pytest

from controlplane.contract.events import EventKind
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.e2e.test_moves import kfadmin, serves_nothing

PROMPTS = sample_prompts(6, 160)


@pytest.mark.parametrize("mode", [Mode.NONE, Mode.STOP_RESTART])
@pytest.mark.usefixtures("etcd_binary")
def test_a_kill_costs_time_but_no_token_in_any_mode(mode: Mode) -> None:
    with Cluster(mode=mode, instances=2, stages=2) as cluster:
        asyncio.run(cluster.references(PROMPTS))
        pids = cluster.local.node_pids()

        async def kill(streams: list[Stream]) -> None:
            await until(lambda: sum(len(s.tokens) for s in streams) >= 90, "tokens flow")
            cluster.kill("n1")

        streams = asyncio.run(while_streaming(cluster, PROMPTS, kill))
        asyncio.run(cluster.expect_equal(streams))
        asyncio.run(cluster.wait_all_home(60.0))
        changed = {n for n, pid in cluster.local.node_pids().items() if pids[n] != pid}
        assert changed == ({"n0", "n1"} if mode is Mode.STOP_RESTART else {"n1"})


@pytest.mark.usefixtures("etcd_binary")
def test_a_stopped_node_that_works_with_nobody_is_missed_by_those_that_watch_it() -> None:
    """One stage and no copies: no pipeline gives it a neighbour. It is found by silence on links, not by its lease."""
    with Cluster(mode=Mode.NONE, instances=3, stages=1) as cluster:
        asyncio.run(cluster.references(PROMPTS))

        async def stop_and_go(streams: list[Stream]) -> None:
            await until(lambda: sum(len(s.tokens) for s in streams) >= 90, "tokens flow")
            epoch = (await cluster.status()).pipelines[1].epoch
            cluster.kill("n1", signal.SIGSTOP)
            try:
                await cluster.wait_for(lambda s: s.pipelines[1].epoch > epoch, "its place is taken")
            finally:
                cluster.kill("n1", signal.SIGCONT)

        streams = asyncio.run(while_streaming(cluster, PROMPTS, stop_and_go))
        asyncio.run(cluster.expect_equal(streams))
        with cluster.local.admin() as admin:
            events = [row.event for row in admin.events(limit=200)]
        died = [event.message for event in events if event.kind is EventKind.DIED]
        assert len(died) == 1
        assert "on links too" in died[0]


@pytest.mark.usefixtures("etcd_binary")
def test_replace_with_a_spare() -> None:
    """One instance, so there is no peer: the spare of the same stage takes over for good."""
    with Cluster(instances=1, stages=2, spares=1) as cluster:
        asyncio.run(cluster.references(PROMPTS))
        pids = cluster.local.node_pids()
        spare = "n2"

        async def replace(streams: list[Stream]) -> None:
            await until(lambda: sum(len(s.tokens) for s in streams) >= 60, "tokens flow")
            done = await asyncio.to_thread(kfadmin, cluster, "replace", "n0", "--with", spare)
            assert done.returncode == 0, done.stderr

        streams = asyncio.run(while_streaming(cluster, PROMPTS, replace))
        asyncio.run(cluster.expect_equal(streams))
        status = asyncio.run(cluster.status())
        assert serves_nothing(status, "n0")
        assert status.pipelines[0].stages[0].homes == (spare,)
        assert status.pipelines[0].stages[0].serving[0].node == spare
        assert cluster.local.node_pids() == pids
