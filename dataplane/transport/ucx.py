"""The transport over UCX: libucp endpoints driven by the asyncio loop. See `base.py` for what it promises.

The loop watches the worker's event descriptor and sleeps when nothing moves. Death of a peer process arrives as
an endpoint error, on idle links too, in both directions; it needs transports that report peer failure (TCP and
RDMA do, shared memory does not), hence the explicit list in `libucp.DEFAULT_OPTIONS`.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import structlog

from controlplane.contract.ids import Member, NodeId

from .base import OnLinkDown, OnLinkUp, OnMessage, Part, TransportConfig, TransportStats
from .hello import HELLO_BYTES_MAX, TOKEN_BYTES, Acceptor, HelloError, Initiator, new_nonce
from .libucp import DEFAULT_OPTIONS, binding, device_of

if TYPE_CHECKING:
    from dataplane._fast import ucp

log = structlog.get_logger(__name__)

POLL_BUDGET_S = 0.002  # then the loop gets its turn
FLUSH_S = 0.5

HELLO = b"\x00"
MESSAGE = struct.Struct(f"<B{TOKEN_BYTES}sQ")  # kind 1, link token, sequence number from 0


async def _resolve(address: str) -> tuple[str, int]:
    """ "host:port" or "[host]:port" to a numeric address. Raises OSError, ValueError."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return str(found[0][4][0]), int(port)


