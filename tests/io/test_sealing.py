"""Sealed links: what leaves the host can neither be read nor changed, and both ends have proved which node they are."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.identity import ProcessRole
from controlplane.contract.ids import Member
from dataplane.transport.base import Part
from dataplane.transport.hello import (
    Acceptor,
    Challenge,
    HelloError,
    Initiator,
    Response,
    _proof,
    _transcript,
    new_nonce,
)
from dataplane.transport.links import MESSAGE
from dataplane.transport.sealing import JOINED_BYTES, KEY_BYTES, SMALL_BYTES, Opener, Sealer
from tests.certificates import folder
from tests.io.transport_nodes import CLUSTER, SECRET, cluster, identity, link, run, until

HEADER = MESSAGE.pack(2, bytes(16), 7)
SECRET_TEXT = b"what a tenant asked "
LARGE = SMALL_BYTES + 1
HUGE = JOINED_BYTES + 1


def opened(opener: Opener, header: bytes, sequence: int, sealed: Part) -> bytes | None:
    """As it arrives: in memory of its own."""
    message = opener.open(header, sequence, memoryview(bytearray(sealed)))
    return None if message is None else bytes(message)


@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (1,), (60, 0), (60, LARGE), (LARGE, HUGE), (HUGE,), (1, 2, 3, 4), (LARGE, 0, 5, LARGE)],
)
def test_messages_come_out_as_they_went_in(lengths: tuple[int, ...]) -> None:
    key = os.urandom(KEY_BYTES)
    sealer, opener = Sealer(key), Opener(key)
    parts = [os.urandom(length) for length in lengths]
    for sequence in range(3):
        sealed = sealer.seal(HEADER, sequence, parts, 0)
        assert len(sealed) == opener.bytes_max(sum(lengths))
        assert opened(opener, HEADER, sequence, sealed) == b"".join(parts)


def test_what_is_not_sent_is_not_overwritten() -> None:
    key = os.urandom(KEY_BYTES)
    sealer, opener = Sealer(key), Opener(key)
    messages = [os.urandom(LARGE) for _ in range(40)]
    waiting: list[Part] = []
    for sequence, message in enumerate(messages):
        waiting.append(sealer.seal(HEADER, sequence, [message], sum(map(len, waiting))))
        if len(waiting) == 3:  # the first one has left
            assert opened(opener, HEADER, sequence - 2, waiting.pop(0)) == messages[sequence - 2]
    assert len(sealer._busy) + len(sealer._free) <= 4, "buffers are used again"


def test_whatever_is_changed_is_noticed() -> None:
    key = os.urandom(KEY_BYTES)
    data = bytes(Sealer(key).seal(HEADER, 7, [b"head" * 5, os.urandom(3 * LARGE)], 0))

    def opens(header: bytes, sequence: int, data: bytes) -> bool:
        return opened(Opener(key), header, sequence, data) is not None

    assert opens(HEADER, 7, data)
    assert not opens(HEADER, 8, data), "at another place in the link"
    assert not opens(HEADER, 7, data[:-1])
    assert not opens(HEADER, 7, data + b"\0")
    assert not opens(HEADER, 7, b"")
    assert opened(Opener(os.urandom(KEY_BYTES)), HEADER, 7, data) is None
    for at in (0, 25, 40, len(data) // 2, len(data) - 1):
        assert not opens(HEADER, 7, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]), at
    for at in range(len(HEADER)):
        assert not opens(HEADER[:at] + bytes([HEADER[at] ^ 1]) + HEADER[at + 1 :], 7, data), at


@contextlib.asynccontextmanager
async def tap(port: int, change: Callable[[bytes], bytes]) -> AsyncIterator[tuple[int, bytearray]]:
    """A man in the middle before `port`: his own port, and all that went from the dialling side."""
    heard = bytearray()
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inward: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if inward:
                    heard.extend(data)
                    data = change(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        for task in (pump(reader, there_writer, True), pump(there_reader, writer, False)):
            tasks.add(asyncio.create_task(task))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heard
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("kind", ["tcp", "sealed"])
def test_who_listens_reads_nothing(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a, b = await make("a"), await make("b")
            async with tap(b.port, lambda data: data) as (port, heard):
                a.transport.connect(b.member, f"tcp=127.0.0.1:{port}")
                await until(lambda: a.transport.connected(b.member))
                message = SECRET_TEXT * 5000
                assert a.transport.send(b.member, [b"head", message])
                await until(lambda: bool(b.messages))
                assert b.messages == [(a.member, b"head" + message)]
                assert (SECRET_TEXT in heard) == (kind == "tcp")

    run(work())


def test_who_changes_a_bit_ends_the_link() -> None:
    async def work() -> None:
        seen = 0

        def change(data: bytes) -> bytes:
            nonlocal seen
            seen += len(data)
            return data[:-1] + bytes([data[-1] ^ 1]) if seen > 20_000 else data

        async with cluster("sealed") as make:
            a, b = await make("a"), await make("b")
            async with tap(b.port, change) as (port, _):
                a.transport.connect(b.member, f"tcp=127.0.0.1:{port}")
                await until(lambda: a.transport.connected(b.member))
                assert a.transport.send(b.member, [bytes(30_000)])
                await until(lambda: b.down("incoming"))
                assert b.messages == []

    run(work())


def test_a_secret_is_not_enough(tmp_path: Path) -> None:
    """Who knows the cluster's secret and has no certificate, one of another authority or of another node, has no link
    to or from a node with certificates."""
    strangers = folder(tmp_path, (ProcessRole.NODE, "a"))

    async def work() -> None:
        async with cluster("sealed") as make:
            b = await make("b")
            for count, wrong in enumerate((None, identity("a", strangers), identity("c"))):
                a = await make("a", str(count), identity=wrong)
                a.transport.connect(b.member, b.address)
                failures = a.transport.stats.auth_failures + b.transport.stats.auth_failures
                await until(
                    lambda a=a, failures=failures: (  # type: ignore[misc]
                        a.transport.stats.auth_failures + b.transport.stats.auth_failures > failures
                    )
                )
                assert not a.transport.connected(b.member)
                assert a.ups == b.messages == []
                a.transport.disconnect("b")

    run(work())


def test_hellos_are_bound_to_their_keys() -> None:
    a, b = Member("a", "1"), Member("b", "1")
    acceptor = Acceptor(SECRET, CLUSTER, b, new_nonce(), identity("b"))
    initiator = Initiator(SECRET, CLUSTER, a, b, new_nonce(), identity("a"))
    peer, token, accept = acceptor.admit(initiator.answer(acceptor.challenge()))
    assert (peer, initiator.confirm(accept)) == (a, token)
    assert acceptor.key is not None
    assert acceptor.key == initiator.key
    again = Acceptor(SECRET, CLUSTER, b, new_nonce(), identity("b"))
    other = Initiator(SECRET, CLUSTER, a, b, new_nonce(), identity("a"))
    _, _, accept_again = again.admit(other.answer(again.challenge()))
    assert again.key != acceptor.key
    with pytest.raises(HelloError):
        Initiator(SECRET, CLUSTER, a, b, new_nonce(), identity("a")).confirm(accept_again)
    plain = Acceptor(SECRET, CLUSTER, b, new_nonce())
    with pytest.raises(HelloError, match="only one side has certificates"):  # nobody talks a node out of it
        Initiator(SECRET, CLUSTER, a, b, new_nonce(), identity("a")).answer(plain.challenge())


@settings(max_examples=60, deadline=None)
@given(
    key=st.one_of(st.binary(max_size=40), st.binary(min_size=32, max_size=32), st.just(bytes(32))),
    chain=st.lists(st.binary(max_size=60), max_size=5).map(tuple),
    signature=st.binary(max_size=80),
    genuine=st.booleans(),
)
def test_who_knows_the_secret_and_says_anything_is_refused(
    key: bytes, chain: tuple[bytes, ...], signature: bytes, genuine: bool
) -> None:
    """With the right proofs, made with the cluster's secret, and even a certificate that was seen elsewhere."""
    a, b = Member("a", "1"), Member("b", "1")
    if genuine:
        chain = identity("a").chain()
    challenge = new_nonce()
    acceptor = Acceptor(SECRET, CLUSTER, b, challenge, identity("b"))
    public = msgspec.msgpack.decode(acceptor.challenge(), type=Challenge).key
    nonce = new_nonce()
    transcript = [*_transcript(CLUSTER, a, b, challenge, nonce), public, key]
    said = Response(a, nonce, _proof(SECRET, "initiator", transcript), key, chain, signature)
    with pytest.raises(HelloError):
        acceptor.admit(msgspec.msgpack.encode(said))
    assert acceptor.key is None


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_noise_is_a_hello(noise: bytes) -> None:
    a, b = Member("a", "1"), Member("b", "1")
    with pytest.raises(HelloError):
        Acceptor(SECRET, CLUSTER, b, new_nonce(), identity("b")).admit(noise)
    with pytest.raises(HelloError):
        Initiator(SECRET, CLUSTER, a, b, new_nonce(), identity("a")).answer(noise)


def test_a_key_that_links_cannot_use_leaves_them_as_they_are(tmp_path: Path) -> None:
    made = folder(tmp_path, (ProcessRole.NODE, "a"))
    mine = identity("a", made)
    before = mine.chain()
    mine._identity.files._material = replace(
        mine._identity.files.current(), key=b"of a kind that is not known"
    )
    assert mine.chain() == before
    assert mine.sign(b"x")


def test_links_within_a_host_stay_as_they_are() -> None:
    async def work() -> None:
        async with cluster("local") as make:
            a, b = await make("a", identity=identity("a")), await make("b", identity=identity("b"))
            await link(a, b)
            assert a.transport.carried_by(b.member) == "local"  # type: ignore[attr-defined]
            assert a.transport.send(b.member, [b"x"])
            await until(lambda: bool(b.messages))

    run(work())
