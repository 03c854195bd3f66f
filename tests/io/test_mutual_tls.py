"""Mutual TLS between processes: nobody speaks, or sends its token, before the other side has proved the name that is
meant; who has no certificate of the cluster, or one of another role, gets nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from controlplane.certs.folder import CertFolder
from controlplane.contract import rpc
from controlplane.contract.config import ClusterConfig, TimingConfig
from controlplane.contract.identity import Identity, ProcessName, ProcessRole, etcd_name
from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, ReportBatch
from controlplane.etcd.errors import EtcdError
from controlplane.etcd.server import ServerTls, etcd_command, find_etcd_binary
from controlplane.keyspace.connect import etcd_client
from controlplane.kfadmin.secure import etcd_healthy
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer
from dataplane.frontdoor import Frontdoor
from dataplane.weights_service import FETCH, Ask, WeightsService
from tests.certificates import CLUSTER, folder, settings
from tests.etcdctl import ask, find_etcdctl
from tests.io.etcd_server import EtcdMember, free_ports, wait_until
from web.gateway.routing.events import StreamUp
from web.gateway.routing.scheduler_streams import Links

N0, N1 = ProcessName(ProcessRole.NODE, "n0"), ProcessName(ProcessRole.NODE, "n1")
C1, G1 = ProcessName(ProcessRole.CONTROLLER, "c1"), ProcessName(ProcessRole.GATEWAY, "g1")
RELAY, ETCD = ProcessName(ProcessRole.RELAY, "host"), ProcessName(ProcessRole.ETCD, "etcd0")
LIMIT_S = 20.0
TOKEN = (("authorization", "Bearer token"), (rpc.STREAM_SCHEMA_KEY, str(rpc.STREAM_SCHEMA)))


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> CertFolder:
    all_of_them = [(name.role, name.name) for name in (N0, N1, C1, G1, RELAY, ETCD)]
    return folder(tmp_path_factory.mktemp("certs"), *all_of_them, hosts=("127.0.0.1",))


def identity(certs: CertFolder, me: ProcessName) -> Identity:
    return Identity(settings(certs), CLUSTER, me)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def front_door(certs: CertFolder, calls: list[Any]) -> AsyncIterator[str]:
    """Of n0; `calls` gets the metadata of whatever reaches it."""
    door = Frontdoor("token", lambda *_: None, lambda _: None, identity=identity(certs, N0))
    serve = door._serve

    async def noted(requests: Any, context: Any) -> AsyncIterator[Any]:
        calls.append(dict(context.invocation_metadata()))
        async for message in serve(requests, context):
            yield message

    door._serve = noted  # type: ignore[method-assign]
    address = await door.start("127.0.0.1")
    try:
        yield address
    finally:
        await door.close()


async def refusal(channel: Any, path: str = rpc.FRONTDOOR_SERVE) -> grpc.StatusCode:
    """How a stream to `path` with the right token ends."""
    async with channel:
        call = channel.stream_stream(path)(metadata=TOKEN)
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            return await call.code()


def test_a_gateway_speaks_only_to_the_node_that_it_means(certs: CertFolder) -> None:
    async def main() -> None:
        calls: list[Any] = []
        events: list[Any] = []
        async with front_door(certs, calls) as address:
            links = Links("token", events.append, identity(certs, G1))
            impostor, real = Member("n1", "x"), Member("n0", "x")
            links.locate(impostor, address)  # as a record says that was forged
            links.open(impostor)
            await until(lambda: links.reconnects >= 2)
            assert not calls, "the token went to a process that did not prove its name"
            links.locate(real, address)
            links.open(real)
            await until(lambda: bool(events))
            assert events == [StreamUp(real)]
            assert [call["authorization"] for call in calls] == ["Bearer token"]
            await links.aclose()

    asyncio.run(main())


def test_a_front_door_serves_gateways_of_its_cluster_and_nobody_else(
    certs: CertFolder, tmp_path: Path
) -> None:
    strangers = folder(tmp_path, (G1.role, G1.name))

    async def main() -> None:
        calls: list[Any] = []
        async with front_door(certs, calls) as address:
            # With the right token: plain, with a certificate of another authority, with none.
            assert await refusal(grpc.aio.insecure_channel(address)) is grpc.StatusCode.UNAVAILABLE
            theirs = Identity(settings(strangers), CLUSTER, G1)
            assert await refusal(theirs.channel(address, N0)) is grpc.StatusCode.UNAVAILABLE
            none = grpc.ssl_channel_credentials(certs.ca.read_bytes())
            named = [("grpc.ssl_target_name_override", N0.dns(CLUSTER))]
            anonymous = grpc.aio.secure_channel(address, none, options=named)
            assert await refusal(anonymous) is grpc.StatusCode.UNAVAILABLE
            assert not calls
            # Another role, and the role in another cluster.
            node = identity(certs, N1).channel(address, N0)
            assert await refusal(node) is grpc.StatusCode.PERMISSION_DENIED
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
            async with asyncio.timeout(LIMIT_S):
                answer = await reader.read()
            assert b"HTTP" not in answer
            writer.close()

    asyncio.run(main())


def test_weights_are_given_to_nodes_only(certs: CertFolder, tmp_path: Path) -> None:
    service = WeightsService("token", tmp_path, 0, 1, "digest", identity(certs, N0))

    async def main() -> None:
        door = Frontdoor(
            "token", lambda *_: None, lambda _: None, service.handler, identity=identity(certs, N0)
        )
        address = await door.start("127.0.0.1")

        async def asked(who: ProcessName) -> grpc.StatusCode:
            channel = identity(certs, who).channel(address, N0)
            async with channel, asyncio.timeout(LIMIT_S):
                call = channel.unary_stream(FETCH, request_serializer=rpc.encode)(Ask(), metadata=TOKEN)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call.read()
                return await call.code()  # type: ignore[no-any-return]

        assert await asked(G1) is grpc.StatusCode.PERMISSION_DENIED
        # It may, and there is no checkpoint here.
        assert await asked(N1) is grpc.StatusCode.FAILED_PRECONDITION
        await door.close()

    asyncio.run(main())


def report(node: str) -> ReportBatch:
    made = NodeReport(Member(node, "x"), 1, 0.0, 0)
    return ReportBatch(reports=((0, made),))


def test_a_node_reports_for_itself_and_a_relay_for_its_host(certs: CertFolder) -> None:
    async def said(address: str, who: ProcessName, node: str | None) -> grpc.StatusCode:
        """How the stream ends. `node` None: nothing is said, as grpc.aio calls a write to a refused stream an internal
        error."""
        channel = identity(certs, who).channel(address, C1)
        async with channel, asyncio.timeout(LIMIT_S):
            call = channel.stream_stream(
                rpc.CONTROL_REPORT, request_serializer=rpc.encode, response_deserializer=rpc.decode_ack
            )(metadata=TOKEN)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                if node is not None:
                    await call.write(report(node))
                await call.read()
                await call.done_writing()
            return await call.code()  # type: ignore[no-any-return]

    async def main() -> None:
        server = ReportServer("token", Inbox(), TimingConfig(), identity(certs, C1))
        address = await server.start("127.0.0.1")
        assert await said(address, N0, "n0") is grpc.StatusCode.OK
        assert await said(address, N0, "n1") is grpc.StatusCode.INVALID_ARGUMENT
        assert await said(address, RELAY, "n1") is grpc.StatusCode.OK
        assert await said(address, G1, None) is grpc.StatusCode.PERMISSION_DENIED
        await server.stop()

    asyncio.run(main())


def test_certificates_and_authorities_are_replaced_while_a_server_runs(tmp_path: Path) -> None:
    certs = folder(tmp_path / "certs", (N0.role, N0.name), (G1.role, G1.name))
    old = folder_copy(certs, tmp_path / "old")

    async def main() -> None:
        calls: list[Any] = []
        async with front_door(certs, calls) as address:

            async def served(by: CertFolder) -> bool:
                events: list[Any] = []
                links = Links("token", events.append, Identity(settings(by), CLUSTER, G1))
                member = Member("n0", "x")
                links.locate(member, address)
                links.open(member)
                await until(lambda: bool(events) or links.reconnects > 0)
                await links.aclose()
                return bool(events)

            assert await served(certs)
            certs.change_authority(datetime.now(UTC))
            assert await served(certs)
            assert await served(old), "who has not heard of the new authority is served meanwhile"
            certs.finish(datetime.now(UTC))
            assert await served(certs)
            assert not await served(old)

    asyncio.run(main())


def test_members_of_etcd_know_each_other(tmp_path: Path) -> None:
    names = ["etcd0", "etcd1", "etcd2"]
    certs = folder(tmp_path / "certs", *((ETCD.role, name) for name in names), hosts=("127.0.0.1",))
    ports = free_ports(6)
    peers = dict(zip(names, ports[3:], strict=True))
    members, tls = [], {}
    for name, port in zip(names, ports, strict=False):
        leaf = certs.path / f"{ProcessName(ETCD.role, name)}.pem"
        tls[name] = ServerTls(certs.ca, leaf, leaf)
        command = etcd_command(
            find_etcd_binary(os.environ),
            name,
            tmp_path / name,
            port,
            peers[name],
            members=peers,
            tls=tls[name],
        )
        members.append(EtcdMember(name, port, command, tmp_path / f"{name}.log"))
    try:
        for member in members:
            member.start()
        for member in members:
            wait_until(
                partial(etcd_healthy, member.endpoint, tls[member.name]), LIMIT_S, f"{member.name} is healthy"
            )
        assert not etcd_healthy(members[0].endpoint, None), "without a certificate nothing is said"
    finally:
        for member in members:
            member.kill()


def secure_etcd(certs: CertFolder, path: Path) -> EtcdMember:
    """One member, not started."""
    port, peer = free_ports(2)
    leaf = certs.path / f"{ETCD}.pem"
    command = etcd_command(
        find_etcd_binary(os.environ), "etcd0", path / "etcd", port, peer,
        tls=ServerTls(certs.ca, leaf, leaf), heartbeat_ms=30, election_ms=300,
    )  # fmt: skip
    return EtcdMember("etcd0", port, command, path / "etcd.log")


def folder_copy(certs: CertFolder, path: Path) -> CertFolder:
    path.mkdir()
    for file in certs.path.glob("*.pem"):
        fresh = path / file.name
        fresh.touch(mode=0o600)
        fresh.write_bytes(file.read_bytes())
    return CertFolder(path)


def test_etcd_takes_only_clients_of_the_cluster(tmp_path: Path) -> None:
    certs = folder(tmp_path / "certs", (C1.role, C1.name), (ETCD.role, ETCD.name), hosts=("127.0.0.1",))
    member = secure_etcd(certs, tmp_path)
    config = ClusterConfig(
        run_dir=str(tmp_path), model="m", etcd=(member.endpoint,), cluster=CLUSTER,
        tls=settings(certs, etcd_name(CLUSTER)),
    )  # fmt: skip

    async def main() -> None:
        async with etcd_client(config, Identity.of(config, C1.role, C1.name)) as client:
            await client.put("k", b"1", timeout_s=LIMIT_S)
            # The connection is lost after both have got certificates of another authority: etcd still trusts the old
            # one alone, as it read it when it started.
            certs.change_authority(datetime.now(UTC))
            await asyncio.to_thread(member.kill)
            member.start()
            assert (await client.get("k", timeout_s=LIMIT_S)) is not None
            certs.finish(datetime.now(UTC))
            await client.put("k", b"2", timeout_s=LIMIT_S)
        plain = ClusterConfig(run_dir=str(tmp_path), model="m", etcd=(member.endpoint,))
        async with etcd_client(plain, Identity.of(plain, C1.role, C1.name)) as stranger:
            with pytest.raises(EtcdError):
                await stranger.get("k", timeout_s=1.0)

    member.start()
    try:
        asyncio.run(main())
        if (etcdctl := find_etcdctl()) is not None:
            for verb in (["get", "k"], ["put", "k", "3"]):
                asked = ask(etcdctl, f"https://{member.endpoint}", certs.ca, verb)
                assert asked.returncode != 0
                assert asked.stdout == b""
    finally:
        member.kill()


def test_connections_between_processes_are_made_in_one_place() -> None:
    """What opens one past `Identity` and `etcd_client` would be plain, and ask nobody for a name."""
    root = Path(__file__).parents[2]
    made = {
        f"{path.relative_to(root)}: {call}"
        for plane in ("controlplane", "dataplane", "web")
        for path in (root / plane).rglob("*.py")
        for call in ("insecure_channel(", "add_insecure_port(", "EtcdClient(config")
        if call in path.read_text()
    }
    assert made == {
        "controlplane/contract/identity.py: insecure_channel(",
        "controlplane/contract/identity.py: add_insecure_port(",
        "controlplane/etcd/endpoints.py: insecure_channel(",
        "controlplane/keyspace/connect.py: EtcdClient(config",
        "dataplane/relay.py: add_insecure_port(",  # a Unix socket in the run directory
    }
