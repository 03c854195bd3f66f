"""Instances 2 -> 4 -> 2 under load: no stream notices, the processes come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import sample_prompts
from tests.e2e.cluster import Cluster, all_home, until
from tests.e2e.test_moves import kfadmin

PROMPTS = sample_prompts(8, 150)
HOME = {f"n{k}" for k in range(4)}
NEW = {f"n{k}" for k in range(4, 8)}


@pytest.fixture
def cluster(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(instances=2, stages=2, secure=True) as running:
        yield running


def formed(status: ClusterStatus, instances: int) -> bool:
    copied = all(stage.replicas for p in status.pipelines for stage in p.stages)
    return all_home(status) and copied and len(status.pipelines) == instances


async def scale(cluster: Cluster, instances: int) -> None:
    done = await asyncio.to_thread(kfadmin, cluster, "scale", str(instances), limit_s=90.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the group has {instances} instances" in done.stdout


def test_two_four_two_under_load(cluster: Cluster) -> None:
    asyncio.run(play(cluster))


async def play(cluster: Cluster) -> None:
    await cluster.references(PROMPTS)
    stop = asyncio.Event()
    ended = []
    served: set[str] = set()  # pipelines that had requests

    async def load(half: int) -> None:
        while not stop.is_set():
            ended.extend(await cluster.resuming.streams(PROMPTS[half::2]))

    async def acting() -> None:
        try:
            await until(lambda: ended, "streams flow")
            certificates = asyncio.create_task(certify(cluster, stop))
            await scale(cluster, 4)
            assert set(cluster.local.node_pids()) == HOME | NEW
            await cluster.wait_for(lambda s: formed(s, 4), "four are home", 40.0)

            def new_serve(status: ClusterStatus) -> bool:
                served.update(p.id for p in status.pipelines if p.running)
                return {"p2", "p3"} <= served

            await cluster.wait_for(new_serve, "the new ones have requests", 40.0)
            await scale(cluster, 2)
            await until(lambda: set(cluster.local.node_pids()) == HOME, "the new nodes have ended")
            await cluster.wait_for(lambda s: formed(s, 2), "two are home", 40.0)
        finally:
            stop.set()
        await certificates

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for half in (0, 1):
            group.create_task(load(half))
        group.create_task(acting())
    await cluster.expect_equal(ended)
    status = await cluster.status()
    assert {node.node for node in status.nodes} == HOME
    assert not [path for path in (cluster.local.run_dir.path / "nodes").iterdir() if path.stem in NEW]
    print(f"{len(ended)} streams in {time.monotonic() - began:.1f} s")


async def certify(cluster: Cluster, stop: asyncio.Event) -> None:
    """What `kfadmin up` does while it runs."""
    while not stop.is_set():
        cluster.local.certify_new_nodes()
        await asyncio.sleep(0.05)
