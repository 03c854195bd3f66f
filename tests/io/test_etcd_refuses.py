"""etcd refuses (it is out of space): a state that is reported and waited for, and the end of no process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
import pytest

from controlplane.contract.auth import derive
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.errors import EtcdError, EtcdUnavailable, EtcdUnknown, Outcome, outcome_of
from controlplane.etcd.health import CORRUPT, NO_SPACE, alarms_of
from controlplane.etcd.values import MemberStatus
from tests.io.controllers import Cluster, running, until
from tests.io.etcd_server import etcd_member

QUOTA = "--quota-backend-bytes=4194304"
FILL_BYTES = 700_000


async def fill(client: EtcdClient) -> None:
    """Write until etcd says that it is out of space."""
    for _ in range(100):
        try:
            await client.put("/filler", b"x" * FILL_BYTES)
        except (EtcdUnknown, EtcdUnavailable):
            continue
        except EtcdError as error:
            if "space exceeded" not in str(error):
                raise
            return
    raise AssertionError("etcd took everything")


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


async def make_room(client: EtcdClient, endpoint: str) -> None:
    """What an operator does: delete, compact, defragment, disarm."""
    await client.delete("/filler")
    await client.compact(await client.revision())
    member = (await client.status())[0].member_id
    disarm = b"\x08\x02\x10" + varint(member) + b"\x18\x01"  # DEACTIVATE, of this member, NOSPACE
    async with grpc.aio.insecure_channel(endpoint) as channel:
        for method, request in (("Defragment", b""), ("Alarm", disarm)):
            await channel.unary_unary(f"/etcdserverpb.Maintenance/{method}")(request, timeout=10)


def test_a_candidate_waits_while_etcd_is_full(tmp_path: Path) -> None:
    async def body(endpoint: str) -> None:
        async with EtcdClient([endpoint]) as client:
            await fill(client)
            election = Election(client, "leader/", b"me")
            campaign = asyncio.create_task(election.campaign())
            await until(lambda: election.campaigns >= 3, 10, "it tries again and again")
            assert not campaign.done(), "a refusal ended the campaign"
            assert "space" in election.last_error
            assert client.health.troubles()
            await make_room(client, endpoint)
            leadership = await asyncio.wait_for(campaign, 10)
            assert leadership.valid()
            assert election.last_error == ""
            await leadership.resign()

    with etcd_member(tmp_path / "etcd", [QUOTA]) as etcd:
        asyncio.run(body(etcd.endpoint))


def test_a_cluster_outlives_an_etcd_without_space(tmp_path: Path) -> None:
    async def kfadmin(cluster: Cluster, controller: str, *verb: str) -> tuple[int, str]:
        token = cluster.folder / "admin-token"
        token.write_text(derive(cluster.secret, "admin"))
        url = f"http://{(await cluster.records())[controller].admin_address}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controlplane.kfadmin.main", *verb, "--admin", url),
            *("--token-file", str(token)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode is not None
        return process.returncode, " ".join(out.decode().split())

    async def body(cluster: Cluster) -> None:
        for index in range(4):
            cluster.start_node(index)
        await until(cluster.settled, 20, "the cluster has formed", cluster)
        leader = await until(cluster.leader, 5, "a leader is known", cluster)
        other = next(name for name in cluster.controllers if name != leader)
        await fill(cluster.client)

        # The leader goes and comes back while etcd takes nothing: both controllers live, and say what is wrong.
        cluster.controllers[leader].kill()
        cluster.controllers[leader].wait(10)
        back = cluster.start_controller(leader)
        cluster.nodes["n1"].die()  # there is something to repair, which cannot be written

        async def told() -> bool:
            ready = await cluster.ask(other, "GET", "/readyz")
            assert ready.status_code == 200, "streams go on, and so does it"
            return "alarm disarm" in ready.text and "alarm disarm" in str(await cluster.status(other))

        await until(told, 20, "the alarm is in /readyz and in the status", cluster)
        code, text = await kfadmin(cluster, other, "check", "quorum")
        assert code == 3, text
        assert "out of space" in text
        code, text = await kfadmin(cluster, other, "status")
        assert code == 0, text
        assert "out of space" in text
        with pytest.raises(AssertionError, match="registered"):
            await until(lambda: back.poll() is not None, 4, "registered")
        assert cluster.controllers[other].poll() is None

        await make_room(cluster.client, cluster.etcd.endpoint)

        def repaired() -> bool:
            topology = cluster.topology
            return topology is not None and topology.counter > 0 and not topology.serving("n1")

        await until(repaired, 20, "the dead node is replaced as soon as etcd takes it", cluster)

        async def both() -> bool:
            return sorted(await cluster.records()) == sorted(cluster.controllers)

        await until(both, 20, "the controller that came back is registered", cluster)

        async def quiet() -> bool:
            return (await cluster.ask(other, "GET", "/readyz")).text == "ok\n"

        await until(quiet, 20, "nothing is wrong any more", cluster)
        assert back.poll() is None

    async def main() -> None:
        with etcd_member(tmp_path / "etcd", [QUOTA]) as etcd:
            folder = tmp_path / "run"
            folder.mkdir()
            async with running(folder, etcd, controllers=2) as cluster:
                await body(cluster)

    asyncio.run(main())


def test_alarms_are_told_in_words_and_each_once() -> None:
    full = MemberStatus("a", errors=("memberID:1 alarm:NOSPACE ", "memberID:2 alarm:CORRUPT "))
    assert alarms_of([full, full]) == (NO_SPACE, CORRUPT)
    assert alarms_of([MemberStatus("a", errors=("etcdserver: no leader",))]) == ()


class Answer(grpc.aio.AioRpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize(
    ("code", "details", "outcome"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Outcome.REFUSED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Outcome.NOT_APPLIED),
        (grpc.StatusCode.DATA_LOSS, "etcdserver: corrupt cluster", Outcome.REFUSED),
        (grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", Outcome.REFUSED),
        (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", Outcome.REFUSED),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large", Outcome.REFUSED),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: rpc not supported for learner", Outcome.NOT_APPLIED),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader", Outcome.NOT_APPLIED),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed", Outcome.UNKNOWN),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out", Outcome.UNKNOWN),
    ],
)
def test_what_a_refusal_says_of_the_write(code: grpc.StatusCode, details: str, outcome: Outcome) -> None:
    assert outcome_of(Answer(code, details)) is outcome
