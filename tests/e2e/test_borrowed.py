"""A node that is borrowed serves both pipelines in one pass, and no stream can tell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

STREAMS = 48  # of each pipeline half: enough for two microbatches of each to be under way
TOKENS = 160
SOME = 8  # tokens, for every node to have computed


@pytest.fixture(scope="module")
def pair(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(instances=2, stages=2) as running:
        yield running


def computed(status: ClusterStatus) -> dict[str, int]:
    return {node.node: node.counters.get("compute_ms", 0) for node in status.nodes}


@pytest.mark.parametrize("victim", ["n0", "n3"])  # a first and a last stage, of different pipelines
def test_a_borrowed_node_merges_the_steps_of_both_pipelines(pair: Cluster, victim: str) -> None:
    def merged(status: ClusterStatus) -> int:
        return sum(n.counters.get("steps_merged", 0) for n in status.nodes if n.node != victim)

    prompts = sample_prompts(STREAMS, TOKENS)
    asyncio.run(pair.references(prompts))
    # Counters come later than who serves what: those that follow are of a time when everybody is home.
    home = computed(asyncio.run(pair.wait_all_home()))
    asyncio.run(pair.generator.streams(sample_prompts(STREAMS, SOME)))
    fresh = pair.wait_for(
        lambda s: all(computed(s)[n] != home[n] for n in home), "every node has new counters"
    )
    before = merged(asyncio.run(fresh))

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 8 * STREAMS, "8 tokens a stream")
        assert merged(await pair.status()) == before
        pair.kill(victim)
        await pair.wait_for(lambda s: merged(s) > before, "the borrowed node has merged steps")

    streams = asyncio.run(while_streaming(pair, prompts, kill))
    asyncio.run(pair.expect_equal(streams))
    asyncio.run(pair.wait_all_home())
