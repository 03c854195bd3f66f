"""A driver around another one that makes its messages as slow as those of a real network: for benches only.

Each node has one network interface of a given rate that its endpoints share equally, message by message in each of
them (processor sharing: what several TCP connections come to), and each pair of sites has a latency. All of it happens
at the sender, before the message is given to the driver below, so nothing is held at the receiver and a sender that
dies takes what is "on the wire" with it. A broken connection, too, is heard of one latency later.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dataplane.moment import MOMENT

from .base import Part
from .driver import PREFERENCE, Driver, Endpoint, Events

KIND = "emulated"
DUE = struct.Struct("<d")
Weigh = Callable[[Sequence[Part]], int]
"""How many bytes a message stands for."""
SMALL_BYTES = 2048  # interleaves with whatever is being sent, as packets do


@dataclass(frozen=True, slots=True)
class Network:
    """As one node sees it. Rows of `latency_s` are sites, one way; empty: none."""

    site: int
    latency_s: tuple[tuple[float, ...], ...]
    bytes_per_s: float  # of the interface; 0: any

    def latency_to(self, site: int) -> float:
        return self.latency_s[self.site][site] if self.latency_s else 0.0

    @property
    def latency_max_s(self) -> float:
        return max(self.latency_s[self.site], default=0.0) if self.latency_s else 0.0


@dataclass(slots=True)
class _Held:
    """A message that is not yet with the driver below."""

    header: bytes
    parts: Sequence[Part]
    length: int  # real
    left: float  # emulated bytes that the interface has yet to send
    early_s: float = 0.0  # by how much it was sent earlier than we came to it
    due: float = 0.0  # loop time at which it arrives


class EmulatedEndpoint:
    """`latency_s` is None for an endpoint that was accepted: it carries no more than the hello, at once.

    A message's header is followed by the time at which it was due: processes of a host have one clock."""

    def __init__(self, below: Endpoint, interface: Interface, latency_s: float | None, weigh: Weigh) -> None:
        self.below = below
        below.user = self
        self.user: Any = None
        self.latency_s = latency_s
        self.open = True
        self.sending: deque[_Held] = deque()  # in the interface
        self.flying: deque[_Held] = deque()  # through it, and on the way
        self._interface = interface
        self._weigh = weigh
        self._loop = asyncio.get_running_loop()
        self._sending_bytes = 0

    @property
    def limit_bytes(self) -> int:
        return self.below.limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, value: int) -> None:
        self.below.limit_bytes = value

    @property
    def queued_bytes(self) -> int:
        return self._sending_bytes + self.below.queued_bytes

    def send(self, header: bytes, parts: Sequence[Part]) -> bool:
        if not self.open:
            return False
        if self.latency_s is None:
            return self.below.send(header + DUE.pack(self._loop.time()), parts)
        length = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        self._sending_bytes += length
        self._interface.send(self, _Held(header, parts, length, float(self._weigh(parts))))
        return True

    def depart(self, held: _Held, at: float) -> None:
        """The interface has sent it, at loop time `at`."""
        assert self.latency_s is not None
        self._sending_bytes -= held.length
        held.due = at - held.early_s + self.latency_s
        self.flying.append(held)
        if len(self.flying) == 1:
            self._arrive()

    def _arrive(self) -> None:
        """Hand over what is due by now; one timer waits for the next."""
        now = self._loop.time()
        while self.flying and self.flying[0].due <= now:
            held = self.flying.popleft()
            if self.open:  # into the void if the peer has died: that is told apart
                self.below.send(held.header + DUE.pack(held.due), held.parts)
        if self.flying:
            self._loop.call_at(self.flying[0].due, self._arrive)

    def close(self) -> None:
        self.open = False
        self.below.close()
        self.below.user = None
        self._interface.forget(self)
        self.sending.clear()
        self.flying.clear()
        self._sending_bytes = 0


