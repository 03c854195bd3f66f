"""The transport's promises (dataplane/transport/base.py), one suite for every kind."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgspec
import pytest

from controlplane.contract.ids import Member
from dataplane.transport import hello
from dataplane.transport.hello import Acceptor, Challenge, HelloError, Initiator, new_nonce

from .transport_nodes import NETWORKED, SECRET, cluster, link, run, until


@pytest.fixture(params=[*NETWORKED, "memory", "sealed"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sizes_parts_and_order(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            assert a.ups == [b.member]
            large = os.urandom(8 << 20)
            messages: list[list[bytes]] = [
                [], [b""], [b"x"], [large], [b"head", large[:65536], b"", large[:3]], [large[:65536]], [b"t"] * 40,
                [large[: 1 << 20], large[: 1 << 20]], [b"end"],
            ]  # fmt: skip
            for parts in messages:
                assert a.transport.send(b.member, [memoryview(part) for part in parts])
            await until(lambda: len(b.messages) == len(messages))
            assert [data for _, data in b.messages] == [b"".join(parts) for parts in messages]
            assert {peer for peer, _ in b.messages} == {a.member}
            await until(lambda: a.transport.queued_bytes("b") == 0)
            assert a.transport.stats.bytes_sent == b.transport.stats.bytes_received
            heard = b.transport.last_heard("a")
            assert heard is not None
            assert abs(heard - time.monotonic()) < 5
            assert a.transport.last_heard("b") is None

    run(work())


def test_ten_thousand_messages_stay_in_order(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            filler = bytes(300_000)
            for number in range(10_000):
                # Sizes on both sides of every protocol switch, large ones in between small ones.
                length = 300_000 if number % 500 == 0 else 20_000 if number % 50 == 0 else number % 200
                assert a.transport.send(b.member, [number.to_bytes(4, "big"), filler[:length]])
                if number % 1000 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(b.messages) == 10_000, 20)
            assert [int.from_bytes(data[:4], "big") for _, data in b.messages] == list(range(10_000))

    run(work())


def test_both_directions_are_separate_links(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            assert not b.transport.connected(a.member)
            assert not b.transport.send(a.member, [b"no link of ours"])
            await link(b, a)
            assert b.transport.send(a.member, [b"back"])
            await until(lambda: a.messages == [(b.member, b"back")])
            a.transport.disconnect("b")
            assert not a.transport.connected(b.member)
            await until(lambda: b.down("incoming"))
            assert b.transport.connected(a.member)
            assert a.downs == []

    run(work())


def test_new_incarnation_replaces_the_old(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, old = await make("a"), await make("b", "1")
            await link(a, old)
            await old.transport.close()
            await until(lambda: a.down("outgoing"))
            assert not a.transport.send(old.member, [b"after its end"])
            new = await make("b", "2")
            await link(a, new)
            assert not a.transport.connected(old.member)
            assert not a.transport.send(old.member, [b"for the dead"])
            assert a.transport.send(new.member, [b"for the living"])
            await until(lambda: new.messages == [(a.member, b"for the living")])

    run(work())


def test_link_returns_by_itself(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            await b.transport.close()
            await until(lambda: not a.transport.connected(b.member))
            again = await make("b", ports=(b.port,))
            await until(lambda: a.transport.connected(again.member))
            assert a.ups == [b.member, b.member]

    run(work())


@pytest.mark.parametrize("wrong", ["secret", "cluster", "incarnation"])
def test_wrong_hello_is_refused_and_counted(kind: str, wrong: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            b = await make("b")
            settings: dict[str, Any] = {"secret": SECRET + b"!"} if wrong == "secret" else {}
            settings |= {"cluster": "other"} if wrong == "cluster" else {}
            a = await make("a", **settings)
            wanted = Member("b", "0" if wrong == "incarnation" else "1")
            a.transport.connect(wanted, b.address)
            await until(lambda: b.transport.stats.auth_failures >= 2)  # it also tries again
            assert not a.transport.connected(wanted)
            assert not a.transport.send(wanted, [b"unheard"])
            assert (a.ups, b.downs, b.messages) == ([], [], [])

    run(work())


@pytest.mark.parametrize("kind", NETWORKED)
def test_a_peer_of_another_version_has_no_link_and_a_reason(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that cannot be read are not dropped on a link that stays up: there is no link, and that is told, once."""

    def later(_: Acceptor) -> bytes:
        return msgspec.msgpack.encode(Challenge(hello.PROTOCOL + 1, new_nonce()))

    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            with monkeypatch.context() as patch:
                patch.setattr(Acceptor, "challenge", later)
                a.transport.connect(b.member, b.address)
                await until(lambda: a.transport.stats.auth_failures >= 3)  # tried again, told once
                assert [down[:2] for down in a.downs] == [
                    (
                        b.member,
                        f"no link: the peer speaks protocol {hello.PROTOCOL + 1}, we speak {hello.PROTOCOL}",
                    )
                ]
                assert not a.transport.connected(b.member)
            await until(lambda: a.transport.connected(b.member))  # it was restarted with ours
            assert len(a.downs) == 1

    run(work())