def _report(task: asyncio.Task[None]) -> None:
    """A dial ends only by cancellation: anything else is a fault of ours and must be seen."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("dialling stopped", task=task.get_name(), exc_info=error)


class _Link:
    """One endpoint and how far it has come: hello, then up, then ended."""

    __slots__ = ("down", "endpoint", "expected", "hello", "opened", "peer", "timer", "token")

    def __init__(self, endpoint: ucp.Endpoint, hello: Acceptor | Initiator, peer: Member | None) -> None:
        self.endpoint = endpoint
        self.hello = hello
        self.peer = peer  # an incoming link learns it from the hello
        self.token: bytes | None = None  # set: the link is up
        self.expected = 0  # sequence number of the next message
        self.timer: asyncio.TimerHandle | None = None
        self.opened = asyncio.Event()  # up, or will never be
        self.down = asyncio.Event()

    @property
    def incoming(self) -> bool:
        return isinstance(self.hello, Acceptor)


class _Dial:
    """The wish for a link to one node, and the task that keeps it fulfilled."""

    __slots__ = ("address", "link", "peer", "task")

    def __init__(self, peer: Member, address: str) -> None:
        self.peer = peer
        self.address = address
        self.link: _Link | None = None
        self.task: asyncio.Task[None] | None = None


class UcxTransport:
    """Transport over UCX. `options` are UCX variables without their prefix, over `libucp.DEFAULT_OPTIONS`."""

    def __init__(
        self,
        config: TransportConfig,
        *,
        on_message: OnMessage,
        on_link_up: OnLinkUp,
        on_link_down: OnLinkDown,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.stats = TransportStats()
        self._config = config
        self._options = {**DEFAULT_OPTIONS, "NET_DEVICES": device_of(config.host), **(options or {})}
        self._on_message, self._on_link_up, self._on_link_down = on_message, on_link_up, on_link_down
        self._worker: ucp.Worker | None = None
        self._dials: dict[NodeId, _Dial] = {}
        self._incoming: dict[NodeId, _Link] = {}
        self._pending: set[_Link] = set()  # incoming, not yet authenticated
        self._heard: dict[NodeId, float] = {}
        self._pump_is_due = False

    async def start(self) -> str:
        if self._worker is not None:
            raise RuntimeError("already started")
        self._loop = asyncio.get_running_loop()
        host, _ = await _resolve(f"{self._config.host}:{self._config.port}")
        self._worker = cast("ucp.Worker", binding().Worker(self, self._options))
        port = self._worker.listen(host, self._config.port)
        self._loop.add_reader(self._worker.fd, self._pump)
        self._pump_soon()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def connect(self, peer: Member, address: str) -> None:
        if self._worker is None:
            raise RuntimeError("not started")
        dial = self._dials.get(peer.node)
        if dial is not None and dial.peer == peer and dial.address == address:
            return
        self.disconnect(peer.node)
        dial = self._dials[peer.node] = _Dial(peer, address)
        dial.task = self._loop.create_task(self._keep(dial), name=f"link to {peer}")
        dial.task.add_done_callback(_report)

    def disconnect(self, node: NodeId) -> None:
        dial = self._dials.pop(node, None)
        if dial is None:
            return
        if dial.task is not None:
            dial.task.cancel()
        if dial.link is not None:
            self._drop(dial.link)

    def connected(self, peer: Member) -> bool:
        return self._outgoing(peer) is not None

    def send(self, peer: Member, parts: Sequence[Part]) -> bool:
        link = self._outgoing(peer)
        length = sum(memoryview(part).nbytes for part in parts)
        queued = link.endpoint.queued_bytes if link is not None else 0
        full = queued > 0 and queued + length > self._config.queue_bytes_max
        if link is None or full or length > self._config.message_bytes_max:
            self.stats.sends_refused += 1
            return False
        header = MESSAGE.pack(1, link.token, link.expected)
        if not self._transmit(link, header, parts):
            self.stats.sends_refused += 1
            return False
        link.expected += 1
        self.stats.messages_sent += 1
        self.stats.bytes_sent += length
        return True

    def last_heard(self, node: NodeId) -> float | None:
        return self._heard.get(node)

    def queued_bytes(self, node: NodeId) -> int:
        dial = self._dials.get(node)
        return dial.link.endpoint.queued_bytes if dial is not None and dial.link is not None else 0

    async def close(self) -> None:
        if self._worker is None:
            return
        deadline = time.monotonic() + FLUSH_S
        while any(self.queued_bytes(node) for node in self._dials) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        worker, self._worker = self._worker, None
        for node in list(self._dials):
            self.disconnect(node)
        for link in [*self._pending, *self._incoming.values()]:
            self._drop(link)
        if worker is not None:
            self._loop.remove_reader(worker.fd)
            worker.close()

    # Progress.

    def _pump(self) -> None:
        self._pump_is_due = False
        quiet = self._worker is None
        try:
            if self._worker is not None:
                quiet = self._worker.poll(POLL_BUDGET_S)
        finally:
            if not quiet:  # also after a callback raised: the rest of the events must not wait
                self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _transmit(self, link: _Link, header: bytes, parts: Sequence[Part]) -> bool:
        sent = link.endpoint.send(header, parts)
        self._pump_soon()
        return sent

    # Opening and ending links.

    async def _keep(self, dial: _Dial) -> None:
        """Opens the link, waits until it ends, and again."""
        delay_s = self._config.retry_min_s
        while True:
            if await self._open(dial):
                delay_s = self._config.retry_min_s
                assert dial.link is not None
                await dial.link.down.wait()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, self._config.retry_max_s)

    async def _open(self, dial: _Dial) -> bool:
        """One attempt to bring the dial's link up, bounded in time."""
        config = self._config
        link: _Link | None = None
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                host, port = await _resolve(dial.address)
                assert self._worker is not None
                hello = Initiator(config.secret, config.cluster, config.member, dial.peer, new_nonce())
                link = dial.link = _Link(self._worker.connect(host, port), hello, dial.peer)
                link.endpoint.user = link
                link.endpoint.limit_bytes = HELLO_BYTES_MAX
                self._pump_soon()
                await link.opened.wait()
        except (OSError, ValueError) as error:  # TimeoutError and UcpError are OSErrors
            log.debug(
                "link not opened", peer=str(dial.peer), address=dial.address, error=str(error) or "timed out"
            )
        if link is None or link.token is None:
            if link is not None:
                self._drop(link)
            return False
        return True

    def _outgoing(self, peer: Member) -> _Link | None:
        dial = self._dials.get(peer.node)
        if dial is None or dial.peer != peer or dial.link is None:
            return None
        return dial.link if dial.link.token is not None and dial.link.endpoint.open else None

    def _drop(self, link: _Link) -> None:
        """Ends a link without a callback."""
        link.endpoint.close()
        link.endpoint.user = None
        link.token = None
        if link.timer is not None:
            link.timer.cancel()
        self._pending.discard(link)
        if link.peer is not None and self._incoming.get(link.peer.node) is link:
            del self._incoming[link.peer.node]
        link.opened.set()
        link.down.set()
        if self._worker is not None:
            self._pump_soon()

    def _end(self, link: _Link, reason: str) -> None:
        """Ends a link that failed or misbehaved, and says so if it was up."""
        was_up = link.token is not None
        self._drop(link)
        if was_up and link.peer is not None:
            self.stats.links_down += 1
            self._on_link_down(link.peer, f"{'incoming' if link.incoming else 'outgoing'} link: {reason}")

    def _refuse(self, link: _Link, reason: str) -> None:
        self.stats.auth_failures += 1
        log.warning("link refused", peer=str(link.peer), incoming=link.incoming, reason=reason)
        self._end(link, reason)

    # Events of the worker.

    def on_connection(self, request: int) -> None:
        config = self._config
        if self._worker is None:
            return
        if len(self._pending) >= config.unauthenticated_max:
            self.stats.auth_failures += 1
            self._worker.reject(request)
            return
        try:
            endpoint = self._worker.accept(request)
        except binding().UcpError as error:
            log.debug("connection not accepted", error=str(error))
            return
        acceptor = Acceptor(config.secret, config.cluster, config.member, new_nonce())
        link = _Link(endpoint, acceptor, None)
        endpoint.user = link
        endpoint.limit_bytes = HELLO_BYTES_MAX
        self._pending.add(link)
        link.timer = self._loop.call_later(config.connect_timeout_s, self._refuse, link, "no hello in time")
        self._transmit(link, HELLO, [acceptor.challenge()])

    def on_message(self, endpoint: ucp.Endpoint, header: bytes, data: memoryview) -> None:
        link: _Link | None = endpoint.user
        if link is None:
            return
        if link.token is not None and link.incoming and len(header) == MESSAGE.size:
            self._deliver(link, header, data)
        elif link.token is None and header == HELLO:
            try:
                self._hello(link, data)
            except HelloError as error:
                self._refuse(link, str(error))
        else:
            self._refuse(link, "a message out of place")

    def on_failed(self, endpoint: ucp.Endpoint, reason: str) -> None:
        if endpoint.user is not None:
            self._end(endpoint.user, reason)

    def _deliver(self, link: _Link, header: bytes, data: memoryview) -> None:
        kind, token, sequence = MESSAGE.unpack(header)
        assert link.peer is not None
        assert link.token is not None
        if kind != 1 or not hmac.compare_digest(token, link.token):
            self._refuse(link, "wrong token")
            return
        if sequence != link.expected:
            self._end(link, f"message {sequence} instead of {link.expected}")
            return
        link.expected += 1
        self.stats.messages_received += 1
        self.stats.bytes_received += data.nbytes
        self._heard[link.peer.node] = time.monotonic()
        self._on_message(link.peer, data)

    def _hello(self, link: _Link, data: memoryview) -> None:
        match link.hello:
            case Acceptor() as acceptor:
                link.peer, token, accept = acceptor.admit(data)
                self._transmit(link, HELLO, [accept])
                self._pending.discard(link)
                if link.timer is not None:
                    link.timer.cancel()
                older = self._incoming.get(link.peer.node)
                if older is not None:
                    self._drop(older)
                self._incoming[link.peer.node] = link
                link.endpoint.limit_bytes = self._config.message_bytes_max
                link.token = token
            case Initiator(answered=False) as initiator:
                self._transmit(link, HELLO, [initiator.answer(data)])
            case Initiator() as initiator:
                link.token = initiator.confirm(data)
                link.opened.set()
                assert link.peer is not None
                self._on_link_up(link.peer)
