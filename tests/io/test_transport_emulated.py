"""Emulated links against a clock: latency, bandwidth, sharing, order, and when a death is heard of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from controlplane.contract.ids import Member
from dataplane.devices import precise_loop
from dataplane.transport.base import TransportConfig
from dataplane.transport.emulated import EmulatedDriver, Network, Weigh
from dataplane.transport.links import LinkTransport
from dataplane.transport.sockets import SocketDriver

from .transport_nodes import SECRET, until

LATENCY = ((0.0, 0.05, 0.02), (0.05, 0.0, 0.03), (0.02, 0.03, 0.0))
RATE = 10e6  # bytes a second
LATE_S = 0.5  # what a busy machine may take; the tests' point is that nothing ever comes early


class Site:
    """A node of one site, and when it heard what."""

    def __init__(self, site: int, rate: float = RATE) -> None:
        self.member = Member(f"n{site}", "1")
        self.heard: list[tuple[float, Member, bytes]] = []
        self.downs: list[tuple[float, str]] = []
        self.ups: list[Member] = []
        weigh: Weigh = lambda parts: sum(map(len, parts))  # noqa: E731
        self.driver = EmulatedDriver(SocketDriver(), Network(site, LATENCY, rate), weigh)
        self.transport = LinkTransport(
            TransportConfig(member=self.member, cluster="test", secret=SECRET, retry_min_s=0.01),
            [self.driver],
            on_message=lambda peer, data: self.heard.append((time.monotonic(), peer, bytes(data))),
            on_link_up=self.ups.append,
            on_link_down=lambda _, reason: self.downs.append((time.monotonic(), reason)),
        )


async def joined(*sites: Site) -> None:
    """Links from the first to all others."""
    first, *others = sites
    addresses = [await site.transport.start() for site in sites]
    for site, address in zip(others, addresses[1:], strict=True):
        first.transport.connect(site.member, address)
    await until(lambda: len(first.ups) == len(others))


def run(test: Callable[[], object]) -> None:
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(test())  # type: ignore[arg-type]


def test_a_message_takes_the_latency_between_its_sites() -> None:
    async def test() -> None:
        a, b, c = (Site(n) for n in range(3))
        await joined(a, b, c)
        sent = time.monotonic()
        for peer in (b, c):
            assert a.transport.send(peer.member, [b"hello"])
        await until(lambda: bool(b.heard and c.heard))
        for peer, latency in ((b, 0.05), (c, 0.02)):
            took = peer.heard[0][0] - sent
            assert latency <= took < latency + LATE_S
        assert a.transport.queued_bytes("n1") == 0
        for site in (a, b, c):
            await site.transport.close()

    run(test)


def test_an_interface_sends_at_its_rate_and_shares_it_between_peers() -> None:
    async def test() -> None:
        a, b, c = (Site(n) for n in range(3))
        await joined(a, b, c)
        big = bytes(1_000_000)  # 0.1 s alone
        sent = time.monotonic()
        a.transport.send(b.member, [big])
        a.transport.send(b.member, [b"behind it" * 500])
        a.transport.send(c.member, [big])
        alone_s = time.monotonic() - sent  # that the first one may have had the interface to itself
        assert a.transport.queued_bytes("n1") == 1_000_000 + 4500
        await until(lambda: len(b.heard) == 2 and bool(c.heard))
        # Both have half the rate while both send.
        for peer, latency in ((b, 0.05), (c, 0.02)):
            took = peer.heard[0][0] - sent
            assert 0.2 + latency - alone_s <= took < 0.2 + latency + LATE_S
        assert [data[:6] for _, _, data in b.heard] == [bytes(6), b"behind"]
        for site in (a, b, c):
            await site.transport.close()

    run(test)


def test_small_messages_pass_a_large_one_for_another_peer_but_never_one_for_their_own() -> None:
    async def test() -> None:
        a, b, c = (Site(n) for n in range(3))
        await joined(a, b, c)
        sent = time.monotonic()
        a.transport.send(b.member, [bytes(3_000_000)])
        a.transport.send(b.member, [b"after"])
        a.transport.send(c.member, [b"quick"])
        await until(lambda: len(b.heard) == 2 and bool(c.heard))
        assert c.heard[0][0] < b.heard[0][0]
        assert [len(data) for _, _, data in b.heard] == [3_000_000, 5]
        assert b.heard[1][0] - sent >= 0.35
        for site in (a, b, c):
            await site.transport.close()

    run(test)


def test_order_and_content_hold_for_many_messages_of_all_sizes() -> None:
    async def test() -> None:
        a, b = Site(0), Site(1)
        await joined(a, b)
        messages = [bytes([n % 256]) * (1 + (n * 7919) % 9000) for n in range(300)]
        sent = time.monotonic()
        for message in messages:
            assert a.transport.send(b.member, [message])
        await until(lambda: len(b.heard) == len(messages))
        assert [data for _, _, data in b.heard] == messages
        assert b.heard[-1][0] - sent >= sum(map(len, messages[1:])) / RATE + 0.05  # the first one is small
        for site in (a, b):
            await site.transport.close()

    run(test)


def test_a_death_is_heard_of_one_latency_later_and_what_was_on_its_way_is_lost() -> None:
    async def test() -> None:
        a, b = Site(0), Site(1)
        await joined(a, b)
        a.transport.send(b.member, [b"lost"])
        ended = time.monotonic()
        b.driver.close()
        for link in list(b.transport._incoming.values()):
            link.endpoint.close()
        await until(lambda: bool(a.downs))
        assert 0.05 <= a.downs[0][0] - ended < 0.05 + LATE_S
        assert b.heard == []
        await a.transport.close()
        await b.transport.close()

    run(test)
