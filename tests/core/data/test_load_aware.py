"""Modes load-aware and fixed-neighbour: each request's KV has a holder, and there it goes on when its instance dies."""

from __future__ import annotations

import asyncio

import pytest

from bench.kevlarflow_check import expected_tokens
from bench.kevlarflow_load import Request
from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode
from dataplane import replica
from dataplane.core import replication
from tests.core.data.instances import Instances
from tests.core.data.line import BLOCK

PROMPT = tuple(range(100, 121))
OUTPUT = 14
PART = (2 - len(PROMPT)) % BLOCK  # of tokens received: then the first one of a block has KV
OTHERS = {2: tuple(range(300, 309)), 3: tuple(range(500, 533))}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies do not wait for company: real time plays no part."""
    monkeypatch.setattr(replication, "COPY_EVERY_S", 0.0)
    monkeypatch.setattr(replica, "LOOK_EVERY_S", 0.0)


def wanted(prompt: tuple[int, ...], rid: int, stages: int) -> list[int]:
    return expected_tokens([Request(0.0, prompt, OUTPUT, rid)], stages, 2048)[0]


async def play(mode: Mode, stages: int, victim: int, after: int) -> Instances:
    """A stage of the pipeline that has request 1 dies when this many tokens of it are out."""
    async with Instances(mode, 3, stages) as cluster:
        for rid, prompt in {1: PROMPT, **OTHERS}.items():
            cluster.submit(rid, prompt, OUTPUT)
        await cluster.until(
            lambda: (len(cluster.received[1]) >= after and cluster.router._live.get(1)) or after == 0
        )
        live = cluster.router._live.get(1)
        if live is not None and live.pipeline is not None:
            instance = int(live.pipeline[1:])
            cluster.kill(Member(f"n{instance * stages + victim}", "a"))
        await cluster.until(lambda: len(cluster.ended) == 3)
        for node in cluster.nodes.values():
            if node.alive:
                node.worker._store.check()
        return cluster


@pytest.mark.parametrize("mode", [Mode.LOAD_AWARE, Mode.FIXED_NEIGHBOUR])
@pytest.mark.parametrize(("stages", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_kill_at_every_token_costs_no_token(mode: Mode, stages: int, victim: int) -> None:
    for after in range(OUTPUT):
        cluster = asyncio.run(play(mode, stages, victim, after))
        assert not cluster.failed
        for rid, prompt in {1: PROMPT, **OTHERS}.items():
            assert cluster.received[rid] == wanted(prompt, rid, stages), f"request {rid} after {after}"


def test_who_moves_goes_to_its_holder_and_computes_only_what_that_lacks() -> None:
    async def scenario() -> None:
        async with Instances(Mode.LOAD_AWARE, 3, 2) as cluster:
            cluster.submit(1, PROMPT, 80)
            await cluster.until(
                lambda: (live := cluster.router._live.get(1)) and live.holder and live.log.emitted
            )
            live = cluster.router._live[1]
            home, holder = live.pipeline, live.holder
            assert home is not None
            instance = int(home[1:])
            source = cluster.nodes[Member(f"n{2 * instance}", "a")].worker.replicator
            there = Member(f"n{2 * int(str(holder)[1:])}", "a")
            copy = source._protected[home].sources[there]
            # In the middle of a block, since whole ones may be there as soon as they are full.
            await cluster.until(
                lambda: copy.acked(1) >= len(PROMPT) + 2 * BLOCK and len(cluster.received[1]) % BLOCK == PART
            )
            before = cluster.recomputed
            cluster.kill(Member(f"n{2 * instance + 1}", "a"))
            await cluster.until(lambda: cluster.ended)
            assert cluster.moved == [(1, holder)]
            assert 0 < cluster.recomputed - before < len(PROMPT)

    asyncio.run(scenario())


def test_copies_are_dropped_with_their_request_and_wherever_they_are_not_wanted_any_more() -> None:
    async def scenario() -> None:
        async with Instances(Mode.LOAD_AWARE, 3, 1) as cluster:
            cluster.submit(1, PROMPT, 90)
            await cluster.until(lambda: (live := cluster.router._live.get(1)) and live.holder)
            live = cluster.router._live[1]
            first, other = live.holder, ({"p0", "p1", "p2"} - {live.holder, live.pipeline}).pop()
            assert first is not None
            holders = cluster.scheduler(str(live.pipeline)).holders
            holders.heard(first, 100_000, 1e9)  # as if it had become busy
            holders._loads[first] = 100_000.0, 1e9
            holders._loads[other] = 0.0, 1e9
            holders._want(1, holders._placed[1], other)
            await cluster.until(lambda: live.holder == other)
            store = cluster.nodes[Member(f"n{first[1:]}", "a")].worker._store
            await cluster.until(lambda: not store.copies.rows)
            held = cluster.nodes[Member(f"n{other[1:]}", "a")].worker._store
            assert held.copies.rows
            await cluster.until(lambda: cluster.ended)
            await cluster.until(lambda: not held.copies.rows)

    asyncio.run(scenario())


def test_a_copy_that_made_room_is_not_believed_in_until_it_is_there_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replication, "REFUSED_PAUSE_S", 0.004)

    async def scenario() -> None:
        async with Instances(Mode.LOAD_AWARE, 3, 2) as cluster:
            cluster.submit(1, PROMPT, 95)
            await cluster.until(lambda: (live := cluster.router._live.get(1)) and live.holder)
            live = cluster.router._live[1]
            holder, holders = live.holder, cluster.scheduler(str(live.pipeline)).holders
            last = Member(f"n{2 * int(str(holder)[1:]) + 1}", "a")
            node = cluster.nodes[last].worker
            node._store.copies.evict_row((live.pipeline, 1))  # served KV has needed the room
            await cluster.until(lambda: live.holder is None)
            assert 1 in holders
            await cluster.until(lambda: live.holder)
            there = Member(f"n{2 * int(str(live.holder)[1:]) + 1}", "a")
            assert cluster.nodes[there].worker._store.copies.tokens((live.pipeline, 1)) >= len(PROMPT) - BLOCK

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("hosts", "allowed"), [(("a", "a", "b", "b"), {"p2", "p3"}), (("a", "a", "a", "a"), {"p1", "p2", "p3"})]
)
def test_never_in_its_own_fault_domain_if_there_is_another(hosts: tuple[str, ...], allowed: set[str]) -> None:
    async def scenario() -> None:
        async with Instances(Mode.LOAD_AWARE, 4, 1, hosts=hosts) as cluster:
            cluster.submit(1, PROMPT, 20)
            await cluster.until(lambda: cluster.ended)
            assert set(cluster.scheduler("p0").holders._candidates) == allowed

    asyncio.run(scenario())
