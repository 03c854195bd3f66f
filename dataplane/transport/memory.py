"""The transport inside one process, for tests and the simulator: same promises, no sockets, no threads.

Everything happens through the event loop's `call_soon` and `call_later`, so under a loop with a simulated clock a
run is reproducible. `MemoryNetwork` is the hub and holds the faults: `kill`, `stop`, `resume`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.backoff import Backoff
from controlplane.contract.ids import Member, NodeId

from .base import OnLinkDown, OnLinkUp, OnMessage, Part, TransportConfig, TransportStats


@dataclass(slots=True, eq=False)
class _Link:
    """One way from `source` to `target`; both ends see the same object."""

    source: MemoryTransport
    target: MemoryTransport
    queue: deque[bytearray] = field(default_factory=deque)
    queued_bytes: int = 0
    up: bool = True
    delivery_is_due: bool = False


@dataclass(slots=True, eq=False)
class _Dial:
    peer: Member
    address: str
    backoff: Backoff
    link: _Link | None = None
    timer: asyncio.Handle | None = None


class MemoryNetwork:
    """All transports of one process. A node is its address's owner until killed or closed."""

    def __init__(self) -> None:
        self._listening: dict[str, MemoryTransport] = {}
        self._numbers = itertools.count(1)

    def add(
        self,
        config: TransportConfig,
        *,
        on_message: OnMessage,
        on_link_up: OnLinkUp,
        on_link_down: OnLinkDown,
    ) -> MemoryTransport:
        """A transport that is not started yet."""
        return MemoryTransport(
            self, config, on_message=on_message, on_link_up=on_link_up, on_link_down=on_link_down
        )

    def kill(self, node: NodeId) -> None:
        """The node's process dies: its peers see their links end, it sees nothing any more."""
        for transport in self._of(node):
            transport._die("peer killed")

    def stop(self, node: NodeId) -> None:
        """The node's process is stopped: nothing reaches or leaves it, and nobody is told."""
        for transport in self._of(node):
            transport.stopped = True

    def resume(self, node: NodeId) -> None:
        """A stopped process goes on; what waited for it arrives."""
        for transport in self._of(node):
            transport.stopped = False
            transport._catch_up()

    def _of(self, node: NodeId) -> list[MemoryTransport]:
        return [t for t in self._listening.values() if t.config.member.node == node]

    def _listen(self, transport: MemoryTransport) -> str:
        port = transport.config.ports[0] or next(self._numbers)
        address = f"{transport.config.host}:{port}"
        if address in self._listening:
            raise OSError(f"{address} is in use")
        self._listening[address] = transport
        return address

    def _forget(self, transport: MemoryTransport) -> None:
        self._listening = {a: t for a, t in self._listening.items() if t is not transport}

    def _find(self, address: str) -> MemoryTransport | None:
        return self._listening.get(address)


