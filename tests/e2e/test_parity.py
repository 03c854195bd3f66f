"""A stage dies where parity protects KV: every stream is exact, and little is computed again."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.contract.config import ParityConfig
from controlplane.contract.status import ClusterStatus
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

PROMPTS = sample_prompts(6, 120, words=120)


def counted(status: ClusterStatus, name: str) -> int:
    return sum(node.counters.get(name, 0) for node in status.nodes)


def encoding(status: ClusterStatus) -> int:
    return sum(node.counters.get("parity_bytes", 0) > 0 for node in status.nodes)


@pytest.mark.parametrize(
    ("parity", "victims"),
    [(ParityConfig(), ["n1"]), (ParityConfig("rs", 2), ["n0", "n2"])],
)
@pytest.mark.usefixtures("etcd_binary")
def test_a_kill_with_parity_costs_no_token(parity: ParityConfig, victims: list[str]) -> None:
    with Cluster(mode=Mode.PARITY, parity=parity, instances=2, stages=3) as cluster:
        asyncio.run(cluster.references(PROMPTS))
        # The prompts stay cached, on both pipelines: what streams have of them is protected before they begin.
        asyncio.run(cluster.wait_for(lambda s: encoding(s) >= 4, "there is parity on four nodes"))

        async def kill(streams: list[Stream]) -> None:
            await until(lambda: sum(len(s.tokens) for s in streams) >= 120, "tokens flow")
            for victim in victims:
                cluster.kill(victim)

        streams = asyncio.run(while_streaming(cluster, PROMPTS, kill))
        asyncio.run(cluster.expect_equal(streams))
        status = asyncio.run(
            cluster.wait_for(lambda s: counted(s, "blocks_restored") > 0, "blocks were restored")
        )
        # A prompt has some 10 blocks: without parity each request would be computed again from its first token.
        recovered = counted(status, "scheduler_requests_recovered")
        assert counted(status, "scheduler_tokens_recomputed") < 64 * recovered
        asyncio.run(cluster.wait_all_home(60.0))
