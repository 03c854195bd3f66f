"""Links between nodes, whatever carries them: dialling, the hello, and what `base.py` promises.

A driver knows one way to move messages and none of this; a transport has one or several (`choose.py`).
"""

from __future__ import annotations

import asyncio
import hmac
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from controlplane.backoff import Backoff
from controlplane.contract.address import all_taken, join, port_of, refused
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.reports import NO_LINK

from .base import OnLinkDown, OnLinkUp, OnMessage, Part, TransportConfig, TransportStats
from .driver import IN_HOST, PREFERENCE, Driver, Endpoint, parse_address
from .hello import HELLO_BYTES_MAX, TOKEN_BYTES, Acceptor, HelloError, Initiator, OtherVersion, new_nonce

if TYPE_CHECKING:
    from .sealing import Opener, Sealer

log = structlog.get_logger(__name__)

FLUSH_S = 0.5
TELL_S = 5.0  # between two lines about connections of nobody that we know

HELLO = b"\x00"
PLAIN, SEALED = 1, 2
MESSAGE = struct.Struct(f"<B{TOKEN_BYTES}sQ")  # kind, link token, sequence number from 0


class Link:
    """One endpoint and how far it has come: hello, then up, then ended."""

    __slots__ = (
        "down",
        "endpoint",
        "expected",
        "hello",
        "opened",
        "opener",
        "peer",
        "sealer",
        "timer",
        "token",
    )

    def __init__(self, endpoint: Endpoint, hello: Acceptor | Initiator, peer: Member | None) -> None:
        self.endpoint = endpoint
        self.hello = hello
        self.peer = peer  # an incoming link learns it from the hello
        self.token: bytes | None = None  # set: the link is up
        self.sealer: Sealer | None = None  # of an outgoing link that is sealed
        self.opener: Opener | None = None  # of an incoming one
        self.expected = 0  # sequence number of the next message
        self.timer: asyncio.TimerHandle | None = None
        self.opened = asyncio.Event()  # up, or will never be
        self.down = asyncio.Event()
        endpoint.user = self
        endpoint.limit_bytes = HELLO_BYTES_MAX

    @property
    def incoming(self) -> bool:
        return isinstance(self.hello, Acceptor)


class _Dial:
    """The wish for a link to one node, and the task that keeps it fulfilled."""

    __slots__ = ("address", "attempts", "kind", "link", "peer", "refused", "task")

    def __init__(self, peer: Member, address: str) -> None:
        self.peer = peer
        self.address = address
        self.attempts = 0  # since it was last open
        self.kind = ""  # what the last attempt went over
        self.link: Link | None = None
        self.refused = False  # the peer speaks another version, and that was told
        self.task: asyncio.Task[None] | None = None


