"""`kfadmin etcd roles` on a real etcd: with a node's key one writes no topology, and who works goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from controlplane.certs.folder import CertFolder
from controlplane.contract.config import ClusterConfig
from controlplane.contract.identity import RELAY_NAME, Identity, ProcessName, ProcessRole, etcd_name
from controlplane.contract.keys import Keys
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError
from controlplane.etcd.register import Registration
from controlplane.keyspace.connect import etcd_client
from controlplane.keyspace.permissions import ROLES
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.secure import etcd_healthy, etcd_tls
from tests.certificates import CLUSTER, folder, settings
from tests.io.etcd_server import EtcdMember, wait_until
from tests.io.test_mutual_tls import secure_etcd

LIMIT_S = 15.0
KEYS = Keys(CLUSTER)
TOPOLOGY = KEYS.topology("default")
ETCD = ProcessName(ProcessRole.ETCD, "etcd0")
CONTROLLER = ProcessName(ProcessRole.CONTROLLER, "c1")
NODE = ProcessName(ProcessRole.NODE, "n0")
GATEWAY = ProcessName(ProcessRole.GATEWAY, "g1")
RELAY = ProcessName(ProcessRole.RELAY, RELAY_NAME)
STRANGER = ProcessName(ProcessRole.NODE, "elsewhere")  # certified, and nobody has told etcd
EVERYBODY = (ETCD, CONTROLLER, NODE, GATEWAY, RELAY, STRANGER)
# What decides what a cluster does, and what belongs to others.
FORBIDDEN = (
    TOPOLOGY,
    KEYS.operation("op-1"),
    KEYS.revoked("t1"),
    f"{KEYS.leader}1",
    KEYS.controller("c1"),
    KEYS.hearing("c1"),
    "/kevlarflow/test@other/groups/other/topology",
    "/kevlarflow/another/groups/default/topology",
    "elsewhere",
)


@pytest.fixture
def member(tmp_path: Path) -> Iterator[EtcdMember]:
    certs = folder(tmp_path / "certs", *((one.role, one.name) for one in EVERYBODY), hosts=("127.0.0.1",))
    made = secure_etcd(certs, tmp_path)
    config(tmp_path, made)
    try:
        made.start()
        wait_until(lambda: healthy(tmp_path, made), LIMIT_S, "etcd is healthy")
        yield made
    finally:
        made.kill()


def healthy(path: Path, member: EtcdMember) -> bool:
    return etcd_healthy(member.endpoint, etcd_tls(config(path, member), ETCD))


def config(path: Path, member: EtcdMember) -> ClusterConfig:
    run_dir = RunDir(path / "run")
    run_dir.prepare()
    made = ClusterConfig(
        run_dir=str(run_dir.path), model="-", etcd=(member.endpoint,), cluster=CLUSTER,
        tls=settings(CertFolder(path / "certs"), etcd_name(CLUSTER)),
    )  # fmt: skip
    run_dir.write("cluster.json", made)
    return made


@contextlib.asynccontextmanager
async def acting_as(path: Path, member: EtcdMember, process: ProcessName) -> AsyncIterator[EtcdClient]:
    settled = config(path, member)
    identity = Identity.of(settled, process.role, process.name)
    async with asyncio.timeout(120), etcd_client(settled, identity) as client:
        yield client


async def kfadmin(path: Path, *words: str) -> Result:
    """In a thread: it has a loop of its own."""
    arguments = ["etcd", *words, "--run-dir", str(path / "run")]
    return await asyncio.to_thread(CliRunner().invoke, app, arguments)


async def may_write(client: EtcdClient, key: str) -> bool:
    try:
        await client.put(key, b"{}", timeout_s=LIMIT_S)
    except EtcdError as error:
        if "permission denied" in str(error):
            return False
        raise
    return True


@pytest.mark.timeout(180)
def test_who_has_a_nodes_key_writes_no_topology(tmp_path: Path, member: EtcdMember) -> None:
    async def main() -> None:
        async with acting_as(tmp_path, member, CONTROLLER) as controller:
            lease, _ = await controller.lease_grant(600)
            await controller.put(KEYS.revoked("t2"), b"{}", lease, timeout_s=LIMIT_S)
        async with acting_as(tmp_path, member, NODE) as node:
            assert await may_write(node, TOPOLOGY)  # every certificate opens all of etcd
            done = await kfadmin(tmp_path, "roles", "--nodes", "4")
            assert done.exit_code == 0, done.output
            assert [key for key in FORBIDDEN if await may_write(node, key)] == []
            with pytest.raises(EtcdError, match="permission denied"):
                await node.delete(KEYS.root, prefix=True, timeout_s=LIMIT_S)
            assert await may_write(node, KEYS.node("n0"))
            with pytest.raises(EtcdError, match="permission denied"):
                # Which would delete what a controller has written.
                await node.lease_revoke(lease, timeout_s=LIMIT_S)
            found = await node.get_prefix(KEYS.root)  # it follows the cluster as before
            assert TOPOLOGY in found.items
        async with acting_as(tmp_path, member, GATEWAY) as gateway:
            assert [key for key in (*FORBIDDEN, KEYS.node("n0")) if await may_write(gateway, key)] == []
            assert await may_write(gateway, KEYS.gateway("g1"))
            assert await may_write(gateway, f"{KEYS.root}waiting/gateways/g1")
        async with acting_as(tmp_path, member, RELAY) as relay:
            assert not await may_write(relay, KEYS.node("n0"))
            assert (await relay.get(TOPOLOGY)) is not None
        async with acting_as(tmp_path, member, CONTROLLER) as controller:
            mine = [key for key in FORBIDDEN if await may_write(controller, key)]
            assert mine == list(FORBIDDEN[:-2])  # also of groups of this cluster that come; nothing of others
            assert (await controller.status())[0].problem == ""
            with pytest.raises(EtcdError):
                await controller.users.disable()
        async with acting_as(tmp_path, member, STRANGER) as stranger:
            with pytest.raises(EtcdError):
                await stranger.get(TOPOLOGY, timeout_s=LIMIT_S)
        assert await asyncio.to_thread(healthy, tmp_path, member)

    asyncio.run(main())


@pytest.mark.timeout(180)
def test_nobody_who_works_notices(tmp_path: Path, member: EtcdMember) -> None:
    """Watches, leases and names of processes that run, through the change, through etcd's restart, and back."""

    async def main() -> None:
        async with (
            acting_as(tmp_path, member, NODE) as node,
            acting_as(tmp_path, member, STRANGER) as registered,
            acting_as(tmp_path, member, CONTROLLER) as controller,
        ):
            names = [
                Registration(node, KEYS.node("n0"), b'{"member":{"node":"n0","incarnation":"a"}}', 5),
                Registration(registered, KEYS.node("elsewhere"), b'{"member":{"node":"elsewhere"}}', 5),
            ]
            running = [asyncio.create_task(name.run()) for name in names]
            for name in names:
                await name.held.wait()
            watch = node.watch_prefix(KEYS.root)
            seen: list[bytes] = []

            async def follow() -> None:
                async for batch in watch:
                    seen.extend(e.now.value for e in batch.events if e.now is not None and e.key == TOPOLOGY)

            running.append(asyncio.create_task(follow()))

            async def told(value: bytes) -> None:
                await controller.put(TOPOLOGY, value, timeout_s=LIMIT_S)
                async with asyncio.timeout(LIMIT_S):
                    while value not in seen:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)

            await told(b"1")
            leases = [item.lease for item in (await node.get_prefix(KEYS.nodes)).items.values()]
            done = await kfadmin(tmp_path, "roles")
            assert done.exit_code == 0, done.output
            await told(b"2")
            assert watch.reconnects == 0
            again = await kfadmin(tmp_path, "roles", "--admin", "b")  # with what has come since
            assert again.exit_code == 0, again.output
            await told(b"3")
            await asyncio.to_thread(member.kill)
            member.start()
            await asyncio.to_thread(wait_until, lambda: healthy(tmp_path, member), LIMIT_S, "etcd is back")
            await told(b"4")  # on new connections
            now = [item.lease for item in (await node.get_prefix(KEYS.nodes)).items.values()]
            assert now == leases  # nobody had to register anew
            for words in (["status"], ["defrag"], ["snapshot", str(tmp_path / "s.db")]):
                cared = await kfadmin(tmp_path, *words)
                assert cared.exit_code == 0, cared.output
            undone = await kfadmin(tmp_path, "roles", "--undo")
            assert undone.exit_code == 0, undone.output
            assert await may_write(node, KEYS.operation("op-1"))
            await told(b"5")
            assert not any(task.done() for task in running)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("key", ["/kevlarflow/another/nodes/n0", "/kevlarflow/tests/nodes/n0", "0"])
def test_an_etcd_with_others_keys_is_left_alone(tmp_path: Path, member: EtcdMember, key: str) -> None:
    async def main() -> None:
        async with acting_as(tmp_path, member, NODE) as node:
            await node.put(key, b"{}", timeout_s=LIMIT_S)
            done = await kfadmin(tmp_path, "roles")
            assert (done.exit_code, "others' keys" in done.output) == (3, True), done.output
            assert await may_write(node, TOPOLOGY)

    asyncio.run(main())


def test_each_kind_of_process_that_speaks_with_etcd_has_a_role() -> None:
    without = {ProcessRole.ETCD, ProcessRole.ADMIN}  # etcd's own role root
    assert set(ROLES) == set(ProcessRole) - without
