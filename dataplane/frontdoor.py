"""The node's front door: one gRPC stream for each gateway that has requests here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from controlplane.contract import rpc
from controlplane.contract.address import ANY_PORT, join
from controlplane.contract.auth import bearer_matches
from controlplane.contract.identity import HANDSHAKE_LIMIT, PLAIN, Identity, ProcessRole, no_role
from controlplane.contract.requests import GatewayMessage, SchedulerMessage

log = logging.getLogger(__name__)

OUTBOX_MAX = 10_000  # messages that a gateway has not read: more, and its stream is closed (it resumes)
MESSAGE_BYTES_MAX = 64 << 20
TOLD_S = 10.0  # so long a refused gateway is a trouble; it tries again each second


@dataclass(slots=True)
class _Session:
    outbox: deque[SchedulerMessage] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)  # something to send, or the end
    overrun: bool = False


class Frontdoor:
    """Turns gateway streams into (session, message) calls, and back.

    `on_message(session, message)` for each message; `on_lost(session)` once when a stream has ended. `others`: handlers
    of more services on the same port.
    """

    def __init__(
        self,
        token: str,
        on_message: Callable[[int, GatewayMessage], None],
        on_lost: Callable[[int], None],
        *others: grpc.GenericRpcHandler,
        identity: Identity = PLAIN,
    ) -> None:
        self.sessions_overrun = 0
        self._token = token
        self._identity = identity
        self._on_message = on_message
        self._on_lost = on_lost
        self._others = others
        self._sessions: dict[int, _Session] = {}
        self._next = 1
        self._refused: tuple[str, float] | None = None  # the last gateway that was: why, and when
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, advertise: str = "", ports: Sequence[int] = ANY_PORT) -> str:
        """Listen on one of `ports`. Returns "host:port", with the host that others connect to. Raises ConfigError."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                ("grpc.so_reuseport", 0),
                HANDSHAKE_LIMIT,
                *rpc.PINGS_WELCOME,
                ("grpc.keepalive_permit_without_calls", 1),
                # And we notice a gateway that vanished without a goodbye: its requests become orphans.
                ("grpc.keepalive_time_ms", 2_000),
                ("grpc.keepalive_timeout_ms", 5_000),
            ]
        )
        handler = rpc.stream_handler(rpc.FRONTDOOR, "Serve", self._serve, rpc.decode_gateway_message)
        server.add_generic_rpc_handlers((handler, *self._others))
        port = self._identity.listen(server, "gateways and weights (node_ports)", host, ports)
        await server.start()
        self._server = server
        return join(advertise or host, port)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=0.2)

    def troubles(self) -> tuple[str, ...]:
        """Which gateway could not be served lately, and why, for people."""
        if self._refused is None or time.monotonic() - self._refused[1] > TOLD_S:
            return ()
        return (self._refused[0],)

    def send(self, session: int, message: SchedulerMessage) -> None:
        """Queue a message for a gateway; nothing happens if it has gone (the log is with it)."""
        state = self._sessions.get(session)
        if state is None:
            return
        if len(state.outbox) < OUTBOX_MAX:
            state.outbox.append(message)
        else:
            state.overrun = True
        state.news.set()

    async def _serve(
        self, requests: AsyncIterator[GatewayMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[SchedulerMessage]:
        metadata = dict(context.invocation_metadata() or ())
        if not bearer_matches(metadata.get("authorization"), self._token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        if not self._identity.admits(context, ProcessRole.GATEWAY):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, no_role(ProcessRole.GATEWAY))
        if why := rpc.refusal(metadata):
            if not self.troubles():  # once, however often it tries
                log.warning("a gateway is refused (%s): %s", context.peer(), why)
            self._refused = (f"a gateway is refused: {why}", time.monotonic())
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        await context.send_initial_metadata(rpc.ACCEPTED)
        session, self._next = self._next, self._next + 1
        state = self._sessions[session] = _Session()
        reader = asyncio.create_task(self._read(session, requests))
        reader.add_done_callback(lambda _: state.news.set())
        try:
            while not reader.done():
                await state.news.wait()
                state.news.clear()
                while state.outbox and not state.overrun:
                    yield state.outbox.popleft()
                if state.overrun:
                    self.sessions_overrun += 1
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway does not read")
            reader.result()  # an error of ours ends the stream, and is told in the log
        finally:
            reader.cancel()
            del self._sessions[session]
            self._on_lost(session)

    async def _read(self, session: int, requests: AsyncIterator[GatewayMessage]) -> None:
        async for message in requests:
            self._on_message(session, message)
