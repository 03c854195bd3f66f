"""Stages that die with parity in the place of copies: every stream is exact, and little is computed again."""

from __future__ import annotations

import pytest

from controlplane.contract.config import ParityConfig
from controlplane.contract.topology import Mode
from dataplane import parity
from dataplane._fast.blocktable import Rows
from dataplane.core.messages import pack_rows
from tests.core.data.coded import Coded
from tests.core.data.pipeline import BLOCK, PIPELINE


class Bare(Coded):
    mode = Mode.NONE


class Double(Coded):
    settings = ParityConfig(code="rs", parities=2)


class Diagonal(Coded):
    settings = ParityConfig(code="rdp", parities=2)


def start(kind: type[Coded], stages: int, seed: int, requests: int = 5) -> Coded:
    cluster = kind(stages, seed)
    for rid in range(1, requests + 1):
        prompt = [cluster.random.randrange(1000) for _ in range(cluster.random.randrange(10, 40))]
        if rid % 2:
            prompt = [rid % 2] * 14 + prompt[:20]
        cluster.submit(rid, prompt, max_tokens=16)
    while min(map(len, cluster.received.values())) < 8:
        cluster.run(1)
    return cluster


def recomputed(kind: type[Coded], stages: int, seed: int, *lost: int) -> int:
    """Kills stages when all is protected; tokens that had to be computed again."""
    cluster = start(kind, stages, seed)
    if kind.mode is Mode.PARITY:
        cluster.settle_some()
    cluster.kill_stages(*lost)
    cluster.run_to_end()
    cluster.check()
    assert not cluster.refused
    return cluster.scheduler.stats.tokens_recomputed


@pytest.mark.parametrize(("stages", "stage"), [(2, 1), (3, 2), (4, 1)])
def test_a_lost_stage_is_restored_from_parity(stages: int, stage: int) -> None:
    coded, bare = recomputed(Coded, stages, stages, stage), recomputed(Bare, stages, stages, stage)
    # The open block of each request, what was in flight, and the blocks that had filled just before.
    assert coded < bare / 2


def test_a_node_that_is_full_of_what_nobody_waits_for_restores_all_the_same() -> None:
    """Its pool has no free block, and what has them is of a pipeline that is down."""
    cluster = start(Coded, 3, 3)
    cluster.settle_some()
    store = cluster.nodes[cluster.peers[2]].store
    store.idle = frozenset({"p9"})
    while store.blocks_free:
        rows = Rows(pack_rows([(store.blocks_free, 0, min(60, store.blocks_free) * BLOCK, False)]))
        filled = store.begin("p9", rows)
        assert filled is not None
        store.commit(filled, rows)
    cluster.kill_stages(2)
    cluster.run_to_end()
    cluster.check()
    assert cluster.scheduler.stats.tokens_recomputed < recomputed(Bare, 3, 3, 2) / 2


@pytest.mark.parametrize("stages", [2, 4])
def test_the_first_stage_is_restored_and_its_scheduler_taken_over(stages: int) -> None:
    cluster = start(Coded, stages, 5)
    cluster.kill(0)
    cluster.run_to_end()
    cluster.check()
    node = cluster.nodes[cluster.serving[0]]
    assert node.parity.restorer.blocks_restored > 0


@pytest.mark.parametrize("kind", [Double, Diagonal])
@pytest.mark.parametrize("lost", [(1, 2), (2, 3), (0, 2)])
def test_two_stages_are_lost_at_once(kind: type[Coded], lost: tuple[int, int]) -> None:
    cluster = start(kind, 4, 7)
    cluster.kill_stages(*lost)
    cluster.run_to_end()
    cluster.check()
    for stage in lost:
        assert cluster.nodes[cluster.serving[stage]].parity.restorer.blocks_restored > 0


def test_more_stages_than_parities_are_computed_again() -> None:
    cluster = start(Coded, 4, 8)
    cluster.kill_stages(1, 2)
    cluster.run_to_end()
    cluster.check()
    for stage in (1, 2):
        restorer = cluster.nodes[cluster.serving[stage]].parity.restorer
        assert restorer.blocks_restored == 0
        assert restorer.blocks_refused > 0


def test_a_block_that_two_requests_share_is_coded_once() -> None:
    cluster = Coded(3, 1)
    for rid in (1, 2, 3):
        cluster.submit(rid, [7] * 25, max_tokens=4)
    cluster.run_to_end()
    cluster.settle()
    names = [name for names in cluster.encoded().values() for name in names]
    assert len(names) == len(set(names)) == 28 // BLOCK


def test_parity_takes_its_share_of_what_copies_would() -> None:
    """K / N, for blocks whose size the code does not round up."""
    for kind, parities in ((Coded, 1), (Double, 2)):
        cluster = start(kind, 4, 3)
        cluster.run_to_end()
        cluster.settle()
        cluster.wait_for_drops()
        kept = sum(len(cluster.nodes[m].store.kept[PIPELINE]) for m in cluster.serving)
        size = cluster.nodes[cluster.serving[0]].kv.block_bytes
        used = sum(n.parity.encoding.encoder.used_bytes for n in cluster.nodes.values() if n.alive)
        held = sum(
            len(part)
            for n in cluster.nodes.values()
            for parts in n.parity.encoding.bytes.parities.values()
            for part in parts
        )
        assert used == held
        assert used == pytest.approx(kept * size * parities / 4, rel=0.03)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_some_requests_are_computed_again_while_others_are_restored(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever are chosen: every stream is exact."""

    def odd(lacking: dict[int, int], *costs: object) -> set[int]:
        return {rid for rid, blocks in lacking.items() if rid % 2 and blocks}

    monkeypatch.setattr(parity, "computed_again", odd)
    cluster = start(Coded, 4, 11)
    cluster.settle_some()
    cluster.kill(stage)
    cluster.run_to_end()
    cluster.check()
    assert not cluster.refused
    assert cluster.nodes[cluster.serving[stage]].parity.restorer.blocks_restored > 0
    assert cluster.scheduler.stats.tokens_recomputed >= 3 * 10, "of the odd ones nothing was restored"
