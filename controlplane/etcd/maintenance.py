"""What operators do to members of etcd, one by one: defragment, take a snapshot, end an alarm."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from controlplane.etcd.endpoints import Endpoint, Endpoints
from controlplane.etcd.errors import EtcdError, EtcdUnavailable, describe
from controlplane.etcd.proto import rpc_pb2

CONNECT_S = 3.0
DEFRAGMENT_LIMIT_S = 300.0  # a member rewrites all of its file, and answers nothing meanwhile
SNAPSHOT_LIMIT_S = 600.0
ALARM_LIMIT_S = 10.0
DIGEST_BYTES = hashlib.sha256().digest_size


class Maintenance:
    """Made by `EtcdClient.maintenance`. `member` is an endpoint as the client has it. Methods raise EtcdError."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def defragment(self, member: str, *, timeout_s: float = DEFRAGMENT_LIMIT_S) -> None:
        """Give back what compaction has left empty in a member's file."""
        at = await self._connected(member)
        request = rpc_pb2.DefragmentRequest()
        await _asked(at, "defragment", lambda: at.maintenance.Defragment(request, timeout=timeout_s))

    async def disarm(self, member: str, *, timeout_s: float = ALARM_LIMIT_S) -> None:
        """End the NOSPACE alarms of all members, which come back where there is no space; `member`: whom to ask."""
        at = await self._connected(member)
        action = rpc_pb2.AlarmRequest.DEACTIVATE
        request = rpc_pb2.AlarmRequest(action=action, alarm=rpc_pb2.NOSPACE)
        known = await _asked(
            at, "alarms", lambda: at.maintenance.Alarm(rpc_pb2.AlarmRequest(), timeout=timeout_s)
        )
        for alarm in known.alarms:
            if alarm.alarm == rpc_pb2.NOSPACE:
                request.memberID = alarm.memberID
                await _asked(at, "disarm", lambda: at.maintenance.Alarm(request, timeout=timeout_s))

    async def snapshot(self, member: str, target: Path, *, timeout_s: float = SNAPSHOT_LIMIT_S) -> int:
        """Write all that a member has to `target` (mode 0600), as etcd's own tools read it; its bytes. Nothing is there
        unless it is whole by its digest."""
        at = await self._connected(member)
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        digest, size, tail = hashlib.sha256(), 0, b""
        try:
            # Backups go to folders where others may put links, too.
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                async for part in at.maintenance.Snapshot(rpc_pb2.SnapshotRequest(), timeout=timeout_s):
                    file.write(part.blob)
                    size += len(part.blob)
                    # The last bytes are the digest of all before.
                    held = tail + part.blob
                    digest.update(held[:-DIGEST_BYTES])
                    tail = held[-DIGEST_BYTES:]
                file.flush()
                os.fsync(file.fileno())
            if digest.digest() != tail:
                raise EtcdUnavailable(f"snapshot of {member}: it did not come whole; take it again")
            fresh.replace(target)
        except grpc.aio.AioRpcError as error:
            raise EtcdUnavailable(f"snapshot of {member}: {describe(error)}") from error
        finally:
            fresh.unlink(missing_ok=True)
        return size

    async def _connected(self, member: str) -> Endpoint:
        at = next((one for one in self._endpoints.members if one.address == member), None)
        if at is None:
            raise ValueError(f"{member} is no endpoint of this client")
        if not await at.connected(CONNECT_S):
            raise EtcdUnavailable(f"{member}: not connected")
        return at


async def _asked(at: Endpoint, what: str, call: Callable[[], Any]) -> Any:
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        raise EtcdError(f"{what} of {at.address}: {describe(error)}") from error