def _report(task: asyncio.Task[None]) -> None:
    """A dial ends only by cancellation: anything else is a fault of ours and must be seen."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("dialling stopped", task=task.get_name(), exc_info=error)


FOR_LINKS = "links (link_ports)"


class LinkTransport:
    """The transport over one or several drivers; each listens on one of the configured ports."""

    def __init__(
        self,
        config: TransportConfig,
        drivers: Sequence[Driver],
        *,
        on_message: OnMessage,
        on_link_up: OnLinkUp,
        on_link_down: OnLinkDown,
    ) -> None:
        self.stats = TransportStats()
        self._config = config
        self._drivers = {kind: driver for driver in drivers for kind in driver.kinds}
        self._on_message, self._on_link_up, self._on_link_down = on_message, on_link_up, on_link_down
        self._running = False
        self._dials: dict[NodeId, _Dial] = {}
        self._incoming: dict[NodeId, Link] = {}
        # Incoming, not yet authenticated, the oldest first: from this host? From which network?
        self._pending: dict[Link, tuple[bool, str]] = {}
        self._untold = 0  # of those that were refused, not knowing who they were
        self._tell_at = 0.0  # of the next one
        self._heard: dict[NodeId, float] = {}

    async def start(self) -> str:
        if self._running:
            raise RuntimeError("already started")
        self._loop = asyncio.get_running_loop()
        self._running = True
        offers: dict[str, str] = {}
        for driver in dict.fromkeys(self._drivers.values()):
            offers |= await self._listen(driver)
        if self._config.advertise:
            offers = {kind: self._advertised(kind, where) for kind, where in offers.items()}
        return ",".join(f"{kind}={where}" for kind, where in offers.items())

    async def _listen(self, driver: Driver) -> dict[str, str]:
        host, ports = self._config.host, self._config.ports
        for port in ports:
            try:
                return await driver.start(self, host, port)
            except OSError as error:
                refused(FOR_LINKS, host, port, error)
        raise all_taken(FOR_LINKS, host, ports)

    def connect(self, peer: Member, address: str) -> None:
        if not self._running:
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

    def refuse(self, peer: Member, reason: str) -> None:
        link = self._incoming.get(peer.node)
        if link is not None and link.peer == peer:
            self._refuse(link, reason)

    def connected(self, peer: Member) -> bool:
        return self._outgoing(peer) is not None

    def carried_by(self, peer: Member) -> str | None:
        """The kind of our open link to `peer`: "local", "ucx" or "tcp"; None without one."""
        return self._dials[peer.node].kind if self.connected(peer) else None

    def send(self, peer: Member, parts: Sequence[Part]) -> bool:
        link = self._outgoing(peer)
        length = sum([part.nbytes if type(part) is memoryview else len(part) for part in parts])
        queued = link.endpoint.queued_bytes if link is not None else 0
        full = queued > 0 and queued + length > self._config.queue_bytes_max
        if link is None or full or length > self._config.message_bytes_max:
            self.stats.sends_refused += 1
            return False
        header = MESSAGE.pack(PLAIN if link.sealer is None else SEALED, link.token, link.expected)
        if link.sealer is not None:
            parts = [link.sealer.seal(header, link.expected, parts, queued)]
        if not link.endpoint.send(header, parts):
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

    @property
    def queued_total(self) -> int:
        return sum(d.link.endpoint.queued_bytes for d in self._dials.values() if d.link is not None)

    def _advertised(self, kind: str, where: str) -> str:
        return where if kind == "local" else join(self._config.advertise, port_of(where))

    async def close(self) -> None:
        if not self._running:
            return
        self._running = False
        deadline = time.monotonic() + FLUSH_S
        while self.queued_total and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        for node in list(self._dials):
            self.disconnect(node)
        for link in [*self._pending, *self._incoming.values()]:
            self._drop(link)
        for driver in dict.fromkeys(self._drivers.values()):
            driver.close()

    # Opening and ending links.

    async def _keep(self, dial: _Dial) -> None:
        """Opens the link, waits until it ends, and again; at once only after one that lasted."""
        config = self._config
        backoff = Backoff(config.retry_min_s, config.retry_max_s)
        while True:
            if await self._open(dial):
                opened_at, dial.attempts = self._loop.time(), 0
                dial.refused = False
                assert dial.link is not None
                await dial.link.down.wait()
                if self._loop.time() - opened_at >= config.retry_max_s:
                    backoff.succeeded()
            await backoff.pause()

    def _routes(self, address: str) -> list[tuple[Driver, str, str]]:
        """The ways that both sides know, best first. Raises ValueError if there is none."""
        offers = parse_address(address)
        routes = [(self._drivers[kind], kind, offers[kind]) for kind in PREFERENCE
                  if kind in offers and kind in self._drivers]  # fmt: skip
        routes = [route for route in routes if route[0].usable(*route[1:])]
        if not routes:
            raise ValueError(f"we speak {sorted(self._drivers)}, the peer offers {sorted(offers)}")
        return routes

    async def _open(self, dial: _Dial) -> bool:
        """One attempt to bring the dial's link up, bounded in time."""
        config = self._config
        link: Link | None = None
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                routes = self._routes(dial.address)
                driver, dial.kind, where = routes[dial.attempts % len(routes)]
                dial.attempts += 1
                hello = Initiator(
                    config.secret, config.cluster, config.member, dial.peer, new_nonce(),
                    None if dial.kind in IN_HOST else config.identity,
                )  # fmt: skip
                link = dial.link = Link(await driver.connect(dial.kind, where), hello, dial.peer)
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

    def _outgoing(self, peer: Member) -> Link | None:
        dial = self._dials.get(peer.node)
        if dial is None or dial.link is None or dial.peer != peer:
            return None
        return dial.link if dial.link.token is not None and dial.link.endpoint.open else None

    def _drop(self, link: Link) -> None:
        """Ends a link without a callback."""
        link.endpoint.close()
        link.endpoint.user = None
        link.token = None
        if link.timer is not None:
            link.timer.cancel()
        self._pending.pop(link, None)
        if link.peer is not None and self._incoming.get(link.peer.node) is link:
            del self._incoming[link.peer.node]
        link.opened.set()
        link.down.set()

    def _end(self, link: Link, reason: str) -> None:
        """Ends a link that failed or misbehaved, and says so if it was up."""
        was_up = link.token is not None
        self._drop(link)
        if was_up and link.peer is not None:
            self.stats.links_down += 1
            self._on_link_down(link.peer, f"{'incoming' if link.incoming else 'outgoing'} link: {reason}")

    def _refuse(self, link: Link, reason: str) -> None:
        self.stats.auth_failures += 1
        if link.peer is None:
            self._tell_of_stranger(reason)
        else:
            log.warning("link refused", peer=str(link.peer), incoming=link.incoming, reason=reason)
        self._end(link, reason)

    def _tell_of_stranger(self, reason: str) -> None:
        """A line now and then: anybody can connect as often as he likes."""
        now = self._loop.time()
        if now < self._tell_at:
            self._untold += 1
            return
        log.warning("link refused", peer="unknown", incoming=True, reason=reason, untold=self._untold)
        self._untold, self._tell_at = 0, now + TELL_S

    def _other_version(self, link: Link, reason: str) -> None:
        """No link can be opened. That is told once, however often it is tried: the peer may be restarted with ours."""
        dial = next((dial for dial in self._dials.values() if dial.link is link), None)
        if dial is None or dial.refused:
            self.stats.auth_failures += 1
            self._end(link, reason)
            return
        dial.refused = True
        self._refuse(link, reason)
        self._on_link_down(dial.peer, f"{NO_LINK}{reason}")

    # Events of the drivers.

    def on_connection(self, driver: Driver, request: object) -> None:
        config = self._config
        in_host = driver.in_host(request)
        origin = in_host, driver.origin_of(request)
        self._make_room(*origin)
        try:
            endpoint = driver.accept(request)
        except OSError as error:
            log.debug("connection not accepted", error=str(error))
            return
        identity = None if config.identity is None or in_host else config.identity
        acceptor = Acceptor(config.secret, config.cluster, config.member, new_nonce(), identity)
        link = Link(endpoint, acceptor, None)
        self._pending[link] = origin
        link.timer = self._loop.call_later(config.connect_timeout_s, self._refuse, link, "no hello in time")
        endpoint.send(HELLO, [acceptor.challenge()])

    def _make_room(self, in_host: bool, origin: str) -> None:
        """Where as many wait as may, the oldest ends of where most come from: a peer proves itself in milliseconds. To
        refuse the new one would let silent connections, a few in a second, keep every peer out. Network and host have
        each their own, and no address has a bound of its own: behind one there may be all nodes."""
        waiting = {link: whence for link, (near, whence) in self._pending.items() if near == in_host}
        if len(waiting) >= self._config.unauthenticated_max:
            counts = Counter([*waiting.values(), origin])
            # The first, so the oldest, of equals.
            heaviest = max(waiting, key=lambda link: counts[waiting[link]])
            self._refuse(heaviest, "no hello yet, and too many others came")

    def on_message(self, endpoint: Endpoint, header: bytes, data: memoryview) -> None:
        link = endpoint.user
        if link is None:
            return
        if link.token is not None and len(header) == MESSAGE.size and link.incoming:
            self._deliver(link, header, data)
        elif link.token is None and header == HELLO:
            try:
                self._hello(link, data)
            except OtherVersion as error:
                self._other_version(link, str(error))
            except HelloError as error:
                self._refuse(link, str(error))
        else:
            self._refuse(link, "a message out of place")

    def on_failed(self, endpoint: Endpoint, reason: str) -> None:
        if endpoint.user is not None:
            self._end(endpoint.user, reason)

    def _deliver(self, link: Link, header: bytes, data: memoryview) -> None:
        kind, token, sequence = MESSAGE.unpack(header)
        assert link.peer is not None
        assert link.token is not None
        if kind != (PLAIN if link.opener is None else SEALED) or not hmac.compare_digest(token, link.token):
            self._refuse(link, "wrong token")
            return
        if sequence != link.expected:
            self._end(link, f"message {sequence} instead of {link.expected}")
            return
        if link.opener is not None:
            opened = link.opener.open(header, sequence, data)
            if opened is None:
                self._refuse(link, "a message that was changed, or sealed by somebody else")
                return
            data = opened
        link.expected += 1
        self.stats.messages_received += 1
        self.stats.bytes_received += data.nbytes
        self._heard[link.peer.node] = time.monotonic()
        self._on_message(link.peer, data)

    def _hello(self, link: Link, data: memoryview) -> None:
        match link.hello:
            case Acceptor() as acceptor:
                link.peer, token, accept = acceptor.admit(data)
                link.endpoint.send(HELLO, [accept])
                self._pending.pop(link, None)
                if link.timer is not None:
                    link.timer.cancel()
                older = self._incoming.get(link.peer.node)
                if older is not None:
                    self._drop(older)
                self._incoming[link.peer.node] = link
                link.endpoint.limit_bytes = self._config.message_bytes_max
                if acceptor.key is not None:
                    assert self._config.identity is not None
                    link.opener = self._config.identity.opener(acceptor.key)
                    link.endpoint.limit_bytes = link.opener.bytes_max(self._config.message_bytes_max)
                link.token = token
            case Initiator(answered=False) as initiator:
                link.endpoint.send(HELLO, [initiator.answer(data)])
            case Initiator() as initiator:
                link.token = initiator.confirm(data)
                if initiator.key is not None:
                    assert self._config.identity is not None
                    link.sealer = self._config.identity.sealer(initiator.key)
                link.opened.set()
                assert link.peer is not None
                self._on_link_up(link.peer)
