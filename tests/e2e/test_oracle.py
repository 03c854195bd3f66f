"""The executor without tensors in a real cluster: a node dies, and the tokens are those of the definition."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.kevlarflow_check import compare
from bench.kevlarflow_load import Client, Request
from controlplane.contract.config import EmulationConfig, EngineConfig
from dataplane.devices import A10_LLAMA_8B_QUARTER

from .cluster import Cluster, until

EMULATION = EmulationConfig(
    time_scale=4.0, profile="a10-llama-8b-quarter", link_bytes_per_s=125e6,
    sites=(0, 0, 0, 1, 1, 1), latency_s=((0.0, 0.02), (0.02, 0.0)),
)  # fmt: skip
REQUESTS = [Request(0.0, tuple(range(100 + n, 140 + 3 * n)), 60, n) for n in range(8)]


@pytest.mark.usefixtures("etcd_binary")
def test_streams_outlive_a_node_on_emulated_devices_and_links() -> None:
    with Cluster(
        stages=3, engine=EngineConfig(executor="oracle", pool_blocks=1024), emulation=EMULATION
    ) as cluster:
        local = cluster.local
        for pid in local.node_pids().values():
            with open(f"/proc/{pid}/maps") as maps:
                assert "libtorch" not in maps.read()

        async def load() -> list:
            client = Client(local.gateway_url, local.api_key, local.config.model_name)
            runs = [asyncio.create_task(client.run(request, time.monotonic())) for request in REQUESTS]
            await until(lambda: client.pieces > 10 * len(REQUESTS), "tokens flow")
            local.kill("n1")
            return await asyncio.gather(*runs)

        outcomes = asyncio.run(load())
        found = compare(outcomes, stages=3, vocab_size=2048)
        assert (found.lost, found.duplicated, found.different, found.failed) == (0, 0, 0, 0)
        # The device's time: 60 steps of 3 stages, four times as fast.
        assert min(o.latency_s for o in outcomes) >= 60 * 3 * A10_LLAMA_8B_QUARTER.fixed_s / 4
