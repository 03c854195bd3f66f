"""A rolling restart that changes the numerics of every node, under load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.contract.keys import Keys
from controlplane.etcd.client import EtcdClient
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.e2e.test_moves import kfadmin

PROMPTS = sample_prompts(8, 200)


@pytest.fixture
def cluster(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(instances=2, stages=2) as running:
        yield running


async def numerics(cluster: Cluster) -> dict[str, str]:
    """Of every registered node."""
    config = cluster.local.config
    async with EtcdClient(config.etcd) as client:
        found = await client.get_prefix(Keys.of(config).nodes)
    records = [json.loads(item.value) for item in found.items.values()]
    return {record["member"]["node"]: record["numerics"] for record in records}


def change_dtype(cluster: Cluster, dtype: str) -> None:
    """In the settings, as an operator does."""
    path = Path(cluster.local.config.run_dir, "cluster.json")
    settings = json.loads(path.read_text())
    settings.setdefault("engine", {})["dtype"] = dtype
    path.write_text(json.dumps(settings))


def test_a_roll_to_another_precision_ends_no_stream(cluster: Cluster) -> None:
    """Streams go on by recomputation, whatever their later tokens are; in the end all nodes have the new numerics, and
    exchange KV again: a kill then costs no more than a tail."""
    asyncio.run(cluster.wait_all_home())
    before = asyncio.run(numerics(cluster))
    assert len(set(before.values())) == 2, "one a stage"
    change_dtype(cluster, "bfloat16")
    assert kfadmin(cluster, "restart", "launcher").returncode == 0
    ended: list[Stream] = []

    async def roll() -> None:
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                ended.extend(await cluster.generator.streams(PROMPTS))

        async with asyncio.TaskGroup() as group:
            group.create_task(load())
            await until(lambda: ended, "streams flow", 30.0)
            done = await asyncio.to_thread(
                kfadmin, cluster, "restart", "nodes", "--timeout", "150", limit_s=160.0
            )
            stop.set()
        assert done.returncode == 0, done.stdout + done.stderr

    asyncio.run(roll())
    assert [stream.error for stream in ended if stream.error] == []
    assert {len(stream.tokens) for stream in ended} == {200}
    asyncio.run(cluster.wait_all_home())
    after = asyncio.run(numerics(cluster))
    assert {word.partition("-")[0] for word in after.values()} == {"bfloat16"}
    assert {word.partition("-")[0] for word in before.values()} == {"float32"}

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) >= 60 for stream in streams), "tokens flow")
        cluster.kill("n1")

    streams = asyncio.run(while_streaming(cluster, PROMPTS, kill))
    asyncio.run(cluster.wait_all_home())
    asyncio.run(cluster.expect_equal(streams))
