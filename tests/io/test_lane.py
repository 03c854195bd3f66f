"""What nobody waits for leaves a node when nothing else does, and is not held for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from controlplane.contract.ids import Member
from dataplane.core.messages import Fence, KvDropMeta, Meta
from dataplane.transport import lane
from dataplane.transport.base import TransportConfig
from dataplane.transport.lane import PATIENCE_S, Lane
from dataplane.transport.links import LinkTransport
from dataplane.transport.sockets import UNSENT_MAX, SocketDriver

from .transport_nodes import SECRET, until

PEER, OTHER = Member("n1", "a"), Member("n2", "a")


class Links(LinkTransport):
    """Of which the test says what waits on them."""

    def __init__(self) -> None:
        config = TransportConfig(member=Member("n0", "a"), cluster="test", secret=SECRET)
        super().__init__(
            config, [], on_message=lambda *_: None, on_link_up=lambda _: None, on_link_down=lambda *_: None
        )
        self.waiting = 0
        self.open = {PEER, OTHER}

    @property
    def queued_total(self) -> int:
        return self.waiting

    def connected(self, peer: Member) -> bool:
        return peer in self.open


class Bench:
    """A lane, and what has left through it."""

    def __init__(self) -> None:
        self.links = Links()
        self.lane = Lane(self.links, self.send)
        self.left: list[tuple[Member, int]] = []
        self.fills = 0  # what each message makes wait on the links

    def send(self, peer: Member, meta: Meta, _: object) -> bool:
        assert isinstance(meta, KvDropMeta)
        self.left.append((peer, meta.rids[0]))
        self.links.waiting += self.fills
        return True

    def put(self, number: int, peer: Member = PEER, size: int = 10) -> bool:
        return self.lane.send(peer, KvDropMeta("p0", Fence(1), (number,)), bytes(size))


def run(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Bench())

    asyncio.run(main())


def test_on_free_links_everything_goes_at_once_and_in_order() -> None:
    async def test(bench: Bench) -> None:
        for number, peer in enumerate((PEER, OTHER, PEER)):
            assert bench.put(number, peer)
        assert bench.left == [(PEER, 0), (OTHER, 1), (PEER, 2)]

    run(test)


def test_it_waits_until_the_links_are_free_and_goes_one_at_a_time() -> None:
    async def test(bench: Bench) -> None:
        bench.links.waiting, bench.fills = 1, 1
        for number in range(3):
            assert bench.put(number)
        assert bench.left == []
        for sent in (1, 2, 3):
            bench.links.waiting = 0
            await until(lambda sent=sent: len(bench.left) == sent)  # type: ignore[misc]
            assert bench.links.waiting == 1
        assert [number for _, number in bench.left] == [0, 1, 2]

    run(test)


def test_links_that_are_never_free_hold_it_for_a_moment_only() -> None:
    async def test(bench: Bench) -> None:
        bench.links.waiting = 1
        since = time.monotonic()
        for number in range(3):
            bench.put(number)
        await until(lambda: len(bench.left) == 3)
        assert time.monotonic() - since >= 3 * PATIENCE_S - 0.01, "one message for each wait"

    run(test)


def test_without_a_link_or_room_it_refuses() -> None:
    async def test(bench: Bench) -> None:
        bench.links.open.discard(OTHER)
        assert not bench.put(0, OTHER)
        bench.links.waiting = 1
        assert bench.put(1, size=lane.HELD_BYTES_MAX)
        assert not bench.put(2, size=1)
        bench.lane.close()
        assert bench.put(3, size=1)
        await until(lambda: bool(bench.left))
        assert bench.left == [(PEER, 3)], "what waited at the end is dropped"

    run(test)


def test_what_the_kernel_has_not_sent_is_seen_to_wait() -> None:
    """Over TCP: to a peer that does not read no more goes than both kernels hold, and the rest counts as waiting."""

    async def test() -> None:
        heard = []
        ups: list[Member] = []
        a, b = (
            LinkTransport(
                TransportConfig(member=Member(name, "1"), cluster="test", secret=SECRET),
                [SocketDriver(("tcp",))],
                on_message=lambda _, data: heard.append(len(data)),
                on_link_up=ups.append,
                on_link_down=lambda *_: None,
            )
            for name in ("a", "b")
        )
        await a.start()
        a.connect(Member("b", "1"), await b.start())
        await until(lambda: bool(ups))
        size = UNSENT_MAX // 4
        sent = 0
        while not a.queued_total:  # nothing is read, since the loop does not get its turn
            assert a.send(Member("b", "1"), [bytes(size)])
            sent += 1
            assert sent * size <= 6 * UNSENT_MAX, "the kernel takes what it does not send"
        await until(lambda: len(heard) == sent)
        assert a.queued_total == 0
        await a.close()
        await b.close()

    asyncio.run(test())
