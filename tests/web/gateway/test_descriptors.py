"""A gateway with few descriptors and many clients: idle ones make room, and who finds none is told so."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import httpx
import pytest

from controlplane.etcd.client import EtcdClient
from tests.io.etcd_server import EtcdMember, etcd_member
from tests.web.gateway.test_process import KEY, gateway_url, settings, until
from web.protocol import DESCRIPTORS_KEPT, client_connections_max, connections_max

HARD = 256
CLIENTS = 400
HOSTS = 8  # of which each has fewer than one client may have


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, HARD))


def soft_limit(pid: int) -> int:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(int(line.split()[3]) for line in lines if "open files" in line)


def test_idle_connections_do_not_make_a_gateway_deaf(tmp_path: Path) -> None:
    async def run(etcd_server: EtcdMember) -> None:
        path, _ = settings(tmp_path, etcd_server)
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
        process = await asyncio.create_subprocess_exec(
            *command, env=dict(os.environ), preexec_fn=few_descriptors
        )
        try:
            async with EtcdClient([etcd_server.endpoint]) as etcd:
                url = await gateway_url(etcd)
            assert soft_limit(process.pid) == HARD
            await check_clients(url, process.pid)
        finally:
            process.kill()
            await process.wait()

    with etcd_member(tmp_path / "etcd") as etcd_server:
        asyncio.run(run(etcd_server))


def test_connections_have_a_bound_however_many_descriptors_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for soft, most in ((64, 32), (1024, 896), (1073741816, 1 << 16), (resource.RLIM_INFINITY, 1 << 16)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections_max() == most
        assert client_connections_max() == most * 3 // 4


async def check_clients(url: str, gateway: int) -> None:
    host, _, port = url.removeprefix("http://").rpartition(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(CLIENTS)]
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10, verify=False) as client:
        for _ in range(3):
            assert (await client.get("/livez")).status_code == 200
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 9\r\n\r\n"
    busy = []
    # As on a slow machine: it finds all connections, and the end of those before, before it reads from the first.
    os.kill(gateway, signal.SIGSTOP)
    for _, writer in idle:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for _, writer in idle), return_exceptions=True)
    for number in range(CLIENTS):
        of = f"127.0.0.{1 + number % HOSTS}"
        busy.append(await asyncio.open_connection(host, int(port), local_addr=(of, 0)))
        busy[-1][1].write(head.encode())
    os.kill(gateway, signal.SIGCONT)
    refused = [0]

    async def read(reader: asyncio.StreamReader) -> None:
        answer = await reader.read(4096)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"as many connections as it can bear" in answer
        refused[0] += 1

    reading = [asyncio.create_task(read(reader)) for reader, _ in busy]
    # Nobody who has asked for something is cut without an answer.
    await until(lambda: refused[0] == CLIENTS - (HARD - DESCRIPTORS_KEPT))
    for task in reading:
        task.cancel()
    found = await asyncio.gather(*reading, return_exceptions=True)
    assert [error for error in found if isinstance(error, Exception)] == []
    for _, writer in busy:
        writer.close()

    async def answers() -> bool:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10, verify=False) as client:
            return (await client.get("/livez")).status_code == 200

    await until(answers)
