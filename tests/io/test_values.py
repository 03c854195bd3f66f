"""Real controllers and values that they cannot read, or that newer code wrote: left alone, told, recovered from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from controlplane.contract.keys import encode
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.schema import SCHEMA
from controlplane.etcd import wire
from tests.io.controllers import Cluster, scenario, until


async def troubles(cluster: Cluster) -> list[str]:
    return [str(t) for name in cluster.controllers for t in (await cluster.status(name))["troubles"]]


async def nobody_leads(cluster: Cluster) -> bool:
    return [(await cluster.status(name))["leader"] for name in cluster.controllers] == [""] * len(
        cluster.controllers
    )


def is_borrowed(cluster: Cluster) -> bool:
    return cluster.topology is not None and len(cluster.topology.serving("n3")) == 2


def die(cluster: Cluster) -> None:
    victim = cluster.nodes["n1"]
    cluster.nodes["n0"].down_links.add(victim.record.member)
    victim.die()


async def looked(cluster: Cluster) -> None:
    """Each controller has taken in what is in etcd now, and has had time to act on it."""
    marker = cluster.keys.node("n77")
    await cluster.client.put(marker, b"junk of the test")

    async def all_see() -> bool:
        found = [(await cluster.status(name))["troubles"] for name in cluster.controllers]
        return all(any("n77" in text for text in told) for told in found)

    await until(all_see, 10, "every controller has seen the marker", cluster)
    await cluster.client.delete(marker)
    await asyncio.sleep(2.0)  # of real time, in which a leader would have written many times


def test_a_topology_that_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        key = cluster.keys.topology(cluster.config.group)
        good = await cluster.client.get(key)
        assert good is not None
        strange = msgspec.json.encode(msgspec.json.decode(good.value) | {"mode": "erasure"})
        await cluster.client.put(key, strange)
        await until(lambda: nobody_leads(cluster), 10, "who led has stepped back", cluster)
        told = await troubles(cluster)
        assert any("does not lead" in text and "erasure" in text for text in told), told
        die(cluster)
        await looked(cluster)
        now = await cluster.client.get(key)
        assert now is not None
        assert now.value == strange, "it was overwritten"
        assert all(process.poll() is None for process in cluster.controllers.values())
        ready = await cluster.ask("c1", "GET", "/readyz")
        assert ready.status_code == 200
        assert "does not lead" in ready.text

        await cluster.client.put(key, good.value)
        await until(lambda: is_borrowed(cluster), 15, "somebody leads again, and repairs", cluster)
        await until(lambda: quiet(cluster), 5, "nothing is wrong any more", cluster)

    scenario(tmp_path, body, controllers=2)


async def quiet(cluster: Cluster) -> bool:
    return not await troubles(cluster)


def test_an_operation_of_newer_code_keeps_older_code_from_leading(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        key = cluster.keys.operation("newer-1")
        raw: dict[str, Any] = msgspec.json.decode(encode(Operation("newer-1", OperationKind.DRAIN, "n0")))
        strange = msgspec.json.encode(raw | {"schema": SCHEMA + 1, "kind": "evacuate"})
        await cluster.client.put(key, strange)
        await until(lambda: nobody_leads(cluster), 10, "who led has stepped back", cluster)
        assert any("newer code" in text for text in await troubles(cluster))
        cancelled = await cluster.ask("c1", "DELETE", "/admin/v1/operations/newer-1")
        assert cancelled.status_code == 503, cancelled.text
        await looked(cluster)
        assert (await cluster.client.get(key)).value == strange  # type: ignore[union-attr]
        await cluster.client.delete(key)
        leader = await until(cluster.leader, 10, "somebody leads again", cluster)
        assert leader

    scenario(tmp_path, body, controllers=2)


def test_an_operation_that_cannot_be_read_stops_nothing_else(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        key = cluster.keys.operation("strange-1")
        raw: dict[str, Any] = msgspec.json.decode(encode(Operation("strange-1", OperationKind.DRAIN, "n0")))
        strange = msgspec.json.encode(raw | {"state": "suspended"})
        await cluster.client.put(key, strange)

        async def told() -> bool:
            return any("strange-1 cannot be read" in text for text in await troubles(cluster))

        await until(told, 5, "it is told", cluster)
        die(cluster)
        await until(lambda: is_borrowed(cluster), 10, "a death is repaired all the same", cluster)
        await looked(cluster)
        assert (await cluster.client.get(key)).value == strange  # type: ignore[union-attr]
        again = await cluster.ask(
            "c1", "POST", "/admin/v1/operations", json={"id": "strange-1", "kind": "drain", "node": "n0"}
        )
        assert again.status_code == 503, "an id that is used is not free"

    scenario(tmp_path, body, controllers=1)


def test_no_bytes_in_etcd_end_a_controller_and_what_it_reads_it_can_write(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        junk = b'{"id":"x","kind":"drain","message":"r\xe9paration"}'
        await cluster.client.put(cluster.keys.operation("x"), junk)
        await cluster.client.put(cluster.keys.node("n78"), b'{"a":' * 3000)
        await cluster.client.put(wire.key_text(cluster.keys.operations.encode() + b"\xff"), b"junk")
        await cluster.client.put(cluster.keys.operation("scale-1"), b'{"id":"scale-1","kind":"scale"}')
        key, later = cluster.keys.topology(cluster.config.group), b',"later":1e999}'

        async def add() -> bool:
            found = await cluster.client.get(key)
            assert found is not None
            await cluster.client.put(key, found.value[:-1] + later)
            return True

        await until(add, 5, "another hand has written", cluster)
        die(cluster)
        await until(lambda: is_borrowed(cluster), 10, "a death is repaired", cluster)
        found = await cluster.client.get(key)
        assert found is not None
        assert found.value.endswith(later)
        assert cluster.topology is not None
        assert not any(pipeline.closing for pipeline in cluster.topology.pipelines)
        told = "".join(await troubles(cluster))
        assert all(name in told for name in ("operations/x", "nodes/n78", "operations/\\xff")), told
        ready = await cluster.ask("c1", "GET", "/readyz")
        assert (ready.status_code, "operations/\\xff" in ready.text) == (200, True)
        assert all(process.poll() is None for process in cluster.controllers.values())
        assert (await cluster.client.get(cluster.keys.operation("x"))).value == junk  # type: ignore[union-attr]
        failed = await cluster.client.get(cluster.keys.operation("scale-1"))
        assert failed is not None
        assert b'"failed"' in failed.value

    scenario(tmp_path, body, controllers=2)


def test_fields_of_newer_code_survive_what_a_leader_writes(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        key = cluster.keys.topology(cluster.config.group)

        async def add() -> bool:
            found = await cluster.client.get(key)
            assert found is not None
            raw = msgspec.json.decode(found.value)
            for item in (raw, *raw["pipelines"], *(s for p in raw["pipelines"] for s in p["stages"])):
                item["rack_policy"] = "spread"
            await cluster.client.put(key, msgspec.json.encode(raw))
            return True

        await until(add, 5, "newer code has written", cluster)
        die(cluster)
        await until(lambda: is_borrowed(cluster), 10, "older code has written", cluster)
        found = await cluster.client.get(key)
        assert found is not None
        raw = msgspec.json.decode(found.value)
        items = (raw, *raw["pipelines"], *(s for p in raw["pipelines"] for s in p["stages"]))
        assert all(item["rack_policy"] == "spread" for item in items), raw

    scenario(tmp_path, body, controllers=1)
