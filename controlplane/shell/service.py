"""What the admin API may ask of a controller. Any controller answers; the leader acts on what etcd then holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import structlog

from controlplane.contract.audit import Action, AuditEntry
from controlplane.contract.auth import Caller
from controlplane.contract.config import ClusterConfig, redacted
from controlplane.contract.errors import NewerSchema, PeerError, Unavailable
from controlplane.contract.events import Event
from controlplane.contract.figures import Figures
from controlplane.contract.identity import PLAIN, Identity
from controlplane.contract.incidents import Incident
from controlplane.contract.keys import Keys, decode, encode
from controlplane.contract.lives import Lives
from controlplane.contract.protection import Protection
from controlplane.contract.records import Asked, Operation, OperationKind, OperationState
from controlplane.contract.revocations import ENTRIES_MAX, ENTRIES_PER_NAME_MAX, LEEWAY_S, Revocation
from controlplane.contract.status import (
    Check,
    ClusterStatus,
    ControllerStatus,
    GatewayStatus,
    OperationAnswer,
    OperationRequest,
)
from controlplane.contract.topology import Topology
from controlplane.core.controller import Controller
from controlplane.core.protection import protection
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError, EtcdUnknown
from controlplane.etcd.values import Compare, Delete, KeyValue, Put
from controlplane.history.store import Audit, submitted
from controlplane.history.writer import HistoryWriter
from controlplane.shell.figures import Recorder
from controlplane.shell.metrics import Sources, render
from controlplane.shell.pieces import finish
from controlplane.shell.quorum import quorum
from controlplane.shell.registry import Registry

log = structlog.get_logger()

CALL_LIMIT_S = 2.0
CANCEL_TRIES = 5  # the leader may write how far an operation is between our read and our write
INCIDENTS_MEASURED = 20  # the last ones tell how long it takes to find a failure and to connect anew
FINISHED_KEPT = 50  # operations that have ended and stay in etcd; all of them stay in the history


@dataclass(frozen=True, slots=True)
class Parts:
    """The pieces of one controller process that the service speaks to."""

    controller: Controller
    registry: Registry
    client: EtcdClient
    history: HistoryWriter
    sources: Sources
    recorder: Recorder
    identity: Identity = PLAIN


class Service:
    """Implements `web.admin.service.AdminService`."""

    def __init__(self, config: ClusterConfig, me: str, parts: Parts) -> None:
        self._config = config
        self._me = me
        self._keys = Keys.of(config)
        self._controller = parts.controller
        self._registry = parts.registry
        self._client = parts.client
        self._history = parts.history
        self._sources = parts.sources
        self._recorder = parts.recorder
        self._identity = parts.identity

    @property
    def ready(self) -> bool:
        return self._registry.synced.is_set()

    async def status(self) -> ClusterStatus:
        status = await finish(self._controller.status_in_pieces(time.monotonic()))
        registry = self._registry
        controllers = sorted(registry.controllers.values(), key=lambda record: record.id)
        gateways = sorted(registry.gateways.values(), key=lambda record: record.id)
        of_nodes = [f"{node.node}: {text}" for node in status.nodes for text in node.troubles]
        return msgspec.structs.replace(
            status,
            leader=registry.leader,
            answered_by=self._me,
            etcd_age_s=registry.etcd_age_s(),
            controllers=tuple(
                ControllerStatus(
                    item.id,
                    item.admin_address,
                    item.pid,
                    item.id == registry.leader,
                    item.version,
                    item.settings,
                )
                for item in controllers
            ),
            gateways=tuple(
                GatewayStatus(item.id, item.address, item.pid, item.version, item.settings)
                for item in gateways
            ),
            operations=tuple(self._operations()),
            troubles=(*self.troubles(), *of_nodes, *self._client.health.warnings()),
        )

    def is_revoked(self, ids: Sequence[str]) -> bool:
        if not self.ready:
            raise Unavailable("which sessions and tokens were revoked has not been read from etcd yet")
        revoked = self._registry.view.revoked
        return any(one in revoked for one in ids)

    async def revoke(self, wanted: Revocation, caller: Caller, *, audited: bool = False) -> None:
        known = self._registry.view.revoked
        of_name = 0 if audited else sum(one.name == wanted.name for one in known.values())
        if len(known) >= ENTRIES_MAX * (1 + audited) or of_name >= ENTRIES_PER_NAME_MAX:
            raise Unavailable(
                f"{len(known)} sessions and tokens are revoked, which is the bound, or {wanted.name} has"
                f" {ENTRIES_PER_NAME_MAX}: some have to expire first"
            )
        ttl_s = max(0, wanted.expiry_unix_s - int(time.time())) + LEEWAY_S
        key = self._keys.revoked(wanted.id)
        try:
            lease, _ = await self._client.lease_grant(ttl_s, timeout_s=CALL_LIMIT_S)
            await self._client.put(key, encode(wanted), lease, timeout_s=CALL_LIMIT_S)
        except EtcdError as error:
            raise Unavailable(f"it may not have been revoked; ask again: {error}") from error
        known[wanted.id] = wanted  # at once; other controllers are told by their watch
        log.info("revoked", id=wanted.id, of=wanted.name, by=caller.name, address=caller.address)
        if audited:
            self._audit(Action.REVOKED, wanted, caller)

    def troubles(self) -> Sequence[str]:
        return [*self._client.health.troubles(), *self._unread(), *self._identity.troubles()]

    def _unread(self) -> list[str]:
        obstacle = self._registry.obstacle
        told = self._registry.troubles()
        return [f"{self._me} does not lead: {obstacle}", *told] if obstacle else told

    async def metrics(self) -> bytes:
        return await finish(render(await self.status(), self._me, self._sources))

    async def events(self, limit: int, after: int = 0) -> Sequence[tuple[int, Event]]:
        return await self._history.tail(limit, after)

    async def incidents(self, limit: int) -> Sequence[Incident]:
        return await self._history.incidents(limit)

    async def protection(self) -> Protection:
        return protection(
            await self.status(), self._config, await self._history.incidents(INCIDENTS_MEASURED)
        )

    async def lives(self, request: str) -> Lives:
        gateways = [record.id for record in self._registry.gateways.values()]
        return await self._recorder.lookups.find(request, gateways)

    def figures_now(self, after_unix_s: float) -> Sequence[Figures]:
        return self._recorder.rows(after_unix_s)

    async def figures(self, since_unix_s: float, until_unix_s: float, rows_max: int) -> Sequence[Figures]:
        return await self._history.figures(since_unix_s, until_unix_s, rows_max)

    async def audit(self, limit: int, after: int = 0, operation: str = "") -> Sequence[AuditEntry]:
        return await self._history.audit(limit, after, operation)

    def settings(self) -> ClusterConfig:
        return redacted(self._config)

    async def operations(self) -> Sequence[Operation]:
        return self._operations()

    async def quorum(self) -> Sequence[Check]:
        members = await self._client.status(timeout_s=1.0)
        return quorum(members, await self.status(), self._client.health.troubles(), self._unread())

    async def submit(self, request: OperationRequest, caller: Caller) -> OperationAnswer:
        found = await self._find(request.id)
        if found is not None:
            return _again(request, found[0])
        answer = self._controller.preflight(request)
        guards = [Compare.absent(self._keys.operation(request.id))]
        if request.if_epoch is not None:
            topology = self._keys.topology(self._config.group)
            counter, revision = await self._epoch_in_etcd(topology)
            guards.append(Compare.mod_revision(topology, revision))
            if counter != request.if_epoch:
                answer = _refused(answer, _other_epoch(request.if_epoch, counter))
        operation = answer.operation or _operation(request)
        if request.dry_run or not answer.accepted:
            if not request.dry_run:
                self._audit(Action.REFUSED, operation, caller, request.reason, _failures(answer))
            return msgspec.structs.replace(answer, accepted=False)
        asked = Asked(caller.name, caller.role.value, caller.address, request.reason, self._epoch)
        operation = msgspec.structs.replace(operation, asked=asked)
        if not await self._begin(operation, guards):
            found = await self._find(request.id)
            if found is not None:  # another request with this id was faster
                return _again(request, found[0])
            if request.if_epoch is None:
                raise Unavailable("the operation was deleted while it was being written; ask again")
            answer = _refused(answer, _other_epoch(request.if_epoch, None))
            self._audit(Action.REFUSED, operation, caller, request.reason, _failures(answer))
            return answer
        self._audit_begun(operation)
        await self._prune()
        return msgspec.structs.replace(answer, operation=operation)

    async def _begin(self, operation: Operation, guards: list[Compare]) -> bool:
        """Write it, if the guards hold; whether they did. Raises Unavailable."""
        put = Put(self._keys.operation(operation.id), encode(operation))
        try:
            return (await self._client.txn(guards, [put], timeout_s=CALL_LIMIT_S)).succeeded
        except EtcdUnknown as error:
            raise Unavailable(
                "etcd did not answer: the operation may have begun; ask again with the same id"
            ) from error
        except EtcdError as error:
            raise Unavailable(f"etcd did not take the operation: {error}") from error

    async def _epoch_in_etcd(self, key: str) -> tuple[int, int]:
        """The topology's counter and its revision, read from etcd itself. Raises Unavailable."""
        try:
            found: KeyValue | None = await self._client.get(key, timeout_s=CALL_LIMIT_S)
            return (decode(found.value, Topology, key).counter, found.mod_revision) if found else (0, 0)
        except (EtcdError, PeerError) as error:
            raise Unavailable(f"the topology cannot be read: {error}") from error

    async def cancel(self, operation_id: str, caller: Caller) -> Operation | None:
        """See AdminService. The leader calls the operation's move off when it sees the new state."""
        for _ in range(CANCEL_TRIES):
            found = await self._find(operation_id)
            if found is None or not found[0].open:  # also if it has ended in this very moment
                return found[0] if found else None
            cancelled = await self._cancel(*found)
            if cancelled is not None:
                self._audit_begun(cancelled)  # nobody may have taken it up
                self._audit(Action.CANCELLED, cancelled, caller)
                return cancelled
        raise Unavailable("the operation changed each time that it was being cancelled; ask again")

    async def _cancel(self, operation: Operation, revision: int, value: bytes) -> Operation | None:
        """None if it is not at this revision any more. Raises Unavailable."""
        cancelled = msgspec.structs.replace(
            operation,
            state=OperationState.CANCELLED,
            message="cancelled by an operator",
            finished_unix_s=time.time(),
        )
        key = self._keys.operation(operation.id)
        try:
            unchanged, put = Compare.mod_revision(key, revision), Put(key, encode(cancelled, value))
            result = await self._client.txn([unchanged], [put], timeout_s=CALL_LIMIT_S)
        except NewerSchema as error:
            raise Unavailable(
                f"operation {operation.id}: {error}; ask a controller of the newer version"
            ) from error
        except PeerError as error:
            raise Unavailable(f"operation {operation.id} cannot be rewritten: {error}") from error
        except EtcdError as error:
            raise Unavailable(f"the operation may not be cancelled yet; ask again: {error}") from error
        return cancelled if result.succeeded else None

    async def _find(self, operation_id: str) -> tuple[Operation, int, bytes] | None:
        """The operation, its revision, and its bytes, straight from etcd: our own view may be a moment old.

        Raises Unavailable, also when it is there and cannot be read.
        """
        key = self._keys.operation(operation_id)
        try:
            found: KeyValue | None = await self._client.get(key, timeout_s=CALL_LIMIT_S)
            return (decode(found.value, Operation, key), found.mod_revision, found.value) if found else None
        except (EtcdError, PeerError) as error:
            raise Unavailable(f"operations cannot be read: {error}") from error

    async def _prune(self) -> None:
        finished = [(op, revision) for op, revision in self._registry.operations.values() if not op.open]
        finished.sort(key=lambda pair: pair[0].finished_unix_s)
        for operation, revision in finished[: max(0, len(finished) - FINISHED_KEPT)]:
            key = self._keys.operation(operation.id)
            if key in self._registry.view.newer:
                continue
            try:
                await self._client.txn(
                    [Compare.mod_revision(key, revision)], [Delete(key)], timeout_s=CALL_LIMIT_S
                )
            except EtcdError:
                return  # the next operation prunes again

    def _operations(self) -> list[Operation]:
        """For everybody who may look: who asked is the audit's to tell."""
        every = (msgspec.structs.replace(op, asked=None) for op, _ in self._registry.operations.values())
        return sorted(every, key=lambda operation: (operation.created_unix_s, operation.id))

    def _audit(
        self,
        action: Action,
        about: Operation | Revocation,
        caller: Caller,
        reason: str = "",
        message: str = "",
    ) -> None:
        self._history.put(Audit(action, about, time.time(), self._epoch, caller, reason, message))

    def _audit_begun(self, operation: Operation) -> None:
        """The leader says so, too: this process may end now, or not know that etcd took the operation."""
        if line := submitted(operation):
            self._history.put(line)

    @property
    def _epoch(self) -> int:
        topology = self._registry.view.topology
        return 0 if topology is None else topology.counter


