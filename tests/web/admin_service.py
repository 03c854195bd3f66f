"""An `AdminService` in memory, whose cluster a test writes down, and a real server around it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import uvicorn

from controlplane.contract.audit import AuditEntry
from controlplane.contract.auth import Caller
from controlplane.contract.config import ClusterConfig, redacted
from controlplane.contract.credentials import CredentialChange
from controlplane.contract.errors import Unavailable
from controlplane.contract.events import Event
from controlplane.contract.figures import Figures
from controlplane.contract.ids import Member
from controlplane.contract.incidents import Incident
from controlplane.contract.lives import Life, Lives
from controlplane.contract.protection import Protection
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.revocations import Revocation
from controlplane.contract.status import (
    Check,
    ClusterStatus,
    ControllerStatus,
    GatewayStatus,
    NodeState,
    NodeStatus,
    OperationAnswer,
    OperationRequest,
    PipelineState,
    PipelineStatus,
    StageStatus,
)
from controlplane.contract.topology import Mode
from controlplane.core.protection import protection
from controlplane.history.incidents import incidents
from web.admin.app import build_app

if TYPE_CHECKING:
    from web.admin.oidc.provider import Provider

TOKEN = "test-admin-token"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def healthy(instances: int = 2, stages: int = 4) -> ClusterStatus:
    """A cluster in which everything serves at home."""

    def name(instance: int, stage: int) -> str:
        return f"n{instance % instances * stages + stage}"

    def stage_status(instance: int, stage: int) -> StageStatus:
        return StageStatus(
            homes=(name(instance, stage),),
            serving=(Member(name(instance, stage), "aaaa"),),
            borrowed=False,
            replicas=(Member(name(instance + 1, stage), "aaaa"),),
            lag_tokens=0,
        )

    pipelines = tuple(
        PipelineStatus(
            id=f"p{instance}",
            state=PipelineState.UP,
            epoch=instance + 1,
            stages=tuple(stage_status(instance, stage) for stage in range(stages)),
            running=8,
            waiting=0,
        )
        for instance in range(instances)
    )
    nodes = tuple(
        NodeStatus(
            node=name(instance, stage),
            state=NodeState.GREEN,
            incarnation="aaaa",
            stage=stage,
            serving=(f"p{instance}/{stage}",),
            link_address="127.0.0.1:7000",
            rpc_address="127.0.0.1:7001",
            pid=4000 + instance * stages + stage,
            silent_s=0.05,
            progress=1234,
            blocks_used=410,
            blocks_replica=390,
            blocks_total=2048,
            counters={"tokens": 100, "ranks_lost": 2 * (name(instance, stage) == "n1")},
        )
        for instance in range(instances)
        for stage in range(stages)
    )
    return ClusterStatus(
        cluster="test",
        group="default",
        model="kevlar-demo",
        mode=Mode.REPLICATE,
        available=True,
        counter=12,
        paused=False,
        leader="c1",
        answered_by="c1",
        etcd_age_s=0.2,
        nodes=nodes,
        pipelines=pipelines,
        controllers=(
            ControllerStatus("c1", "127.0.0.1:8100", 11, leader=True),
            ControllerStatus("c2", "127.0.0.1:8101", 12, leader=False),
        ),
        gateways=(GatewayStatus("g1", "127.0.0.1:8000", 13),),
        operations=(),
    )


class MemoryService:
    """Keeps operations in a dict; refuses what concerns the node "n0"."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.ready = True
        self.cluster = healthy()
        self.history: list[Event] = []
        self.history_away = False
        self.measured: list[Figures] = []
        self.lived: list[Life] = []
        self.looks = 0  # statuses and events that were asked for
        self.known: dict[str, Operation] = {}
        self.revoked: dict[str, Revocation] = {}
        self.callers: list[Caller] = []
        self.noted: list[tuple[CredentialChange, Caller]] = []
        self.requests: list[OperationRequest] = []
        self.audited: list[AuditEntry] = []
        self.config = ClusterConfig("run", "model", ("127.0.0.1:1",))
        self.quorum_checks = [Check("ok", "etcd", "3 of 3 etcd members are healthy, 2 are needed")]

    def troubles(self) -> Sequence[str]:
        return self.cluster.troubles

    async def status(self) -> ClusterStatus:
        self.looks += 1
        return msgspec.structs.replace(self.cluster, operations=tuple(self.known.values()))

    async def quorum(self) -> Sequence[Check]:
        return self.quorum_checks

    async def metrics(self) -> bytes:
        return b"kevlarflow_epoch 1\n"

    async def events(self, limit: int, after: int = 0) -> Sequence[tuple[int, Event]]:
        self.looks += 1
        if self.history_away:
            raise Unavailable("the history database is away")
        return [row for row in enumerate(self.history, 1) if row[0] > after][-limit:]

    async def incidents(self, limit: int) -> Sequence[Incident]:
        return incidents(enumerate(self.history, 1))[-limit:]

    async def protection(self) -> Protection:
        return protection(self.cluster, self.config, await self.incidents(20))

    async def lives(self, request: str) -> Lives:
        return Lives(request, tuple(life for life in self.lived if life.request == request), ("g2",))

    def figures_now(self, after_unix_s: float) -> Sequence[Figures]:
        return [row for row in self.measured if row.unix_s > after_unix_s]

    async def figures(self, since_unix_s: float, until_unix_s: float, rows_max: int) -> Sequence[Figures]:
        return [row for row in self.measured if since_unix_s < row.unix_s <= until_unix_s][-rows_max:]

    async def audit(self, limit: int, after: int = 0, operation: str = "") -> Sequence[AuditEntry]:
        told = [one for one in self.audited if one.id > after and operation in ("", one.operation)]
        return told[-limit:]

    def settings(self) -> ClusterConfig:
        return redacted(self.config)

    async def operations(self) -> Sequence[Operation]:
        return list(self.known.values())

    def is_revoked(self, ids: Sequence[str]) -> bool:
        if not self.ready:
            raise Unavailable("not read yet")
        return any(one in self.revoked for one in ids)

    async def revoke(self, wanted: Revocation, caller: Caller, *, audited: bool = False) -> None:
        self.revoked[wanted.id] = wanted

    def note(self, change: CredentialChange, caller: Caller) -> None:
        self.noted.append((change, caller))

    async def submit(self, request: OperationRequest, caller: Caller) -> OperationAnswer:
        self.callers.append(caller)
        self.requests.append(request)
        if request.id in self.known:
            return OperationAnswer(True, (), (), self.known[request.id])
        if request.if_epoch not in (None, self.cluster.counter):
            return OperationAnswer(False, (Check("fail", "epoch", "another epoch"),), ())
        if request.node == "n0":
            return OperationAnswer(False, (Check("fail", "capacity", "n0 has no peer"),), ())
        checks, plan = (Check("ok", "capacity", "fine"),), (f"cordon {request.node}",)
        if request.dry_run:
            return OperationAnswer(False, checks, plan)
        kind = OperationKind(request.kind)
        operation = Operation(
            request.id, kind, request.node, instances=request.instances, created_unix_s=time.time()
        )
        self.known[request.id] = operation
        return OperationAnswer(True, checks, plan, operation)

    async def cancel(self, operation_id: str, caller: Caller) -> Operation | None:
        operation = self.known.get(operation_id)
        if operation is not None and operation.open:
            operation = msgspec.structs.replace(
                operation, state=OperationState.CANCELLED, finished_unix_s=time.time()
            )
            self.known[operation_id] = operation
        return operation


@contextlib.contextmanager
def serving(
    service: MemoryService, port: int = 0, provider: Callable[[str], Provider] | None = None
) -> Iterator[str]:
    """A real HTTP server for `service` on loopback; its base URL. `provider`: made for it, who signs people in."""
    listener = socket.create_server(("127.0.0.1", port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = build_app(service, TOKEN, provider(url) if provider is not None else None, service.note)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield url
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not end although streams were open"


def drain(node: str, operation_id: str = "op-1", **more: object) -> dict[str, object]:
    return {"id": operation_id, "kind": "drain", "node": node, **more}
