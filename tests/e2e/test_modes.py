"""The other modes, and a spare node taking a dead or living one's place."""

from __future__ import annotations

import asyncio

import pytest

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
