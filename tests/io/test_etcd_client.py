"""The etcd client against real etcd: values, transactions, and what each failure is called."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.etcd.client import EtcdClient
from controlplane.etcd.endpoints import EtcdTls
from controlplane.etcd.errors import (
    EtcdCompacted,
    EtcdError,
    EtcdLeaseGone,
    EtcdUnavailable,
    EtcdUnknown,
)
from controlplane.etcd.values import Compare, Delete, Deleted, Get, Put, PutDone, Snapshot
from tests.io.etcd_proxy import eventually, no_task_left
from tests.io.etcd_server import EtcdMember, etcd_cluster, etcd_member


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMember]:
    with etcd_member(tmp_path_factory.mktemp("etcd")) as member:
        yield member


def test_values_and_prefixes(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            first = await client.put("values/a", b"\x00\xff")
            second = await client.put("values/a", b"2")
            await client.put("values0", b"a neighbour that the prefix must not take")
            assert second == first + 1
            kv = await client.get("values/a")
            assert kv is not None
            assert (kv.value, kv.create_revision, kv.mod_revision, kv.version) == (b"2", first, second, 2)
            snapshot = await client.get_prefix("values/")
            assert list(snapshot.items) == ["values/a"]
            assert snapshot.revision >= second
            assert await client.get("values/none") is None
            assert await client.delete("values/", prefix=True) == 1
            assert await client.delete("values/a") == 0
            assert await client.get("values0") is not None
            with pytest.raises(ValueError, match="empty"):
                await client.put("", b"")

    asyncio.run(main())


def test_a_transaction_is_guarded(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            created = await client.txn([Compare.absent("txn/k")], [Put("txn/k", b"1")])
            assert created.succeeded
            assert created.results == (PutDone(),)
            again = await client.txn([Compare.absent("txn/k")], [Put("txn/k", b"2")], [Get("txn/k")])
            assert not again.succeeded
            (found,) = again.results
            assert isinstance(found, Snapshot)
            assert found.items["txn/k"].value == b"1"

            swap = [Compare.mod_revision("txn/k", created.revision)]
            swapped = await client.txn(swap, [Put("txn/k", b"3"), Get("txn/", prefix=True)])
            assert swapped.succeeded
            assert not (await client.txn(swap, [Put("txn/k", b"4")])).succeeded
            guard = [Compare.create_revision("txn/k", created.revision), Compare.value("txn/k", b"3")]
            removed = await client.txn(guard, [Delete("txn/", prefix=True)])
            assert removed.results == (Deleted(1),)
            assert await client.get("txn/k") is None

    asyncio.run(main())


def test_refusals_are_named(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            with pytest.raises(EtcdLeaseGone):
                await client.put("refused/k", b"", lease=0x1234)
            await client.lease_revoke(0x1234)  # ended leases may be ended again
            revision = await client.put("refused/k", b"1")
            await client.compact(revision)
            with pytest.raises(EtcdCompacted):
                await client.compact(revision)
            with pytest.raises(EtcdError, match="too large") as caught:
                await client.put("refused/large", bytes(2_000_000))
            assert not isinstance(caught.value, EtcdUnavailable | EtcdUnknown)
            (status,) = await client.status()
            assert status.is_leader
            assert status.version.startswith("3.")
            assert status.db_size_bytes > 0
            assert status.problem == ""

    asyncio.run(main())


def test_a_write_without_an_answer_is_unknown_and_one_never_sent_is_not(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint], timeout_s=0.6) as client:
            await client.put("k", b"old")
            member.pause()
            started = time.monotonic()
            with pytest.raises(EtcdUnknown):
                await client.put("k", b"new")
            with pytest.raises(EtcdUnknown):
                await client.txn([], [Put("k", b"new")])
            with pytest.raises(EtcdUnavailable) as caught:
                await client.get("k")
            assert not isinstance(caught.value, EtcdUnknown)
            assert time.monotonic() - started < 3
            (status,) = await client.status(timeout_s=0.2)
            assert status.problem
            member.resume()
            kv = await client.get("k", timeout_s=5)
            assert kv is not None
            assert kv.value in (b"old", b"new")
            assert client.counters.unknown == 2

            member.kill()
            with pytest.raises(EtcdError) as first:  # the connection may break under this one
                await client.put("k", b"newer")
            assert isinstance(first.value, EtcdUnavailable | EtcdUnknown)
            with pytest.raises(EtcdUnavailable):
                await client.put("k", b"newer")
            member.start()
            await client.put("k", b"newest", timeout_s=10)  # waits for the connection, then sends

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_closing_the_client_names_the_calls_in_flight(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        client = EtcdClient([member.endpoint], timeout_s=10)
        await client.put("k", b"old")
        member.pause()
        writing = asyncio.create_task(client.put("k", b"new"))
        reading = asyncio.create_task(client.get("k"))
        await eventually(lambda: client.counters.calls == 3, 5, "both calls have begun")
        await client.close()
        outcomes = await asyncio.wait_for(asyncio.gather(writing, reading, return_exceptions=True), 5)
        assert isinstance(outcomes[0], EtcdUnknown)
        assert isinstance(outcomes[1], EtcdUnavailable)
        with pytest.raises(EtcdUnavailable, match="closed"):
            await client.put("k", b"")
        await no_task_left()

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_the_leader_of_three_dies_while_we_put(tmp_path: Path) -> None:
    async def main(members: list[EtcdMember]) -> None:
        async with EtcdClient([member.endpoint for member in members]) as client:
            statuses = await client.status()
            leader = next(index for index, status in enumerate(statuses) if status.is_leader)
            acknowledged: dict[int, float] = {}
            unknown = 0
            killed_at = 0.0
            for number in range(2000):
                if number == 50:
                    members[leader].kill()
                    killed_at = time.monotonic()
                try:
                    await client.put(f"n/{number}", b"", timeout_s=1.0)
                    acknowledged[number] = time.monotonic()
                except EtcdUnknown:
                    unknown += 1
                except EtcdUnavailable:
                    pass
                if killed_at and sum(at > killed_at for at in acknowledged.values()) >= 20:
                    break
            first_after = min(at for at in acknowledged.values() if at > killed_at)
            assert first_after - killed_at < 6
            kept = (await client.get_prefix("n/")).items
            assert {f"n/{number}" for number in acknowledged} <= kept.keys()
            assert len(kept) <= len(acknowledged) + unknown
            statuses = await client.status()
            assert [bool(status.problem) for status in statuses].count(True) == 1
            assert [status.is_leader for status in statuses].count(True) == 1
            assert statuses[leader].problem

    with etcd_cluster(tmp_path, 3, election_ms=500) as members:
        asyncio.run(main(members))


def test_reads_pass_over_a_stopped_member(tmp_path: Path) -> None:
    async def main(members: list[EtcdMember]) -> None:
        async with EtcdClient([member.endpoint for member in members]) as client:
            await client.put("k", b"1")
            members[0].pause()  # the preferred one; perhaps the leader
            try:
                kv = await client.get("k", timeout_s=6)
                assert kv is not None
                assert client.counters.endpoint_switches >= 1
                started = time.monotonic()
                await client.get("k")
                assert time.monotonic() - started < 1  # and it stays with the good one
            finally:
                members[0].resume()

    with etcd_cluster(tmp_path, 3, election_ms=500) as members:
        asyncio.run(main(members))


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    ca, server, mine = (_certificate(tmp_path, name) for name in ("ca", "server", "mine"))
    with etcd_member(tmp_path / "plain") as member:
        member.kill()
        secure = [argument.replace("client-urls=http:", "client-urls=https:") for argument in member.command]
        member.command = [
            *secure,
            f"--cert-file={server[0]}",
            f"--key-file={server[1]}",
            f"--trusted-ca-file={ca[0]}",
            "--client-cert-auth",
        ]
        member.start()

        async def main() -> None:
            tls = EtcdTls(ca=ca[0], cert=mine[0], key=mine[1])
            async with EtcdClient([f"https://{member.endpoint}"], tls=tls) as client:
                await client.put("k", b"1", timeout_s=10)
            async with EtcdClient([member.endpoint], tls=EtcdTls(ca=ca[0]), timeout_s=0.5) as stranger:
                with pytest.raises(EtcdError):
                    await stranger.put("k", b"2")
            async with EtcdClient([f"https://{member.endpoint}"], tls=tls) as client:
                kv = await client.get("k")
                assert kv is not None
                assert kv.value == b"1"

        asyncio.run(main())


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) signed by the authority `ca`, which signs itself and must be made first."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "2", "-subj", f"/CN={name}", "-out", str(cert), "-keyout", str(key)]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    if name != "ca":
        command += ["-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key")]
        command += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    return cert, key


def test_bad_endpoints_are_refused() -> None:
    async def main() -> None:
        for endpoints, tls in (([], None), (["host"], None), (["ftp://h:1"], None), (["https://h:1"], None)):
            with pytest.raises(ValueError, match="endpoint"):
                EtcdClient(endpoints, tls=tls)

    asyncio.run(main())


def test_waiting_for_etcd_has_a_deadline() -> None:
    async def main() -> None:
        async with EtcdClient(["127.0.0.1:1"], timeout_s=0.3) as client:
            started = time.monotonic()
            with pytest.raises(EtcdUnavailable, match=r"within 0\.3 s"):
                await client.put("k", b"")
            assert 0.2 < time.monotonic() - started < 1.5
            await eventually(lambda: client.counters.unavailable == 1, 1, "the refusal is counted")

    asyncio.run(main())
