"""Mode load-aware on real processes: an instance dies, and its requests go on where their copies are."""

from __future__ import annotations

import asyncio
import re
import time

import httpx
import pytest

from bench.kevlarflow_check import compare
from bench.kevlarflow_load import Client, Outcome, Request
from controlplane.contract.config import EmulationConfig, EngineConfig
from controlplane.contract.status import ClusterStatus
from controlplane.contract.topology import Mode
from tests.e2e.cluster import Cluster, until
from tests.e2e.test_gateway_loss import key
from tests.e2e.test_parity import counted

EMULATION = EmulationConfig(time_scale=4.0, profile="a10-llama-8b-quarter")
PROMPT = 400
REQUESTS = [Request(0.0, tuple(range(100 + n, 100 + PROMPT + n)), 60, n) for n in range(9)]


@pytest.mark.usefixtures("etcd_binary")
def test_requests_of_an_instance_that_dies_go_on_at_their_holders() -> None:
    engine = EngineConfig(executor="oracle", pool_blocks=1024)
    with Cluster(
        mode=Mode.LOAD_AWARE, instances=3, stages=2, controllers=1, engine=engine, emulation=EMULATION
    ) as cluster:
        local = cluster.local

        async def load() -> list[Outcome]:
            client = Client(local.gateway_url, local.api_key, local.config.model_name)
            runs = [asyncio.create_task(client.run(request, time.monotonic())) for request in REQUESTS]
            await until(lambda: client.pieces > 25 * len(REQUESTS), "tokens flow")
            local.hold("n1")  # a fresh process has the stage back at once
            local.kill("n1")
            status = await cluster.wait_for(lambda s: not s.pipelines[0].stages[1].serving, "p0 is down")
            assert not any(stage.borrowed for p in status.pipelines for stage in p.stages)
            local.release("n1")
            return await asyncio.gather(*runs)

        outcomes = asyncio.run(load())
        found = compare(outcomes, stages=2, vocab_size=2048)
        assert (found.lost, found.duplicated, found.different, found.failed) == (0, 0, 0, 0)
        asyncio.run(cluster.wait_all_home(60.0))
        answer = httpx.get(
            f"{local.gateway_url}/metrics", headers=key(cluster), timeout=5.0, trust_env=False, verify=False
        )
        (moved,) = re.findall(r'^kevlarflow_requests_recovered_total\{how="moved"\} (.+)$', answer.text, re.M)
        assert float(moved) >= 2

        # All were looked for when they came, since the cluster was fresh; who moved was looked for again.
        def looked_for(status: ClusterStatus) -> bool:
            return counted(status, "scheduler_requests_recovered") >= len(REQUESTS) + float(moved)

        status = asyncio.run(cluster.wait_for(looked_for, "who moved is counted"))
        # Without the blocks that were open or on their way, and never a prompt.
        assert counted(status, "scheduler_tokens_recomputed") < float(moved) * PROMPT / 4
