"""Scheduler, stages and replication together, under every kill, at every moment, in every order of messages."""

from __future__ import annotations

import pytest

from dataplane.core.checksums import Checksums
from tests.core.data.pipeline import PIPELINE, Cluster


def start(stages: int, seed: int, requests: int = 5, alike: bool = False, **kwargs: int) -> Cluster:
    """`alike`: many prompts begin as others do."""
    cluster = Cluster(stages, seed, **kwargs)
    for rid in range(1, requests + 1):
        prompt = [cluster.random.randrange(1000) for _ in range(cluster.random.randrange(1, 30))]
        if alike and rid % 4:
            prompt = [rid % 2] * cluster.random.randrange(1, 40) + prompt[:5]
        cluster.submit(rid, prompt, max_tokens=cluster.random.randrange(5, 25))
    return cluster


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_streams_equal_the_reference(stages: int, seed: int) -> None:
    cluster = start(stages, seed)
    cluster.run_to_end()
    cluster.check()


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("after", [3, 20, 60, 150, 300])
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_stage_costs_no_token(stage: int, after: int, seed: int) -> None:
    cluster = start(3, seed, 5 + seed % 2 * 5, alike=seed % 2 == 1)
    cluster.run(after)
    cluster.kill(stage)
    cluster.run_to_end()
    cluster.check()
    assert not cluster.refused


@pytest.mark.parametrize("seed", range(12))
def test_second_kill_during_recovery_and_hand_back(seed: int) -> None:
    cluster = start(3, seed)
    random = cluster.random
    cluster.run(random.randrange(200))
    first, second = random.sample(range(3), 2)
    cluster.kill(first)
    cluster.run(random.randrange(6))
    cluster.kill(second)
    cluster.run(random.randrange(100))
    for stage in (first, second):
        cluster.replace(stage, cluster.join(stage, f"n{stage}"), demote=random.random() < 0.5)
        cluster.run(random.randrange(60))
    cluster.run_to_end()
    cluster.check()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stage", range(3))
def test_a_planned_move_recomputes_only_what_its_copy_lacks(stage: int, seed: int) -> None:
    """To a blank node and on to another, while a copy is taken in the middle of computations."""
    # Room for all: what is preempted is recomputed, and rightly.
    cluster = start(3, seed, blocks=128, quota=60)
    cluster.run(cluster.random.randrange(20, 150))
    for name in ("x0", "x1"):
        before = cluster.scheduler.stats.tokens_recomputed
        lacks = cluster.move(stage, cluster.join(stage, name))
        cluster.run(cluster.random.randrange(20, 80))
        if stage == 0:
            before = 0  # another scheduler
        assert cluster.scheduler.stats.tokens_recomputed - before <= lacks
    cluster.run_to_end()
    cluster.check()


@pytest.mark.parametrize("seed", range(6))
def test_what_was_never_computed_is_not_computed_again(seed: int) -> None:
    """A planned move while long prompts are on their way in chunks: the rest of them is no loss."""
    cluster = Cluster(3, seed, blocks=400, quota=200)
    for rid in range(1, 7):
        cluster.submit(rid, [1000 * rid + k for k in range(100)], max_tokens=5)
    cluster.run(1)
    lacks = cluster.move(1, cluster.join(1, "x0"))
    cluster.run_to_end()
    cluster.check()
    assert cluster.scheduler.stats.requests_recovered > 0
    assert cluster.scheduler.stats.tokens_recomputed <= lacks < 100


def test_recovery_uses_the_replica_and_recomputes_only_the_tail() -> None:
    cluster = Cluster(2, seed=1)
    cluster.submit(1, list(range(40)), max_tokens=30)
    while len(cluster.received[1]) < 15:
        cluster.run(1)
    cluster.run(30)  # let acknowledgements arrive
    before = len(cluster.received[1])
    cluster.kill(1)
    cluster.run_to_end()
    cluster.check()
    assert before < 30
    assert cluster.scheduler.stats.requests_recovered == 1
    # Two part-filled blocks and what was in flight, not the whole of 55 tokens.
    assert cluster.scheduler.stats.tokens_recomputed <= 3 * 4


def test_a_corrupt_replica_is_recomputed_not_used() -> None:
    cluster = Cluster(2, seed=1)
    cluster.submit(1, list(range(40)), max_tokens=30)
    while len(cluster.received[1]) < 15:
        cluster.run(1)
    peer = cluster.nodes[cluster.peers[1]]
    row = next(iter(peer.store.copies.rows.values()))
    peer.kv.data[peer.store.table.blocks(row)[2]] ^= 1
    cluster.kill(1)
    cluster.run_to_end()
    cluster.check()
    assert peer.store.checksum_failures == 1


def test_without_the_checksum_the_corruption_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can see: with the safeguard off, the same fault gives wrong tokens."""
    cluster = Cluster(2, seed=1)
    cluster.submit(1, list(range(40)), max_tokens=30)
    while len(cluster.received[1]) < 15:
        cluster.run(1)
    peer = cluster.nodes[cluster.peers[1]]
    row = next(iter(peer.store.copies.rows.values()))
    peer.kv.data[peer.store.table.blocks(row)[2]] ^= 1
    monkeypatch.setattr(Checksums, "looked_at", lambda self, checks, sums: [])
    cluster.kill(1)
    cluster.run_to_end()
    with pytest.raises(AssertionError, match="position"):
        cluster.check()


@pytest.mark.parametrize("seed", range(6))
def test_preemption_under_a_small_quota(seed: int) -> None:
    cluster = start(2, seed, requests=8, blocks=40, quota=18)
    cluster.run(100)
    cluster.kill(seed % 2)
    cluster.run_to_end()
    cluster.check()
    assert cluster.scheduler.batcher.used_blocks == 0


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_is_left_behind(stage: int) -> None:
    cluster = start(2, seed=stage)
    cluster.run(80)
    cluster.kill(stage)
    cluster.run_to_end()
    for _ in range(60):  # past the orphan grace: what nobody claimed is swept
        cluster.run(40)
    for member in cluster.serving:
        node = cluster.nodes[member]
        assert not any(node.store.own.values())
        assert not node.store.copies.rows
        assert set(node.store.kept[PIPELINE]) == set(cluster.scheduler.batcher.account._cached)
        assert node.store.blocks_free + node.store.blocks_kept == node.store.num_blocks
