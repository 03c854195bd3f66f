"""gRPC streams to schedulers: one per member, reopened with a bounded back-off for as long as it is wanted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from controlplane.backoff import Backoff
from controlplane.contract import rpc
from controlplane.contract.identity import PLAIN, Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.requests import GatewayMessage, Recalled, Refused, Tokens
from web.gateway.routing.events import (
    Event,
    RecalledReceived,
    RefusalReceived,
    StreamDown,
    StreamUp,
    TokensReceived,
)

log = structlog.get_logger()

MESSAGE_BYTES_MAX = 16 << 20
OUTBOX_MAX = 8192  # messages; more than all live requests ever need
CONNECT_S = 2.0
ANSWER_S = 10.0  # a node that is busy is late; one that is gone is noticed by keepalive
WRITE_S = 5.0
BACKOFF_FIRST_S = 0.02
BACKOFF_MAX_S = 1.0
UNSAID = (
    f"it has not said within {ANSWER_S:g} s that it serves this gateway: it is overloaded, or of older code (nodes are"
    " restarted before gateways)"
)
STEADY_S = 1.0  # a stream that was up for so long was a good one: the back-off starts anew
OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A path that falls silent is noticed in 3 s: requests then go to another pipeline, if there is one.
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Each try has its own connection: the back-off is ours, and not gRPC's as well.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


class Links:
    """All streams of one gateway. `emit` is called with what they bring, in each stream's order."""

    def __init__(self, token: str, emit: Callable[[Event], None], identity: Identity = PLAIN) -> None:
        self.reconnects = 0
        self._metadata = (
            ("authorization", f"Bearer {token}"),
            (rpc.STREAM_SCHEMA_KEY, str(rpc.STREAM_SCHEMA)),
        )
        self._emit = emit
        self._identity = identity
        self._addresses: dict[Member, str] = {}
        self._newest: dict[NodeId, Member] = {}
        self._links: dict[Member, _Link] = {}

    def locate(self, member: Member, address: str) -> None:
        """Where a member's front door is ("host:port"). Kept when its record goes: etcd may be away."""
        self._addresses[member] = address
        self._newest[member.node] = member
        if member in self._links:
            self._links[member].located.set()

    def prune(self, members: set[Member]) -> None:
        """Forget the addresses of incarnations that are over: not in `members`, no stream, not the newest."""
        keep = members | self._links.keys() | set(self._newest.values())
        for member in self._addresses.keys() - keep:
            del self._addresses[member]

    def troubles(self) -> list[str]:
        """Which nodes do not speak with this gateway, and why."""
        return [f"{member.node}: {link.refused}" for member, link in self._links.items() if link.refused]

    def open(self, member: Member) -> None:
        if member not in self._links:
            self._links[member] = _Link(self, member)

    def close(self, member: Member) -> None:
        link = self._links.pop(member, None)
        if link is not None:
            link.task.cancel()

    def send(self, member: Member, message: GatewayMessage) -> None:
        """Queue a message; dropped when there is no stream, since opening one submits everything again."""
        link = self._links.get(member)
        if link is not None:
            link.send(message)

    async def aclose(self) -> None:
        links, self._links = list(self._links.values()), {}
        for link in links:
            link.task.cancel()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)


class Unsaid(ConnectionError):
    """A node takes the connection and does not say whether it serves us."""


