"""The etcd client that every process of ours uses: asyncio on grpcio, several endpoints, TLS.

It imports nothing of ours, since nodes, gateways and controllers all hold leases and watch the topology.
All calls of one client belong to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import grpc

from controlplane.etcd import wire
from controlplane.etcd.endpoints import Endpoint, Endpoints, EtcdTls, Method
from controlplane.etcd.errors import EtcdLeaseGone, describe
from controlplane.etcd.health import Health
from controlplane.etcd.lease import LeaseKeeper
from controlplane.etcd.maintenance import Maintenance
from controlplane.etcd.proto import rpc_pb2
from controlplane.etcd.users import Users
from controlplane.etcd.values import (
    Compare,
    Delete,
    EtcdCounters,
    KeyValue,
    MemberStatus,
    Operation,
    Put,
    Snapshot,
    TxnResult,
)
from controlplane.etcd.watch import Watch, WatchTiming

CALL_TIMEOUT_S = 3.0
STATUS_TIMEOUT_S = 1.0


class EtcdClient:
    """`timeout_s` is the default deadline of a call; each call may name its own.

    Every method may raise EtcdUnavailable (nothing was changed) and EtcdError (refused); `put`, `delete` and
    `txn` also EtcdUnknown (it may have been applied).
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: EtcdTls | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
        watch_timing: WatchTiming | None = None,
    ) -> None:
        self.counters = EtcdCounters()
        self._endpoints = Endpoints(endpoints, tls, self.counters)
        self.health: Health = self._endpoints.health
        self._timeout_s = timeout_s
        self._watch_timing = watch_timing or WatchTiming()
        self._users: WeakSet[Watch | LeaseKeeper] = WeakSet()

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every watch and lease keeper made here (leases are not revoked), then the connections."""
        for user in tuple(self._users):
            await (user.aclose() if isinstance(user, Watch) else user.close())
        await self._endpoints.close()

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        """The key's newest state (linearizable), or None if there is no such key."""
        request = wire.range_request(key, prefix=False)
        return wire.snapshot(await self._range(f"get {key}", request, timeout_s)).items.get(key)

    async def get_prefix(self, prefix: str, *, timeout_s: float | None = None) -> Snapshot:
        """Every key under `prefix` at one revision (linearizable)."""
        request = wire.range_request(prefix, prefix=True)
        return wire.snapshot(await self._range(f"get {prefix}*", request, timeout_s))

    async def revision(self, *, timeout_s: float | None = None) -> int:
        """The store's newest revision (linearizable)."""
        return (await self.place(timeout_s=timeout_s))[1]

    async def place(self, *, timeout_s: float | None = None) -> tuple[int, int]:
        """Id of the store's cluster, and its newest revision (linearizable)."""
        request = wire.range_request("\0", prefix=False, count_only=True)
        reply = await self._range("revision", request, timeout_s)
        return int(reply.header.cluster_id), int(reply.header.revision)

    async def put(self, key: str, value: bytes, lease: int = 0, *, timeout_s: float | None = None) -> int:
        """Write one key; the revision that did it. Raises EtcdLeaseGone if the lease has ended."""
        request = wire.put_request(Put(key, value, lease))
        reply = await self._once(f"put {key}", lambda at: at.kv.Put, request, timeout_s)
        return int(reply.header.revision)

    async def delete(self, key: str, *, prefix: bool = False, timeout_s: float | None = None) -> int:
        """Delete one key, or all that start with it; how many there were."""
        request = wire.delete_request(Delete(key, prefix))
        reply = await self._once(f"delete {key}", lambda at: at.kv.DeleteRange, request, timeout_s)
        return int(reply.deleted)

    async def txn(
        self,
        compares: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Apply `success` if every condition holds, else `failure`, as one revision."""
        request = rpc_pb2.TxnRequest(
            compare=[wire.compare_message(compare) for compare in compares],
            success=[wire.operation_message(operation) for operation in success],
            failure=[wire.operation_message(operation) for operation in failure],
        )

        writes = any(isinstance(operation, Put | Delete) for operation in (*success, *failure))
        names = " ".join(operation.key for operation in (*success, *failure))
        call = self._once if writes else self._repeatable
        reply = await call(f"txn {names}", lambda at: at.kv.Txn, request, timeout_s)
        results = tuple(wire.operation_result(response) for response in reply.responses)
        return TxnResult(reply.succeeded, reply.header.revision, results)

    async def compact(self, revision: int, *, timeout_s: float | None = None) -> None:
        """Forget history before `revision`. Raises EtcdCompacted if that is already forgotten."""
        request = rpc_pb2.CompactionRequest(revision=revision, physical=True)
        await self._once(f"compact {revision}", lambda at: at.kv.Compact, request, timeout_s)

    async def lease_grant(self, ttl_s: int, *, timeout_s: float | None = None) -> tuple[int, int]:
        """(lease id, TTL in seconds that etcd made of it: at least 1.5 of its election timeouts)."""
        request = rpc_pb2.LeaseGrantRequest(TTL=ttl_s)

        # Repeatable: a lease granted twice leaves one that holds no key and ends by itself.
        reply = await self._repeatable("lease grant", lambda at: at.lease.LeaseGrant, request, timeout_s)
        return reply.ID, reply.TTL

    async def lease_revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """End a lease and delete its keys; a lease that has already ended is no error."""
        request = rpc_pb2.LeaseRevokeRequest(ID=lease_id)
        try:
            await self._repeatable(
                f"lease revoke {lease_id:x}", lambda at: at.lease.LeaseRevoke, request, timeout_s
            )
        except EtcdLeaseGone:
            return

    async def lease_keeper(self, ttl_s: int, *, timeout_s: float | None = None) -> LeaseKeeper:
        """A new lease that is kept alive from now on, until its `close` or the client's."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        asked_at = time.monotonic()  # etcd's own deadline counts from later
        lease_id, granted_s = await self.lease_grant(ttl_s, timeout_s=min(limit_s, ttl_s * 0.75))
        keeper = LeaseKeeper(self._endpoints, lease_id, granted_s, asked_at)
        self._users.add(keeper)
        return keeper

    def watch_prefix(self, prefix: str) -> Watch:
        """Follow every key under `prefix`: a snapshot, then changes. `aclose` ends it."""
        watch = Watch(self._endpoints, prefix, self.get_prefix, self.place, self._watch_timing)
        self._users.add(watch)
        return watch

    async def status(self, *, timeout_s: float = STATUS_TIMEOUT_S) -> tuple[MemberStatus, ...]:
        """What each endpoint says of itself, in the order given; never raises for one that is away."""
        members = self._endpoints.members
        return tuple(await asyncio.gather(*(_member_status(member, timeout_s) for member in members)))

    @property
    def maintenance(self) -> Maintenance:
        """What is done to members one by one."""
        return Maintenance(self._endpoints)

    @property
    def users(self) -> Users:
        """Who may do what; only for a user with etcd's role root."""
        return Users(self._endpoints, self._timeout_s)

    async def follow_health(self) -> None:
        """Until cancelled: keep `health` informed of the members' alarms."""
        await self.health.follow(self.status)

    async def _range(
        self, what: str, request: rpc_pb2.RangeRequest, timeout_s: float | None
    ) -> rpc_pb2.RangeResponse:
        reply: rpc_pb2.RangeResponse = await self._repeatable(
            what, lambda at: at.kv.Range, request, timeout_s
        )
        return reply

    async def _repeatable(self, what: str, method: Method, request: Any, timeout_s: float | None) -> Any:
        """A call that may be repeated: on every endpoint until the deadline."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._endpoints.call(what, method, request, timeout_s=limit_s, repeatable=True)

    async def _once(self, what: str, method: Method, request: Any, timeout_s: float | None) -> Any:
        """A call that is sent at most once."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._endpoints.call(what, method, request, timeout_s=limit_s, repeatable=False)


async def _member_status(endpoint: Endpoint, timeout_s: float) -> MemberStatus:
    started = time.monotonic()
    if not await endpoint.connected(timeout_s):
        return MemberStatus(endpoint.address, problem="not connected")
    try:
        reply = await endpoint.maintenance.Status(rpc_pb2.StatusRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return MemberStatus(endpoint.address, problem=describe(error))
    return MemberStatus(
        endpoint=endpoint.address,
        latency_s=time.monotonic() - started,
        version=reply.version,
        member_id=reply.header.member_id,
        leader_id=reply.leader,
        is_learner=reply.isLearner,
        db_size_bytes=reply.dbSize,
        db_in_use_bytes=reply.dbSizeInUse,
        raft_term=reply.raftTerm,
        raft_index=reply.raftIndex,
        raft_applied_index=reply.raftAppliedIndex,
        errors=tuple(reply.errors),
    )
