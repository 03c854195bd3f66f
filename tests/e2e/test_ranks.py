"""A stage of several ranks: kill -9 of one, of several, of their node; one that is stopped. No token changes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.contract.config import EngineConfig
from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

TOKENS = 96
RANKS = 3


@pytest.fixture(scope="module")
def ranked(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(instances=2, stages=2, ranks=RANKS, engine=EngineConfig(pool_blocks=512)) as running:
        yield running


def ranks_of(node: int) -> dict[str, int]:
    """The pids of a node's ranks, by name."""

    def children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    (parent,) = children(node)
    return {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in children(parent)}


def facts(status: ClusterStatus, node: str) -> tuple[int, tuple[str, ...]]:
    """How many ranks the node has lost, and what it complains of."""
    (found,) = [at for at in status.nodes if at.node == node]
    return found.counters.get("ranks_lost", 0), found.troubles


def incarnation(status: ClusterStatus, node: str) -> str:
    return next(at.incarnation for at in status.nodes if at.node == node)


@pytest.mark.parametrize(
    ("number", "victims"),
    [
        (signal.SIGKILL, ("kf-rank1",)),
        (signal.SIGKILL, ("kf-rank0", "kf-rank2")),
        (signal.SIGKILL, ("kf-rank0", "kf-rank1", "kf-rank2")),
        (signal.SIGSTOP, ("kf-rank2",)),
    ],
)
@pytest.mark.parametrize("node", ["n0", "n1"])
def test_a_rank_costs_no_token(ranked: Cluster, node: str, number: int, victims: tuple[str, ...]) -> None:
    asked = sample_prompts(6, TOKENS)

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) >= 20 for stream in streams), "tokens flow")
        ranks = ranks_of(ranked.node_pid(node))
        for victim in victims:
            os.kill(ranks[victim], number)

    async def scenario() -> None:
        before = await ranked.wait_all_home()
        lost, _ = facts(before, node)
        await ranked.references(asked)
        await ranked.expect_equal(await while_streaming(ranked, asked, kill))
        whole = (lost + len(victims), ())
        await ranked.wait_for(  # nobody asks for anything
            lambda status: facts(status, node) == whole, "all ranks are back", 30.0
        )
        after = await ranked.wait_all_home()
        assert incarnation(after, node) == incarnation(before, node), "the node was not to end"

    asyncio.run(scenario())


def test_a_node_with_its_ranks_costs_no_token(ranked: Cluster) -> None:
    """Ranks end with their node, whose stage is borrowed meanwhile."""
    asked = sample_prompts(6, TOKENS)

    async def kill(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) >= 20 for stream in streams), "tokens flow")
        ranks = ranks_of(ranked.node_pid("n1"))
        ranked.kill("n1")
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), "ranks end")

    async def scenario() -> None:
        await ranked.wait_all_home()
        await ranked.references(asked)
        await ranked.expect_equal(await while_streaming(ranked, asked, kill))
        await ranked.wait_all_home()

    asyncio.run(scenario())
