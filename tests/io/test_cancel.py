"""Cancelling an operation while the leader writes how far it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from controlplane.contract.audit import Action
from controlplane.contract.auth import Caller, Role
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import Unavailable
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.values import KeyValue
from controlplane.history.store import Audit
from controlplane.keyspace.view import View
from controlplane.shell.service import Service
from tests.io.etcd_server import EtcdMember, etcd_member

ALICE = Caller("alice", Role.OPERATOR, "10.0.0.7")
KEY = Keys("kevlarflow").operation("op-1")
DRAIN = Operation("op-1", OperationKind.DRAIN, "n1", created_unix_s=1.0, message="copying")


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMember]:
    with etcd_member(tmp_path_factory.mktemp("etcd")) as member:
        yield member


@pytest.mark.parametrize(
    ("writes", "last", "answer"),
    [
        (3, OperationState.RUNNING, OperationState.CANCELLED),
        (3, OperationState.DONE, OperationState.DONE),
        (1000, OperationState.RUNNING, None),
    ],
)
def test_the_leader_writes_meanwhile(
    etcd: EtcdMember, writes: int, last: OperationState, answer: OperationState | None
) -> None:
    audited: list[Audit] = []

    class Racing(EtcdClient):
        """The leader writes right after each read."""

        left = writes

        async def get(self, key: str, **more: Any) -> KeyValue | None:
            found = await super().get(key, **more)
            if self.left:
                self.left -= 1
                state = OperationState.RUNNING if self.left else last
                await self.put(
                    KEY, encode(msgspec.structs.replace(DRAIN, state=state, message=f"{self.left}"))
                )
            return found

    async def body() -> None:
        async with Racing([etcd.endpoint]) as client:
            await client.put(KEY, encode(DRAIN))
            parts: Any = SimpleNamespace(
                client=client,
                controller=None,
                registry=SimpleNamespace(view=View(Keys("kevlarflow"), "default")),
                sources=None,
                history=SimpleNamespace(put=audited.append),
                recorder=None,
                identity=None,
            )
            service = Service(ClusterConfig("r", "m", ()), "c1", parts)
            with contextlib.nullcontext() if answer else pytest.raises(Unavailable, match="ask again"):
                operation = await service.cancel("op-1", ALICE)
                assert operation is not None
                assert operation.state is answer

    asyncio.run(body())
    assert [audit.action for audit in audited] == (
        [Action.CANCELLED] if answer is OperationState.CANCELLED else []
    )
    assert all(audit.caller == ALICE for audit in audited)