class Interface:
    """What a node's endpoints share. Between two events each of n busy ones has an n-th of the rate."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._busy: list[EmulatedEndpoint] = []
        self._at = 0.0  # loop time up to which `left` of every first message is true
        self._timer: asyncio.TimerHandle | None = None

    def send(self, endpoint: EmulatedEndpoint, held: _Held) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        held.early_s = now - MOMENT.now()
        if not self._rate or (held.left < SMALL_BYTES and not endpoint.sending):
            endpoint.depart(held, now)
            return
        through_s = min(held.early_s, held.left / self._rate)
        held.left -= through_s * self._rate
        held.early_s -= through_s
        self._advance(now)
        endpoint.sending.append(held)
        if len(endpoint.sending) == 1:
            self._busy.append(endpoint)
        self._arm(loop)

    def forget(self, endpoint: EmulatedEndpoint) -> None:
        if endpoint in self._busy:
            self._advance(asyncio.get_running_loop().time())
            if endpoint in self._busy:
                self._busy.remove(endpoint)

    def _advance(self, now: float) -> None:
        """Bring everything to `now`; messages that were through before depart at their own moments."""
        while self._busy:
            share = self._rate / len(self._busy)
            first = min(self._busy, key=lambda e: e.sending[0].left)
            needs_s = first.sending[0].left / share
            served_s = min(needs_s, max(0.0, now - self._at))
            for endpoint in self._busy:
                endpoint.sending[0].left -= served_s * share
            self._at += served_s
            if served_s < needs_s:
                return
            held = first.sending.popleft()
            if not first.sending:
                self._busy.remove(first)
            first.depart(held, self._at)
        self._at = now

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._busy:
            left = min(e.sending[0].left for e in self._busy)
            self._timer = loop.call_at(self._at + left * len(self._busy) / self._rate, self._wake)

    def _wake(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        self._advance(loop.time())
        self._arm(loop)


class EmulatedDriver:
    kinds = (KIND,)

    def __init__(self, below: Driver, network: Network, weigh: Weigh) -> None:
        self._below = below
        self._network = network
        self._weigh = weigh
        self._interface = Interface(network.bytes_per_s)

    async def start(self, events: Events, host: str, port: int) -> dict[str, str]:
        self._events = events
        self._loop = asyncio.get_running_loop()
        offers = await self._below.start(self, host, port)
        kind = min(offers, key=PREFERENCE.index)
        return {KIND: f"{self._network.site}/{kind}/{offers[kind]}"}

    def usable(self, kind: str, where: str) -> bool:
        _, below, rest = where.split("/", 2)
        return self._below.usable(below, rest)

    async def connect(self, kind: str, where: str) -> Endpoint:
        site, below, rest = where.split("/", 2)
        return self._endpoint(await self._below.connect(below, rest), self._network.latency_to(int(site)))

    def accept(self, request: object) -> Endpoint:
        return self._endpoint(self._below.accept(request), None)

    def _endpoint(self, below: Endpoint, latency_s: float | None) -> EmulatedEndpoint:
        return EmulatedEndpoint(below, self._interface, latency_s, self._weigh)

    def in_host(self, request: object) -> bool:
        return True

    def origin_of(self, request: object) -> str:
        return self._below.origin_of(request)

    def reject(self, request: object) -> None:
        self._below.reject(request)

    def close(self) -> None:
        self._below.close()

    # Events of the driver below.

    def on_connection(self, driver: Driver, request: object) -> None:
        self._events.on_connection(self, request)

    def on_message(self, endpoint: Endpoint, header: bytes, data: memoryview) -> None:
        if endpoint.user is not None:
            MOMENT.begin(*DUE.unpack(header[-DUE.size :]))
            try:
                self._events.on_message(endpoint.user, header[: -DUE.size], data)
            finally:
                MOMENT.end()

    def on_failed(self, endpoint: Endpoint, reason: str) -> None:
        mine: EmulatedEndpoint | None = endpoint.user
        if mine is not None:
            # Of an endpoint that was accepted it is not known where the peer is.
            delay_s = self._network.latency_max_s if mine.latency_s is None else mine.latency_s
            self._loop.call_later(delay_s, self._failed, mine, reason)

    def _failed(self, endpoint: EmulatedEndpoint, reason: str) -> None:
        if endpoint.open:
            endpoint.open = False
            self._events.on_failed(endpoint, reason)
