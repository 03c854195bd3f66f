"""etcd's endpoints: one channel each, the last good one first, and unary calls that say what is known.

A read is repeated on the next endpoint until its deadline. A write is sent at most once, and only on a
channel that is connected: so "nothing was sent" (EtcdUnavailable) and "sent, no answer" (EtcdUnknown) are
told apart, which gRPC's own status codes do not do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from controlplane.backoff import Backoff
from controlplane.etcd.errors import (
    EtcdCompacted,
    EtcdLeaseGone,
    EtcdUnavailable,
    EtcdUnknown,
    Outcome,
    describe,
    outcome_of,
    refusal,
)
from controlplane.etcd.health import Health
from controlplane.etcd.proto import rpc_pb2_grpc
from controlplane.etcd.values import EtcdCounters

Method = Callable[["Endpoint"], Any]  # picks a stub's method

# A member that is cut off from its leader refuses at once instead of answering from an old state.
HAS_LEADER = (("hasleader", "true"),)
BACKOFF_FIRST_S = 0.02
BACKOFF_MAX_S = 0.2
CLOSED = "the client was closed"
HANDSHAKE_MS_MAX = 3_000  # of TLS on a busy machine: its two sides compute, and may wait for a core each time
MESSAGE_BYTES_MAX = 64 * 1024 * 1024

_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.enable_http_proxy", 0),  # etcd is in the cluster's network; a proxy variable must not divert it
    ("grpc.enable_retries", 0),  # retries are ours: only we know which calls may be repeated
    ("grpc.service_config_disable_resolution", 1),
    (
        "grpc.use_local_subchannel_pool",
        1,
    ),  # clients of one process do not share a broken connection's back-off
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),  # also how long one connection attempt may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    # etcd closes connections that ping more often than every 5 s, or ping without an open stream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """Files in PEM. `ca` None: the system's authorities. `cert` and `key` go together."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""  # when the certificate names something else than the endpoint

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError."""

        def read(path: Path | None) -> bytes | None:
            return path.read_bytes() if path is not None else None

        return grpc.ssl_channel_credentials(read(self.ca), read(self.key), read(self.cert))

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes when one of the files does."""
        return tuple(_stamp(path) for path in (self.ca, self.cert, self.key) if path is not None)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # it is being replaced, or the disk fails: as long as it is, what was read counts
        return (0, 0)
    return found.st_mtime_ns, found.st_ino


