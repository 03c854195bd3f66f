"""Two models behind one gateway, their groups in one cluster and one etcd, with nodes of the same names."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import dataplane.demo
from controlplane.contract.config import ClusterConfig, EngineConfig, GatewayConfig, TimingConfig
from controlplane.kfadmin.loadgen import LoadGenerator, sample_prompts
from controlplane.kfadmin.local import LocalCluster
from tests.e2e.cluster import Cluster

PROMPTS = sample_prompts(4, 60)
SMALL = "kevlar-demo-draft"


@pytest.fixture
def second_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kf-e2e-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def small_group(home: LocalCluster, folder: Path) -> LocalCluster:
    config = ClusterConfig(
        run_dir=str(folder),
        model=str(dataplane.demo.model_dir().parent / SMALL),
        etcd=home.config.etcd,
        group="small",
        instances=2,
        stages=1,
        gateway_port=0,
        admin_port=0,
        engine=EngineConfig(pool_blocks=256),
        timing=TimingConfig(unavailable_grace_s=1.0),
    )
    return LocalCluster(config, controllers=1)


def test_two_models_behind_one_gateway(etcd_binary: None, second_dir: Path) -> None:
    settings = GatewayConfig(groups=(str(second_dir / "cluster.json"),))
    with Cluster(instances=2, stages=1, controllers=1, gateway=settings) as home:
        asyncio.run(play(home, second_dir))


async def play(home: Cluster, folder: Path) -> None:
    local = home.local
    headers = {"authorization": f"Bearer {local.api_key}"}
    async with httpx.AsyncClient(base_url=local.gateway_url, headers=headers, trust_env=False) as http:

        async def ready() -> dict[str, Any]:
            answer = await http.get("/readyz")
            assert answer.status_code == 200
            found: dict[str, Any] = answer.json()
            return found

        # Its group has not been started: nothing is the matter with the gateway's own.
        assert (await ready())["models"] == {"kevlar-demo": 2}
        assert "cluster.json: cannot read" in " ".join((await ready())["reasons"])
        await home.references(PROMPTS)
        small = small_group(local, folder)
        await asyncio.to_thread(small.start)
        try:
            await until_ready(ready, {"kevlar-demo": 2, SMALL: 2})
            listed = (await http.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["kevlar-demo", SMALL]
            assert (await http.get("/v1/models/nobody")).status_code == 404
            own = LoadGenerator(small.gateway_url, small.api_key, SMALL)
            here = LoadGenerator(local.gateway_url, local.api_key, SMALL)
            wanted = [stream.tokens for stream in await own.streams(PROMPTS)]
            mine, theirs = await asyncio.gather(home.generator.streams(PROMPTS), here.streams(PROMPTS))
            assert [stream.tokens for stream in theirs] == wanted
            await home.expect_equal(mine)
            # Each has its own leader, nodes and operations, though all of them have the same names.
            for cluster, group in ((local, "default"), (small, "small")):
                status = cluster.status()
                assert (status.group, status.leader, len(status.nodes)) == (group, "c1", 2)
                assert {node.pid for node in status.nodes} == set(cluster.node_pids().values())
        finally:
            streaming = asyncio.create_task(home.generator.streams(PROMPTS))
            await asyncio.to_thread(small.stop)
        await home.expect_equal(await streaming)
        asked = {"model": SMALL, "prompt": "x", "max_tokens": 2}
        await until_ready(ready, {"kevlar-demo": 2, SMALL: 0})
        assert (await http.post("/v1/completions", json=asked, timeout=30.0)).status_code == 503
        assert (await http.post("/v1/completions", json=asked | {"model": "kevlar-demo"})).status_code == 200


async def until_ready(ready: Any, models: dict[str, int]) -> None:
    found: dict[str, Any] = {}

    async def looks() -> None:
        while found.get("models") != models:
            found.update(await ready())
            await asyncio.sleep(0.05)

    try:
        await asyncio.wait_for(looks(), 30.0)
    except TimeoutError:
        raise AssertionError(f"{found} instead of {models}") from None
