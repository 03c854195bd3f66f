"""A cluster with certificates: streams survive kills and a change of the authority under load, and strangers on the
host, with every port, the cluster's tokens and no certificate, get nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from controlplane.certs.folder import CertFolder
from controlplane.contract import auth, rpc
from controlplane.kfadmin.loadgen import Stream, StreamFailed, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.etcdctl import ask, find_etcdctl

PROMPTS = sample_prompts(8, 160)
ANSWER_S = 1.0


@pytest.fixture(scope="module")
def secure(etcd_binary: None) -> Iterator[Cluster]:
    with Cluster(secure=True, controllers=2, instances=2, stages=2, transport="sockets") as cluster:
        yield cluster


def certs_of(cluster: Cluster) -> CertFolder:
    return CertFolder(cluster.local.run_dir.path / "certs")


def test_kills_and_a_new_authority_under_load_cost_no_token(secure: Cluster) -> None:
    asyncio.run(secure.references(PROMPTS))
    certs = certs_of(secure)

    async def act(streams: list[Stream]) -> None:
        await until(lambda: all(len(s.tokens) >= 4 for s in streams), "tokens of every stream")
        certs.change_authority(datetime.now(UTC))
        epoch = (await secure.status()).pipelines[0].epoch
        secure.kill("n1")  # who comes back, and who takes over, connects with what is there now
        await secure.wait_for(lambda s: s.pipelines[0].epoch > epoch, "n1 is missed")
        certs.finish(datetime.now(UTC))

    streams = asyncio.run(while_streaming(secure, PROMPTS, act))
    asyncio.run(secure.expect_equal(streams))
    asyncio.run(secure.wait_all_home(60.0))
    secure.kill("g1")  # all of its connections are new, and so is etcd's view of it
    asyncio.run(until_served(secure))


async def until_served(cluster: Cluster) -> None:
    async def served() -> bool:
        try:
            streams = await cluster.generator.streams(PROMPTS[:1])
        except StreamFailed:  # it is not back yet
            return False
        return not streams[0].error

    async with asyncio.timeout(60.0):
        while not await served():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def listening(pids: set[int]) -> dict[int, int]:
    """TCP ports that these processes listen on, and whose they are."""
    sockets: dict[str, int] = {}
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                sockets[os.readlink(fd)] = pid
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            pid = sockets.get(f"socket:[{columns[9]}]")
            if columns[3] == "0A" and pid is not None:
                found[int(columns[1].rpartition(":")[2], 16)] = pid
    return found


def http_answer(port: int, context: ssl.SSLContext | None = None) -> bytes:
    """What a server says to a request without credentials; nothing, if it hangs up or waits."""
    request = b"GET /v3/kv/range HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), ANSWER_S) as plain:
        plain.settimeout(ANSWER_S)
        end = plain if context is None else context.wrap_socket(plain)
        end.sendall(request)
        while more := end.recv(4096):
            answer += more
    return answer


async def plain_grpc(port: int, token: str, path: str) -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {token}"), (rpc.STREAM_SCHEMA_KEY, str(rpc.STREAM_SCHEMA)))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(path)(metadata=metadata, timeout=ANSWER_S)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.read()
        call.cancel()
        return await call.code()


def test_strangers_get_nothing(secure: Cluster) -> None:
    local = secure.local
    own = {int(url.rpartition(":")[2]) for url in (*local.endpoints.gateways, *local.endpoints.admin)}
    ports = listening(set(local.pids().values()))
    assert own <= ports.keys()
    inner = sorted(ports.keys() - own)
    names = {pid: name for name, pid in local.pids().items()}
    assert {names[ports[port]].rstrip("0123456789") for port in inner} == {"etcd", "c", "n"}
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    token = auth.derive(auth.load_secret(local.config.secret_file), "grpc")  # even so
    for port in inner:
        who = f"{names[ports[port]]} at port {port}"
        said = http_answer(port)
        # etcd says in clear text that it wants TLS; a link says its challenge: random bytes.
        assert said[:1] in (b"", b"\x15") or b"400 Bad Request" in said or b"challenge" in said, (who, said)
        assert b"HTTP" not in http_answer(port, blind), who
        for path in (rpc.FRONTDOOR_SERVE, rpc.CONTROL_REPORT, "/etcdserverpb.KV/Range"):
            assert asyncio.run(plain_grpc(port, token, path)) in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ), (who, path)


def test_etcdctl_without_a_certificate_reads_and_writes_nothing(secure: Cluster) -> None:
    etcdctl = find_etcdctl()
    if etcdctl is None:
        pytest.skip("needs etcdctl")
    ca = certs_of(secure).ca
    before = asyncio.run(secure.status()).counter
    (endpoint,) = secure.local.config.etcd
    for verb in (["get", "--prefix", "/"], ["put", "/kevlarflow/x", "1"], ["del", "--prefix", "/"]):
        for scheme in ("http", "https"):
            asked = ask(etcdctl, f"{scheme}://{endpoint}", ca, verb)
            assert asked.returncode != 0
            assert asked.stdout == b""
    assert asyncio.run(secure.status()).counter == before


def test_no_secret_is_readable_by_others(secure: Cluster) -> None:
    root = secure.local.run_dir.path
    assert root.stat().st_mode & 0o077 == 0
    for path in (root / "certs").glob("*.pem"):
        private = b"PRIVATE KEY" in path.read_bytes()
        assert not private or path.stat().st_mode & 0o077 == 0, path
