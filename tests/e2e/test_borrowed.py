"""A node that is borrowed serves both pipelines in one pass, and no stream can tell."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

STREAMS = 48  # of each pipeline half: enough for two microbatches of each to be under way
TOKENS = 160


def merged(status: ClusterStatus) -> int:
    return sum(node.counters.get("steps_merged", 0) for node in status.nodes)


@pytest.mark.usefixtures("etcd_binary")
@pytest.mark.parametrize("victim", ["n0", "n3"])  # a first and a last stage, of different pipelines
def test_a_borrowed_node_merges_the_steps_of_both_pipelines(victim: str) -> None:
    prompts = sample_prompts(STREAMS, TOKENS)
    with Cluster(instances=2, stages=2) as cluster:
        asyncio.run(cluster.references(prompts))
        assert merged(asyncio.run(cluster.wait_all_home())) == 0

        async def kill(streams: list[Stream]) -> None:
            await until(lambda: sum(len(s.tokens) for s in streams) >= 8 * STREAMS, "8 tokens a stream")
            cluster.kill(victim)
            await cluster.wait_for(merged, "the borrowed node has merged steps")

        streams = asyncio.run(while_streaming(cluster, prompts, kill))
        asyncio.run(cluster.expect_equal(streams))
        asyncio.run(cluster.wait_all_home())