class _Link:
    """The stream to one member."""

    def __init__(self, links: Links, member: Member) -> None:
        self.located = asyncio.Event()
        self.refused = ""  # why the node does not speak with a gateway of this version
        self._links = links
        self._member = member
        self._outbox: deque[GatewayMessage] = deque()
        self._filled = asyncio.Event()
        self._up_at: float | None = None  # since when the node serves us, on the loop's clock
        if member in links._addresses:
            self.located.set()
        self.task = asyncio.create_task(self._run(), name=f"link-{member}")

    def send(self, message: GatewayMessage) -> None:
        if self._up_at is not None:
            self._outbox.append(message)
            self._filled.set()

    async def _run(self) -> None:
        """Until cancelled: connect, follow, report the end, wait, again."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        last_error = ""
        while True:
            await self.located.wait()
            try:
                await self._once(self._links._addresses[self._member])
                error = "the peer ended the stream"
                self.refused = ""
            except* (grpc.aio.AioRpcError, TimeoutError, ConnectionError, asyncio.InvalidStateError) as group:
                error = _describe(group.exceptions[0])
                self.refused = _refusal(group.exceptions[0])
            finally:
                up_at, self._up_at = self._up_at, None
                self._outbox.clear()
                if up_at is not None and self._links._links.get(self._member) is self:
                    self._links._emit(StreamDown(self._member))
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # The call broke in the moment in which we were cancelled, and a TaskGroup tells of the former alone.
                raise asyncio.CancelledError
            was_up = up_at is not None
            if was_up or error != last_error:  # once per cause
                log.warning("scheduler stream down", member=str(self._member), error=error, was_up=was_up)
            last_error = error
            self._links.reconnects += 1
            if up_at is not None and loop.time() - up_at > STEADY_S:
                backoff.succeeded()
            await backoff.pause()

    async def _once(self, address: str) -> None:
        """One connection, from its start to its end. Raises the errors that `_run` names."""
        node = ProcessName(ProcessRole.NODE, self._member.node)
        async with self._links._identity.channel(address, node, OPTIONS) as channel:
            serve = channel.stream_stream(
                rpc.FRONTDOOR_SERVE,
                request_serializer=rpc.encode,
                response_deserializer=rpc.decode_scheduler_message,
            )
            call = serve(metadata=self._links._metadata)
            try:
                async with asyncio.timeout(CONNECT_S):
                    await _unless_cancelled_there(call.wait_for_connection())
                try:
                    async with asyncio.timeout(ANSWER_S):
                        answer = await _unless_cancelled_there(call.initial_metadata())
                        if rpc.STREAM_SCHEMA_KEY not in answer:
                            await _unless_cancelled_there(call.read())  # raises why the node refuses us
                            raise ConnectionError("the peer does not say that it serves gateways")
                except TimeoutError:
                    raise Unsaid(UNSAID) from None
                self.refused = ""
                self._up_at = asyncio.get_running_loop().time()
                log.info("scheduler stream up", member=str(self._member), address=address)
                self._links._emit(StreamUp(self._member))
                async with asyncio.TaskGroup() as group:
                    writer = group.create_task(self._write(call))
                    try:
                        await self._read(call)
                    finally:
                        writer.cancel()
            finally:
                call.cancel()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        member, emit = self._member, self._links._emit
        while True:
            message = await _unless_cancelled_there(call.read())
            if message is grpc.aio.EOF:
                return
            if message is None:
                raise ConnectionError("the peer sent a message that cannot be decoded")
            match message:
                case Tokens():
                    emit(TokensReceived(member, message))
                case Refused():
                    emit(RefusalReceived(member, message))
                case Recalled():
                    emit(RecalledReceived(member, message))

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            while self._outbox:
                if len(self._outbox) > OUTBOX_MAX:
                    raise ConnectionError("the peer does not read")
                async with asyncio.timeout(WRITE_S):
                    await _unless_cancelled_there(call.write(self._outbox.popleft()))
            self._filled.clear()
            await self._filled.wait()


async def _unless_cancelled_there(step: Awaitable[Any]) -> Any:
    """grpc.aio reports a call that the other side cancelled as if our own task had been."""
    try:
        return await step
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the peer cancelled the stream") from None


def _refusal(error: BaseException) -> str:
    """Why the node does not speak with us; "" if that is not it."""
    if isinstance(error, grpc.aio.AioRpcError):
        return str(error.details()) if error.code() is grpc.StatusCode.FAILED_PRECONDITION else ""
    return str(error) if isinstance(error, Unsaid) else ""


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
