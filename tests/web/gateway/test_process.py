"""The real kf-gateway process with a real etcd: registration, topology by watch, etcd away, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

import dataplane.demo
from controlplane.contract.auth import create_secret, derive
from controlplane.contract.config import ClusterConfig, TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, decode, encode
from controlplane.contract.records import GatewayRecord, NodeRecord
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.etcd.client import EtcdClient
from tests.io.etcd_server import EtcdMember, etcd_member
from tests.web.gateway.fake_node import FakeNode, reference
from tests.web.gateway.stack import KEY, Events, stream

KEYS = Keys("test")
PROMPT = (400, 401)


def settings(folder: Path, etcd: EtcdMember) -> tuple[Path, bytes]:
    config = ClusterConfig(
        run_dir=str(folder),
        model=str(dataplane.demo.model_dir()),
        etcd=(etcd.endpoint,),
        cluster="test",
        timing=TimingConfig(unavailable_grace_s=20),
    )
    path = folder / "cluster.json"
    path.write_bytes(encode(config))
    config.api_keys_file.write_text(f"# keys\n{KEY}\n")
    return path, create_secret(config.secret_file)


def record(node: FakeNode) -> bytes:
    return encode(
        NodeRecord(
            member=node.member,
            group="default",
            stage=0,
            num_stages=1,
            link_address="127.0.0.1:1",
            rpc_address=node.address,
            weights_digest="d",
            pool_blocks=1,
            block_size=16,
            pid=1,
        )
    )


def topology(counter: int, member: Member | None) -> bytes:
    ranks = (member,) if member else ()
    pipelines = (Pipeline("p0", counter, (Stage(("n0",), ranks),)),)
    return encode(Topology("default", counter, Mode.REPLICATE, pipelines))


async def until(condition: Callable[[], Any], limit_s: float = 15.0) -> Any:
    deadline = time.monotonic() + limit_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.02)


async def gateway_url(etcd: EtcdClient) -> str:
    async def look() -> str:
        value = await etcd.get(f"{KEYS.gateways}g7")
        return f"http://{decode(value.value, GatewayRecord, value.key).address}" if value else ""

    return str(await until(look))


def test_a_gateway_process(tmp_path: Path) -> None:
    async def run(etcd_server: EtcdMember) -> None:
        path, secret = settings(tmp_path, etcd_server)
        node = await FakeNode(Member("n0", "i0"), token=derive(secret, "grpc"), step_s=0.01).start()
        log = (tmp_path / "log").open("wb")
        command = [
            sys.executable,
            "-m",
            "web.gateway.main",
            "--config",
            str(path),
            "--id",
            "g7",
            "--port",
            "0",
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=dict(os.environ))
        try:
            async with EtcdClient([etcd_server.endpoint]) as etcd:
                url = await gateway_url(etcd)
                headers = {"authorization": f"Bearer {KEY}"}
                async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
                    assert (await client.get("/livez")).status_code == 200
                    assert (await client.get("/readyz")).status_code == 503
                    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 503
                    await etcd.put(KEYS.node("junk"), b"{nonsense")
                    await etcd.put(KEYS.topology("default"), b"[]")
                    await etcd.put(KEYS.topology("default"), topology(3, node.member))
                    await etcd.put(KEYS.node("n0"), record(node))
                    node.epochs["p0"] = 3
                    await until(lambda: ready(client))
                    await check_etcd_away(client, etcd_server)
                    await check_node_restart(client, etcd, node, derive(secret, "grpc"))
                    await check_sigterm(client, process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await node.stop()
            log.close()
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line[:1] == "{"]
        assert any(line["event"] == "junk in etcd" for line in lines)
        assert secret.decode() not in (tmp_path / "log").read_text()

    with etcd_member(tmp_path / "etcd") as etcd_server:
        asyncio.run(run(etcd_server))


async def ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


def request(seed: int, max_tokens: int) -> dict[str, Any]:
    return {"prompt": list(PROMPT), "seed": seed, "max_tokens": max_tokens, "return_token_ids": True}


async def check_etcd_away(client: httpx.AsyncClient, etcd_server: EtcdMember) -> None:
    """A stream goes on and a new one is served while there is no etcd at all."""
    old = Events()
    running = asyncio.create_task(stream(client, request(1, 100), into=old))
    await until(lambda: len(old.ids()) > 3)
    etcd_server.kill()
    assert (await stream(client, request(2, 20))).ids() == reference(PROMPT, 2, 20)
    await running
    assert old.ids() == reference(PROMPT, 1, 100)
    age = [x for x in (await client.get("/metrics")).text.splitlines() if "etcd_watch_age_seconds " in x]
    assert float(age[-1].split()[-1]) > 0.1
    etcd_server.start()
    await asyncio.to_thread(etcd_server.wait_healthy)


async def check_node_restart(client: httpx.AsyncClient, etcd: EtcdClient, old: FakeNode, token: str) -> None:
    """Another incarnation of the node at another address takes the stream over."""
    events = Events()
    running = asyncio.create_task(stream(client, request(3, 100), into=events))
    await until(lambda: len(events.ids()) > 3)
    await old.stop()
    new = await FakeNode(Member("n0", "i1"), token=token, epochs={"p0": 4}).start()
    try:
        await etcd.put(KEYS.topology("default"), topology(4, new.member))
        await etcd.put(KEYS.node("n0"), record(new))
        await running
        assert events.ids() == reference(PROMPT, 3, 100)
    finally:
        await new.stop()
        await old.start()
        old.running.clear()
        old.member, old.epochs = Member("n0", "i2"), {"p0": 6}
        await etcd.put(KEYS.node("n0"), record(old))
        # Names nobody: the record must not be lost.
        await etcd.put(KEYS.topology("default"), topology(5, None))
        await etcd.put(KEYS.topology("default"), topology(6, old.member))
        await until(lambda: ready(client))


async def check_sigterm(client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    """Each open stream is sent elsewhere, and the process is gone, within two seconds."""
    found = [Events() for _ in range(3)]
    tasks = [asyncio.create_task(stream(client, request(4, 1500), into=events)) for events in found]
    await until(lambda: all(len(events.ids()) > 3 for events in found))
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*tasks)
    for events in found:
        assert not events.done
        assert "event: reconnect" in events.fields
        assert "shutting down" in events.errors[0]["message"]
        assert events.ids() == reference(PROMPT, 4, 1500)[: int(events.last_id.partition(".")[2])]
    async with asyncio.timeout(5):
        assert await process.wait() == 0
    assert time.monotonic() - started < 2.5