class Endpoint:
    """One etcd member: its channel (opened at first use) and stubs."""

    def __init__(self, address: str, tls: EtcdTls | None) -> None:
        self.address = address
        self._tls = tls
        self._stamp = tls.stamp() if tls is not None else ()
        self._before: Any = None  # the channel that this one has replaced
        self._open()

    def _open(self) -> None:
        """Make the channel, which connects at its first use. Raises OSError."""
        options, tls = list(_CHANNEL_OPTIONS), self._tls
        if tls is None:
            self.channel = grpc.aio.insecure_channel(self.address, options=options)
        else:
            if tls.server_name:
                options.append(("grpc.ssl_target_name_override", tls.server_name))
            attempt = "grpc.min_reconnect_backoff_ms"
            options = [option for option in options if option[0] != attempt] + [(attempt, HANDSHAKE_MS_MAX)]
            self.channel = grpc.aio.secure_channel(self.address, tls.credentials(), options=options)
        stubs: Any = rpc_pb2_grpc  # generated without types
        self.kv: Any = stubs.KVStub(self.channel)
        self.lease: Any = stubs.LeaseStub(self.channel)
        self.watch: Any = stubs.WatchStub(self.channel)
        self.maintenance: Any = stubs.MaintenanceStub(self.channel)
        self.auth: Any = stubs.AuthStub(self.channel)

    def _renew(self) -> None:
        """Where certificates have been replaced since the channel was made, and it has to connect anew: one with those
        that are there now. A connection that stands goes on with what it was opened with."""
        if self._tls is None or (stamp := self._tls.stamp()) == self._stamp:
            return
        if self.channel.get_state() is grpc.ChannelConnectivity.READY:
            return
        before = self.channel
        try:
            self._open()
        except OSError:
            return  # again at the next attempt; the old channel says why it cannot connect
        self._stamp = stamp
        self._before = before  # not closed: grpc.aio would cancel the tasks of whoever waits for it

    async def close(self) -> None:
        await self.channel.close(grace=None)
        if self._before is not None:
            await self._before.close(grace=None)

    async def connected(self, timeout_s: float) -> bool:
        """True once the channel is ready; False if that failed or took longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        self._renew()
        state = self.channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                return False  # gRPC's own back-off goes on behind; the next attempt looks again
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self.channel.wait_for_state_change(state)
            except TimeoutError:
                return False
            state = self.channel.get_state(try_to_connect=True)
        return True


def parse_address(endpoint: str, tls: bool) -> str:
    """ "host:port" from "host:port", "http://host:port" or "https://host:port". Raises ValueError."""
    scheme, separator, address = endpoint.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise ValueError(f"etcd endpoint {endpoint!r}: the scheme must be http or https")
    if separator and (scheme == "https") != tls:
        raise ValueError(f"etcd endpoint {endpoint!r}: https needs TLS options, http must have none")
    address = address.rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"etcd endpoint {endpoint!r}: expected host:port")
    return address


class Endpoints:
    """All endpoints of one client."""

    def __init__(self, endpoints: Sequence[str], tls: EtcdTls | None, counters: EtcdCounters) -> None:
        if not endpoints:
            raise ValueError("an etcd client needs at least one endpoint")
        self.members = [Endpoint(parse_address(text, tls is not None), tls) for text in endpoints]
        self.counters = counters
        self.health = Health()
        self._preferred = 0
        self._closed = False

    @property
    def preferred(self) -> Endpoint:
        return self.members[self._preferred]

    def in_order(self) -> list[Endpoint]:
        """Every endpoint once, the preferred one first."""
        return self.members[self._preferred :] + self.members[: self._preferred]

    def succeeded(self, endpoint: Endpoint) -> None:
        self._preferred = self.members.index(endpoint)

    def failed(self, endpoint: Endpoint, why: str) -> None:
        """Prefer the next endpoint from now on, unless that has already happened."""
        self.counters.last_error = f"{endpoint.address}: {why}"
        if endpoint is self.preferred and len(self.members) > 1:
            self._preferred = (self._preferred + 1) % len(self.members)
            self.counters.endpoint_switches += 1

    async def call(
        self,
        what: str,
        method: Method,
        request: Any,
        *,
        timeout_s: float,
        repeatable: bool,
    ) -> Any:
        """One unary call. `method(endpoint)` is the stub's method; `repeatable`: doing it twice is harmless.

        Raises EtcdUnavailable, EtcdUnknown (never for a repeatable call), or what `errors.refusal` gives.
        """
        self.counters.calls += 1
        deadline = time.monotonic() + timeout_s
        # A stopped member must not use up a read's whole time while others could answer.
        attempt_s = timeout_s / len(self.members) if repeatable else timeout_s
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        why = "not tried"
        while True:
            for endpoint in self.in_order():
                left_s = deadline - time.monotonic()
                if self._closed:
                    raise EtcdUnavailable(f"{what}: {CLOSED}")
                if left_s <= 0:
                    self.counters.unavailable += 1
                    raise EtcdUnavailable(f"{what}: no endpoint served within {timeout_s:g} s ({why})")
                if not await endpoint.connected(min(left_s, timeout_s / len(self.members))):
                    why = f"{endpoint.address}: not connected"
                    self.failed(endpoint, "not connected")
                    continue
                left_s = max(0.001, deadline - time.monotonic())
                try:
                    limit_s = min(left_s, attempt_s)
                    reply = await method(endpoint)(request, timeout=limit_s, metadata=HAS_LEADER)
                except grpc.aio.AioRpcError as error:
                    why = f"{endpoint.address}: {describe(error)}"
                    self._judge(what, endpoint, outcome_of(error), error, repeatable)
                except asyncio.CancelledError as error:
                    # grpc.aio also raises this when the channel is closed under a call: that is not a
                    # cancellation of the caller, which would otherwise end without a word.
                    task = asyncio.current_task()
                    if not self._closed or task is None or task.cancelling():
                        raise
                    self._judge(what, endpoint, Outcome.UNKNOWN, error, repeatable)
                else:
                    self.succeeded(endpoint)
                    if not repeatable:
                        self.health.accepted()
                    return reply
            self.counters.retries += 1
            await backoff.pause(deadline - time.monotonic())

    def _judge(
        self, what: str, endpoint: Endpoint, outcome: Outcome, error: BaseException, repeatable: bool
    ) -> None:
        """Return if the call may be tried again; raise what the error means otherwise."""
        if outcome is Outcome.REFUSED and isinstance(error, grpc.aio.AioRpcError):
            refused = refusal(what, error)
            if not isinstance(refused, EtcdCompacted | EtcdLeaseGone):  # those are answers
                self.health.refused(str(refused))
            raise refused from error
        why = describe(error) if isinstance(error, grpc.aio.AioRpcError) else CLOSED
        self.failed(endpoint, why)
        if outcome is Outcome.UNKNOWN and not repeatable:
            self.counters.unknown += 1
            raise EtcdUnknown(f"{what}: outcome unknown ({endpoint.address}: {why})") from error

    async def close(self) -> None:
        """Calls in flight end with EtcdUnknown (writes) or EtcdUnavailable, like all calls from now on."""
        self._closed = True
        for endpoint in self.members:
            await endpoint.close()