def _refused(answer: OperationAnswer, check: Check) -> OperationAnswer:
    return msgspec.structs.replace(answer, accepted=False, checks=(*answer.checks, check), operation=None)


def _other_epoch(wanted: int, counter: int | None) -> Check:
    now = "has just changed" if counter is None else f"is at epoch {counter}"
    return Check("fail", "epoch", f"the topology {now}, and --if-epoch asked for {wanted}")


def _failures(answer: OperationAnswer) -> str:
    return "; ".join(check.message for check in answer.checks if check.level == "fail")


def _operation(request: OperationRequest) -> Operation:
    now = time.time()
    return Operation(
        id=request.id,
        kind=OperationKind(request.kind),
        node=request.node,
        substitute=request.substitute,
        created_unix_s=now,
        deadline_unix_s=now + request.deadline_s if request.deadline_s > 0 else 0.0,
    )


def _again(request: OperationRequest, known: Operation) -> OperationAnswer:
    """The answer to an id that is known: the same operation, or a refusal if it was for something else."""
    if request.is_for(known):
        return OperationAnswer(accepted=True, checks=(), plan=(), operation=known)
    message = f"operation id {known.id} was used to {known.kind.value} {known.node}; choose another id"
    return OperationAnswer(accepted=False, checks=(Check("fail", "id", message),), plan=())
