"""A lease that is kept alive, and that knows by its own clock when it must be taken for lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from controlplane.etcd.endpoints import HAS_LEADER, Endpoint, Endpoints
from controlplane.etcd.errors import describe
from controlplane.etcd.proto import rpc_pb2

log = logging.getLogger(__name__)

# Stop acting this share of the TTL before etcd can have expired the lease: timers fire late on a busy host.
MARGIN_SHARE = 0.1
RENEWALS_PER_TTL = 4
RETRIES_PER_TTL = 20
LOOKS = 20  # for an answer, spread over the time that it may take


class LeaseKeeper:
    """Keeps one granted lease alive until it is closed or lost. Made by `EtcdClient.lease_keeper`.

    The deadline counts from when a renewal was *sent*, so it passes before etcd's own does. Once lost it
    stays lost, even if etcd would still take a renewal: whoever needs a lease again asks for a new one.
    The clock is CLOCK_MONOTONIC: it runs on while the process is stopped, not while the machine sleeps;
    guarded writes cover that case.
    """

    def __init__(self, endpoints: Endpoints, lease_id: int, ttl_s: float, granted_at: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.renewals = 0
        self._endpoints = endpoints
        self._closed = False
        self._callbacks: list[Callable[[str], object]] = []
        self._deadline = granted_at + ttl_s * (1 - MARGIN_SHARE)
        self._timer = asyncio.get_running_loop().call_later(self.remaining_s(), self._check_deadline)
        self._task = asyncio.create_task(self._run(), name=f"etcd-lease-{lease_id:x}")
        self._task.add_done_callback(self._ended)

    def valid(self) -> bool:
        """Whether the lease can be relied on at this very moment (ask right before acting)."""
        return not self.lost.is_set() and time.monotonic() < self._deadline

    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def on_lost(self, callback: Callable[[str], object]) -> None:
        """Call `callback(reason)` when the lease is lost; at once if it is already. Not after `close`."""
        if self.lost.is_set():
            callback(self.lost_reason)
        else:
            self._callbacks.append(callback)

    def declare_lost(self, reason: str) -> None:
        """Give the lease up for lost (the keeper itself does so; so may whoever saw its key deleted)."""
        if self.lost.is_set():
            return
        self.lost_reason = reason
        self.lost.set()
        self._timer.cancel()
        self._task.cancel()
        if self._closed:
            return
        self._endpoints.counters.leases_lost += 1
        log.warning("etcd lease %x lost: %s", self.lease_id, reason)
        for callback in self._callbacks:
            callback(reason)

    async def close(self) -> None:
        """Stop renewing; the lease is not valid from here on. (`EtcdClient.lease_revoke` ends it in etcd.)"""
        self._closed = True
        self.declare_lost("closed")
        await asyncio.gather(self._task, return_exceptions=True)

    def _check_deadline(self) -> None:
        left_s = self.remaining_s()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._check_deadline)
        else:
            last = self._endpoints.counters.last_error or "none"
            self.declare_lost(f"not renewed within {self.ttl_s:g} s (last etcd error: {last})")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("etcd lease %x: the keeper failed", self.lease_id, exc_info=task.exception())
            self.declare_lost(f"the keeper failed: {task.exception()!r}")

    async def _run(self) -> None:
        while not self.lost.is_set():
            endpoint = self._endpoints.preferred
            try:
                await self._renew_on(endpoint)
            except grpc.aio.AioRpcError as error:
                self._endpoints.failed(endpoint, describe(error))
            except TimeoutError:
                self._endpoints.failed(endpoint, "no answer to a lease renewal")
            except asyncio.InvalidStateError:  # grpc.aio: the stream had ended before we wrote
                self._endpoints.failed(endpoint, "the lease stream had ended")
            await asyncio.sleep(self.ttl_s / RETRIES_PER_TTL)  # the deadline's timer bounds these retries

    async def _renew_on(self, endpoint: Endpoint) -> None:
        """Renew on one stream until the lease is gone; raises TimeoutError or AioRpcError."""
        reply_s = interval_s = self.ttl_s / RENEWALS_PER_TTL
        if not await endpoint.connected(reply_s):
            raise TimeoutError
        call = endpoint.lease.LeaseKeepAlive(metadata=HAS_LEADER)
        try:
            while True:
                sent_at = time.monotonic()
                reply = await _answer(self._ask(call), reply_s)
                if reply is grpc.aio.EOF:
                    raise TimeoutError
                if reply.TTL <= 0:
                    self.declare_lost("etcd says that it has expired or was revoked")
                    return
                await asyncio.sleep(max(0.0, sent_at + interval_s - time.monotonic()))
        finally:
            call.cancel()

    async def _ask(self, call: Any) -> Any:
        """The answer. It counts as soon as it is read: until whoever waits for it has a turn, a busy loop may take as
        long as is left of the lease."""
        sent_at = time.monotonic()
        await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=self.lease_id))
        reply = await call.read()
        if reply is not grpc.aio.EOF and reply.TTL > 0:
            self._deadline = max(self._deadline, sent_at + reply.TTL * (1 - MARGIN_SHARE))
            self.renewals += 1
        return reply


async def _answer(asking: Coroutine[Any, Any, Any], limit_s: float) -> Any:
    """What etcd answers within `limit_s`; raises TimeoutError. A loop that is busy looks late, and yet `LOOKS` times:
    an answer that waits to be read is not missing, and a new stream would take still more turns of the loop."""
    task = asyncio.create_task(asking)
    try:
        for _ in range(LOOKS):
            if (await asyncio.wait({task}, timeout=limit_s / LOOKS))[0]:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
