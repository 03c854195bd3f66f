"""An operation that is only wanted in one epoch, and what the audit says of those who ask; against a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from controlplane.contract.audit import Action
from controlplane.contract.auth import Caller, Role
from controlplane.contract.config import ClusterConfig
from controlplane.contract.keys import Keys, decode, encode
from controlplane.contract.records import Operation, OperationKind
from controlplane.contract.status import Check, OperationAnswer, OperationRequest
from controlplane.contract.topology import Mode, Topology
from controlplane.core.events import WriteOperation
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.history.store import Audit
from controlplane.keyspace.view import View
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from controlplane.shell.service import Service
from tests.io.etcd_server import EtcdMember, etcd_member

ALICE = Caller("alice", Role.OPERATOR, "10.0.0.7")
KEYS = Keys("kevlarflow")


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMember]:
    with etcd_member(tmp_path_factory.mktemp("etcd")) as member:
        yield member


def topology(counter: int) -> bytes:
    return encode(Topology("default", counter, Mode.REPLICATE, ()))


class Controller:
    """Accepts whatever is asked for; the topology changes meanwhile, if it is told so."""

    def preflight(self, request: OperationRequest) -> OperationAnswer:
        if request.node == "n0":
            return OperationAnswer(False, (Check("fail", "stage", "nobody can take it over"),), ())
        operation = Operation(request.id, OperationKind(request.kind), request.node)
        return OperationAnswer(True, (), ("cordon",), None if request.dry_run else operation)


class Racing(EtcdClient):
    """The topology changes right before the operation is written."""

    to: bytes = b""

    async def txn(self, *arguments: Any, **more: Any) -> Any:
        if self.to:
            await self.put(KEYS.topology("default"), self.to)
        return await super().txn(*arguments, **more)


def asked(operation_id: str, node: str = "n1", **more: Any) -> OperationRequest:
    return OperationRequest(operation_id, "drain", node, reason="disk", **more)


async def submit(
    client: EtcdClient, request: OperationRequest, audited: list[Audit]
) -> tuple[OperationAnswer, bool]:
    """The answer, and whether etcd has the operation afterwards."""
    parts: Any = SimpleNamespace(
        client=client,
        controller=Controller(),
        registry=SimpleNamespace(view=View(KEYS, "default"), operations={}),
        sources=None,
        history=SimpleNamespace(put=audited.append),
        recorder=None,
        identity=None,
    )
    answer = await Service(ClusterConfig("r", "m", ()), "c1", parts).submit(request, ALICE)
    return answer, await client.get(KEYS.operation(request.id)) is not None


def test_only_in_its_epoch(etcd: EtcdMember) -> None:
    audited: list[Audit] = []

    async def body() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await client.put(KEYS.topology("default"), topology(12))
            answer, there = await submit(client, asked("right", if_epoch=12), audited)
            assert (answer.accepted, there) == (True, True)
            answer, there = await submit(client, asked("wrong", if_epoch=11), audited)
            assert (answer.accepted, there, answer.operation) == (False, False, None)
            assert answer.checks[-1].level == "fail"
            assert "at epoch 12" in answer.checks[-1].message
            answer, there = await submit(client, asked("dry", if_epoch=11, dry_run=True), audited)
            assert answer.checks[-1].level == "fail"
            answer, there = await submit(client, asked("any"), audited)
            assert (answer.accepted, there) == (True, True)

    asyncio.run(body())
    assert [(one.action, one.about.id) for one in audited] == [
        (Action.SUBMITTED, "right"),
        (Action.REFUSED, "wrong"),
        (Action.SUBMITTED, "any"),
    ]
    assert {(one.caller, one.reason) for one in audited} == {(ALICE, "disk")}
    assert "at epoch 12" in audited[1].message


def test_who_asked_is_known_where_whoever_accepted_it_ended_at_once(etcd: EtcdMember) -> None:
    """It ends between etcd's answer and its own line of the audit: the leader that takes it up writes that line."""
    lost: list[Audit] = []
    audited: list[Audit] = []

    async def body() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await submit(client, asked("accepted"), lost)
            found = await client.get(KEYS.operation("accepted"))
            assert found is not None
            operation = decode(found.value, Operation, "accepted")
            history: Any = SimpleNamespace(put=audited.append)
            performer = Performer(client, KEYS, "default", Inbox(), history)
            performer.leadership = await Election(client, KEYS.leader, b"{}").campaign()
            revision = found.mod_revision
            for message in ("begins", "goes on"):
                write = WriteOperation(msgspec.structs.replace(operation, message=message), revision)
                await performer._perform(write)
                revision = getattr(performer._inbox.pop(), "mod_revision", 0)
            await performer.leadership.resign()

    asyncio.run(body())
    (line,) = audited
    assert line == lost[0]
    assert (line.action, line.about.id, line.reason) == (Action.SUBMITTED, "accepted", "disk")
    assert line.caller == ALICE


def test_a_topology_that_changes_in_this_very_moment(etcd: EtcdMember) -> None:
    audited: list[Audit] = []

    async def body() -> None:
        async with Racing([etcd.endpoint]) as client:
            await client.put(KEYS.topology("default"), topology(20))
            client.to = topology(21)
            answer, there = await submit(client, asked("raced", if_epoch=20), audited)
            assert (answer.accepted, there) == (False, False)
            assert "just changed" in answer.checks[-1].message
            answer, there = await submit(client, asked("careless"), audited)  # nobody asked for an epoch
            assert (answer.accepted, there) == (True, True)

    asyncio.run(body())
    assert [one.action for one in audited] == [Action.REFUSED, Action.SUBMITTED]


def test_what_the_preflight_refuses_is_audited_with_its_reason(etcd: EtcdMember) -> None:
    audited: list[Audit] = []

    async def body() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            _, there = await submit(client, asked("refused", "n0"), audited)
            assert not there

    asyncio.run(body())
    assert [(one.action, one.message) for one in audited] == [(Action.REFUSED, "nobody can take it over")]
