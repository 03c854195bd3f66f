"""What real controllers tell of a failure and of those who ask for something: incidents, audit, roles, epochs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

from controlplane.contract.auth import Role, derive, mint
from tests.io.controllers import Cluster, scenario, until


async def ask_as(cluster: Cluster, role: Role, method: str, path: str, **more: Any) -> httpx.Response:
    """As alice, with a token that was minted from the cluster's secret."""
    record = (await cluster.records())["c1"]
    token = mint(derive(cluster.secret, "admin"), "alice", role, int(time.time()) + 60)
    headers = {"authorization": f"Bearer {token}"}
    return await cluster.http.request(method, f"http://{record.admin_address}{path}", headers=headers, **more)


def test_a_death_is_an_incident(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        await until(cluster.leader, 5, "a leader is known", cluster)
        assert (await cluster.ask("c1", "GET", "/admin/v1/incidents")).json() == {"incidents": []}
        victim = cluster.nodes["n1"]
        cluster.nodes["n0"].down_links.add(victim.record.member)
        began = time.time()
        victim.die()

        async def told() -> dict[str, Any]:
            found = (await cluster.ask("c1", "GET", "/admin/v1/incidents")).json()["incidents"]
            return found[0] if found and found[0]["affected"] else {}

        incident = await until(told, 10, "the incident is told", cluster)
        assert (incident["node"], incident["incarnation"]) == ("n1", victim.record.member.incarnation)
        assert began - 1.0 < incident["began_unix_s"] < time.time()
        (affected,) = incident["affected"]
        assert affected["pipeline"] == "p0"
        assert affected["chosen"].endswith("n1 -> n3")
        assert 0.0 <= affected["plan_s"] < 5.0
        topology = cluster.topology
        assert topology is not None
        assert affected["epoch"] == next(p.epoch for p in topology.pipelines if p.id == "p0")

    scenario(tmp_path, body, controllers=1)


def test_who_asked_for_what_and_in_which_epoch(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        await until(cluster.leader, 5, "a leader is known", cluster)
        assert cluster.topology is not None
        epoch = cluster.topology.counter
        url = "/admin/v1/operations"
        asked = {"kind": "cordon", "node": "n1", "reason": "its fan is loud"}
        viewer = await ask_as(cluster, Role.VIEWER, "POST", url, json={"id": "op-0", **asked})
        assert viewer.status_code == 403
        late = await ask_as(
            cluster, Role.OPERATOR, "POST", url, json={"id": "op-1", "if_epoch": epoch - 1, **asked}
        )
        assert (late.status_code, late.json()["checks"][-1]["name"]) == (409, "epoch")
        right = await ask_as(
            cluster, Role.OPERATOR, "POST", url, json={"id": "op-2", "if_epoch": epoch, **asked}
        )
        assert (right.status_code, right.json()["accepted"]) == (200, True), right.text

        async def told() -> list[dict[str, Any]]:
            answer = await cluster.ask("c1", "GET", "/admin/v1/audit")
            entries = answer.json()["entries"]
            return entries if entries and entries[-1]["action"] == "done" else []

        refused, begun, done = await until(told, 10, "the audit has its end", cluster)
        assert [entry["action"] for entry in (refused, begun)] == ["refused", "submitted"]
        assert f"at epoch {epoch}" in refused["message"]
        for entry in (refused, begun):
            assert (entry["who"], entry["role"], entry["address"]) == ("alice", "operator", "127.0.0.1")
            assert entry["reason"] == "its fan is loud"
        assert (done["who"], done["role"], done["address"]) == ("c1", "controller", "")
        assert done["epoch_before"] == begun["epoch_after"] == epoch
        assert done["epoch_after"] > epoch
        assert await cluster.client.get(cluster.keys.operation("op-1")) is None

    scenario(tmp_path, body, controllers=1)