class MemoryTransport:
    """Transport over a `MemoryNetwork`; made by `MemoryNetwork.add`."""

    def __init__(
        self,
        network: MemoryNetwork,
        config: TransportConfig,
        *,
        on_message: OnMessage,
        on_link_up: OnLinkUp,
        on_link_down: OnLinkDown,
    ) -> None:
        self.stats = TransportStats()
        self.config = config
        self.stopped = False
        self._network = network
        self._on_message, self._on_link_up, self._on_link_down = on_message, on_link_up, on_link_down
        self._running = False
        self._dials: dict[NodeId, _Dial] = {}
        self._incoming: dict[NodeId, _Link] = {}
        self._heard: dict[NodeId, float] = {}

    async def start(self) -> str:
        if self._running:
            raise RuntimeError("already started")
        self._loop = asyncio.get_running_loop()
        address = self._network._listen(self)
        self._running = True
        return address

    def connect(self, peer: Member, address: str) -> None:
        if not self._running:
            raise RuntimeError("not started")
        dial = self._dials.get(peer.node)
        if dial is not None and dial.peer == peer and dial.address == address:
            return
        self.disconnect(peer.node)
        dial = self._dials[peer.node] = _Dial(
            peer, address, Backoff(self.config.retry_min_s, self.config.retry_max_s)
        )
        dial.timer = self._loop.call_soon(self._attempt, dial)

    def disconnect(self, node: NodeId) -> None:
        dial = self._dials.pop(node, None)
        if dial is None:
            return
        if dial.timer is not None:
            dial.timer.cancel()
        if dial.link is not None:
            self._cut(dial.link, "closed by the peer")

    def refuse(self, peer: Member, reason: str) -> None:
        link = self._incoming.get(peer.node)
        if link is not None and link.source.config.member == peer:
            self._cut(link, "refused by the peer")
            del self._incoming[peer.node]
            self.stats.auth_failures += 1
            self.stats.links_down += 1
            self._on_link_down(peer, f"incoming link: {reason}")

    def connected(self, peer: Member) -> bool:
        dial = self._dials.get(peer.node)
        return dial is not None and dial.peer == peer and dial.link is not None and dial.link.up

    def send(self, peer: Member, parts: Sequence[Part]) -> bool:
        dial = self._dials.get(peer.node)
        link = dial.link if dial is not None and dial.peer == peer else None
        length = sum(memoryview(part).nbytes for part in parts)
        full = link is not None and link.queued_bytes + length > self.config.queue_bytes_max
        full = full and link is not None and link.queued_bytes > 0
        if link is None or not link.up or full or length > self.config.message_bytes_max:
            self.stats.sends_refused += 1
            return False
        link.queue.append(bytearray(b"".join(memoryview(part).cast("B") for part in parts)))
        link.queued_bytes += length
        self.stats.messages_sent += 1
        self.stats.bytes_sent += length
        self._schedule(link)
        return True

    def last_heard(self, node: NodeId) -> float | None:
        return self._heard.get(node)

    @property
    def queued_total(self) -> int:
        return sum(d.link.queued_bytes for d in self._dials.values() if d.link is not None)

    def queued_bytes(self, node: NodeId) -> int:
        dial = self._dials.get(node)
        return dial.link.queued_bytes if dial is not None and dial.link is not None else 0

    async def close(self) -> None:
        if not self._running:
            return
        for dial in self._dials.values():
            while dial.link is not None and dial.link.up and dial.link.queue and not dial.link.target.stopped:
                self._deliver(dial.link)
        self._die("closed by the peer")

    # Links.

    def _attempt(self, dial: _Dial) -> None:
        target = self._network._find(dial.address)
        if self.stopped or target is None or target.stopped or not target._admit(self, dial.peer):
            self._retry(dial)
            return
        dial.link = _Link(self, target)
        dial.backoff.succeeded()
        target._accept(dial.link)
        self._on_link_up(dial.peer)

    def _retry(self, dial: _Dial) -> None:
        dial.timer = self._loop.call_later(dial.backoff.next_s(), self._attempt, dial)

    def _admit(self, source: MemoryTransport, wanted: Member) -> bool:
        theirs, ours = source.config, self.config
        if theirs.secret != ours.secret or theirs.cluster != ours.cluster or wanted != ours.member:
            self.stats.auth_failures += 1
            return False
        return True

    def _accept(self, link: _Link) -> None:
        node = link.source.config.member.node
        older = self._incoming.get(node)
        if older is not None:
            del self._incoming[node]
            self._cut(older, "replaced by a newer link")
        self._incoming[node] = link

    def _schedule(self, link: _Link) -> None:
        if not link.delivery_is_due:
            link.delivery_is_due = True
            self._loop.call_soon(self._deliver_next, link)

    def _deliver_next(self, link: _Link) -> None:
        link.delivery_is_due = False
        if not link.up or not link.queue or link.target.stopped or self.stopped:
            return
        if len(link.queue) > 1:  # one message a turn, so that a callback that raises holds up nothing
            self._schedule(link)
        self._deliver(link)

    def _deliver(self, link: _Link) -> None:
        data = link.queue.popleft()
        link.queued_bytes -= len(data)
        target, me = link.target, self.config.member
        target.stats.messages_received += 1
        target.stats.bytes_received += len(data)
        target._heard[me.node] = self._loop.time()
        target._on_message(me, memoryview(data))

    def _catch_up(self) -> None:
        for link in self._incoming.values():
            link.source._schedule(link)
        for dial in self._dials.values():
            if dial.link is not None:
                self._schedule(dial.link)

    def _cut(self, link: _Link, reason: str) -> None:
        """Ends a link by the will (or death) of this side; the other side is told through the loop."""
        if not link.up:
            return
        link.up = False
        link.queue.clear()
        link.queued_bytes = 0
        other = link.target if link.source is self else link.source
        self._loop.call_soon(other._ended, link, reason)

    def _ended(self, link: _Link, reason: str) -> None:
        if not self._running:
            return
        if link.source is self:
            peer, side = link.target.config.member, "outgoing"
            dial = self._dials.get(peer.node)
            if dial is not None and dial.link is link:
                dial.link = None
                self._retry(dial)
        else:
            peer, side = link.source.config.member, "incoming"
            if self._incoming.get(peer.node) is link:
                del self._incoming[peer.node]
        self.stats.links_down += 1
        self._on_link_down(peer, f"{side} link: {reason}")

    def _die(self, reason: str) -> None:
        self._running = False
        self._network._forget(self)
        for dial in self._dials.values():
            if dial.timer is not None:
                dial.timer.cancel()
            if dial.link is not None:
                self._cut(dial.link, reason)
        for link in self._incoming.values():
            self._cut(link, reason)
        self._dials.clear()
        self._incoming.clear()