def test_a_link_that_brings_foreign_frames_is_closed_and_does_not_spin(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            assert a.transport.send(b.member, [b"another version's"])
            await until(lambda: len(b.messages) == 1)
            b.transport.refuse(Member("a", "0"), "an incarnation that is not there")
            assert b.downs == []
            b.transport.refuse(a.member, "frames of version 9")
            assert [down[:2] for down in b.downs] == [(a.member, "incoming link: frames of version 9")]
            await until(lambda: len(a.downs) == 1)
            await until(lambda: a.transport.connected(b.member))
            # Whoever does it again and again is waited for longer and longer.
            times = []
            for _ in range(4):
                await until(lambda: a.transport.send(b.member, [b"again"]))
                count = len(b.messages)
                await until(
                    lambda count=count: len(b.messages) > count or not a.transport.connected(b.member)
                )
                times.append(asyncio.get_running_loop().time())
                b.transport.refuse(a.member, "frames of version 9")
                await until(lambda: not a.transport.connected(b.member))
            if kind != "memory":
                retry_s = b.transport._config.retry_min_s
                assert times[-1] - times[0] >= (4 + 8) * retry_s * 0.5, (
                    "pauses are drawn from their upper half"
                )

    run(work())


def test_dead_port_is_bounded_and_found_later(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await b.transport.close()
            started = time.monotonic()
            a.transport.connect(b.member, b.address)
            assert time.monotonic() - started < 0.1
            await asyncio.sleep(0)
            assert not a.transport.connected(b.member)
            await make("b", ports=(b.port,))
            await until(lambda: a.transport.connected(b.member))

    run(work())


def test_limits_refuse_and_count(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a", message_bytes_max=1000), await make("b")
            await link(a, b)
            assert a.transport.send(b.member, [bytes(1000)])
            assert not a.transport.send(b.member, [bytes(1000), b"."])
            assert a.transport.stats.sends_refused == 1
            await until(lambda: len(b.messages) == 1)

    run(work())


def test_hello_proves_both_sides() -> None:
    a, b, nonce = Member("a", "1"), Member("b", "1"), new_nonce()
    acceptor, initiator = Acceptor(SECRET, "c", b, nonce), Initiator(SECRET, "c", a, b, new_nonce())
    peer, token, accept = acceptor.admit(response := initiator.answer(acceptor.challenge()))
    assert peer == a
    assert initiator.confirm(accept) == token
    with pytest.raises(HelloError):  # a response is worth nothing against another challenge
        Acceptor(SECRET, "c", b, new_nonce()).admit(response)
    imposter = Acceptor(SECRET + b"?", "c", b, nonce)
    victim = Initiator(SECRET, "c", a, b, new_nonce())
    response = victim.answer(imposter.challenge())
    with pytest.raises(HelloError):
        imposter.admit(response)
    with pytest.raises(HelloError):
        victim.confirm(accept)
    for junk in (b"", b"\xc1", response[:-1], b"\x00" * 5000, acceptor.challenge()):
        with pytest.raises(HelloError):
            acceptor.admit(junk)


def test_a_callback_that_raises_loses_only_its_own_message(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            seen: list[str] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(str(context)))
            append = b.messages.append

            class Picky(list[tuple[Member, bytes]]):
                def append(self, item: tuple[Member, bytes]) -> None:
                    if item[1] == b"bad":
                        raise ValueError("a bad message")
                    append(item)

            accepted, b.messages = b.messages, Picky()
            for data in (b"one", b"bad", b"two"):
                assert a.transport.send(b.member, [data])
            await until(lambda: len(accepted) == 2)
            assert [data for _, data in accepted] == [b"one", b"two"]
            assert "a bad message" in seen[0]

    run(work())
