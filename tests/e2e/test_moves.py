"""Drain and replace under load: planned moves lose nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

# Long enough to outlast a drain: the engine brings 200 tokens/s and more to each stream.
PROMPTS = sample_prompts(12, 640)


def kfadmin(cluster: Cluster, *arguments: str, limit_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controlplane.kfadmin.main", *arguments]
    return subprocess.run(
        [*command, "--run-dir", cluster.local.config.run_dir],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def serves_nothing(status: ClusterStatus, node: str) -> bool:
    return all(not n.serving for n in status.nodes if n.node == node)


@pytest.mark.parametrize("node", ["n2", "n4"])
def test_drain_under_load(home: Cluster, node: str) -> None:
    """A middle stage, and a first one with its scheduler. It does not wait for the streams to end."""
    asyncio.run(home.references(PROMPTS))
    pids = home.local.node_pids()

    async def drain(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 120, "tokens flow")
        done = await asyncio.to_thread(kfadmin, home, "drain", node, "-o", "json")
        assert done.returncode == 0, done.stderr
        assert not all(s.done for s in streams), "the streams were over before the drain was"
        status = await home.status()
        assert serves_nothing(status, node)
        again = await asyncio.to_thread(kfadmin, home, "drain", node)
        assert again.returncode == 0, again.stderr

    try:
        streams = asyncio.run(while_streaming(home, PROMPTS, drain))
    finally:
        back = kfadmin(home, "undrain", node)
    assert back.returncode == 0, back.stderr
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    assert home.local.node_pids() == pids
    counters = [n.counters for n in asyncio.run(home.status()).nodes]
    assert sum(c.get("checksum_failures", 0) for c in counters) == 0


def test_replace_under_load(home: Cluster) -> None:
    """A fresh process of the same node takes over again; nothing is lost on the way."""
    asyncio.run(home.references(PROMPTS))
    pids = home.local.node_pids()

    async def replace(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 120, "tokens flow")
        done = await asyncio.to_thread(kfadmin, home, "replace", "n1", "-o", "json")
        assert done.returncode == 0, done.stderr

    streams = asyncio.run(while_streaming(home, PROMPTS, replace))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    changed = {n for n, pid in home.local.node_pids().items() if pids[n] != pid}
    assert changed == {"n1"}


def test_a_drain_that_cannot_be_is_refused_and_changes_nothing(home: Cluster) -> None:
    """Draining both nodes of a stage would leave nobody: exit code 3, topology as it was."""
    assert kfadmin(home, "drain", "n3").returncode == 0
    counter = asyncio.run(home.status()).counter
    refused = kfadmin(home, "drain", "n7")
    assert refused.returncode == 3, refused.stderr
    assert asyncio.run(home.status()).counter == counter
    assert kfadmin(home, "drain", "n99").returncode in (2, 3)
    assert kfadmin(home, "undrain", "n3").returncode == 0
    asyncio.run(home.wait_all_home())


def test_a_dry_run_shows_the_plan_and_changes_nothing(home: Cluster) -> None:
    counter = asyncio.run(home.status()).counter
    shown = kfadmin(home, "drain", "n1", "--dry-run", "-o", "json")
    assert shown.returncode == 0, shown.stderr
    answer = json.loads(shown.stdout)
    assert answer["accepted"] is False
    assert answer["plan"]
    assert answer["checks"]
    assert asyncio.run(home.status()).counter == counter


def test_a_drain_survives_its_leader(home: Cluster) -> None:
    leader = asyncio.run(home.status()).leader
    asked = kfadmin(home, "drain", "n5", "--detach")
    assert asked.returncode == 0, asked.stderr
    home.kill(leader)
    asyncio.run(home.wait_for(lambda s: serves_nothing(s, "n5"), "n5 is drained by the next leader", 20.0))
    deadline = time.monotonic() + 20.0
    while kfadmin(home, "undrain", "n5").returncode != 0:
        assert time.monotonic() < deadline
    asyncio.run(home.wait_all_home())
