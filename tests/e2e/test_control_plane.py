"""The control plane dies; the streams do not notice."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.e2e.test_moves import kfadmin

PROMPTS = sample_prompts(8, 200)


def flowing(streams: list[Stream], tokens: int) -> bool:
    return sum(len(s.tokens) for s in streams) >= tokens


def test_the_leader_is_killed_and_the_next_one_repairs(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))
    pids = home.local.node_pids()

    async def fault(streams: list[Stream]) -> None:
        await until(lambda: flowing(streams, 80), "tokens flow")
        leader = (await home.status()).leader
        home.local.hold(leader)
        home.kill(leader)
        home.kill("n6")
        await home.wait_for(lambda s: s.leader not in ("", leader), "the other candidate leads", 6.0)
        home.local.release(leader)

    streams = asyncio.run(while_streaming(home, PROMPTS, fault))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    changed = {n for n, pid in home.local.node_pids().items() if pids[n] != pid}
    assert changed == {"n6"}


def test_a_kill_is_told_as_one_incident(home: Cluster) -> None:
    """All its phases, and the streams that it touched."""
    asyncio.run(home.references(PROMPTS))
    known = {one["id"] for one in incidents(home)}

    async def fault(streams: list[Stream]) -> None:
        await until(lambda: flowing(streams, 80), "tokens flow")
        home.kill("n1")

    def fresh() -> list[dict[str, Any]]:
        return [one for one in incidents(home) if one["id"] not in known]

    streams = asyncio.run(while_streaming(home, PROMPTS, fault))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_all_home())
    asyncio.run(until(lambda: any(one["affected"] for one in fresh()), "the incident is told"))
    (incident,) = fresh()
    (affected,) = incident["affected"]
    assert incident["node"] == "n1"
    assert "n1 -> n" in affected["chosen"]
    assert affected["streams"] > 0
    for phase in ("plan_s", "connect_s", "restore_s", "first_token_s"):
        assert 0.0 <= affected[phase] < 5.0, phase
    whole = affected["ended_unix_s"] - incident["began_unix_s"]
    phases = sum(affected[name] for name in ("connect_s", "restore_s", "first_token_s"))
    assert phases <= whole < 10.0
    row = kfadmin(home, "incidents").stdout.splitlines()[-1]
    assert "n1" in row
    assert "goes on" not in row
    described = json.loads(kfadmin(home, "describe", "node", "n1", "-o", "json").stdout)
    assert "died" in {row["event"]["kind"] for row in described["events"]}


def incidents(cluster: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(kfadmin(cluster, "incidents", "-o", "json").stdout)
    return found


def test_both_controllers_are_killed(home: Cluster) -> None:
    asyncio.run(home.references(PROMPTS))
    pids = home.local.node_pids()

    async def fault(streams: list[Stream]) -> None:
        await until(lambda: flowing(streams, 80), "tokens flow")
        for name in ("c1", "c2"):
            home.local.hold(name)
            home.kill(name)
        seen = sum(len(s.tokens) for s in streams)
        await until(lambda: flowing(streams, seen + 400), "tokens flow without any controller")
        for name in ("c1", "c2"):
            home.local.release(name)

    streams = asyncio.run(while_streaming(home, PROMPTS, fault))
    asyncio.run(home.expect_equal(streams))
    asyncio.run(home.wait_for(lambda s: s.leader, "a controller leads again"))
    asyncio.run(home.wait_all_home())
    assert home.local.node_pids() == pids


def test_the_launcher_is_killed_and_its_nodes_live_on(home: Cluster) -> None:
    pids = home.local.node_pids()
    launcher = home.local.pids()["launcher"]
    home.kill("launcher")
    asyncio.run(
        home.wait_for(lambda _: home.local.pids().get("launcher") not in (None, launcher), "a new launcher")
    )
    assert home.local.node_pids() == pids
    home.kill("n2")
    asyncio.run(
        home.wait_for(
            lambda _: home.local.node_pids().get("n2") not in (None, pids["n2"]), "it restarts nodes"
        )
    )
    asyncio.run(home.wait_all_home())
