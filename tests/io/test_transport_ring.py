"""Shared memory between two processes of one host: only what the records on the socket say is ever believed."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from dataplane._fast.stream import Stream

from .test_transport_processes import child, link_both
from .transport_nodes import cluster, link, run, until

MAGIC = 0x464B
MESSAGE, RINGED, CHUNK, CREDIT, RING = 1, 2, 3, 4, 5
RING_BYTES = 1 << 20
CREDIT_MIN = 256 << 10
LIMIT = 1 << 24


def record(kind: int, length: int, header: bytes = b"") -> bytes:
    return struct.pack("<HBBIQ", MAGIC, kind, len(header), 0, length) + header


class Receiver:
    """A stream and what it told its owner."""

    def __init__(self, fd: int, limit_bytes: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.messages: list[bytes] = []
        self.failed_because = ""
        self.stream = Stream(fd, self, True)
        self.stream.limit_bytes = limit_bytes
        self.loop.add_reader(fd, self.stream.readable)

    def on_message(self, stream: Stream, header: bytes, data: memoryview) -> None:
        self.messages.append(bytes(data))

    def failed(self, stream: Stream, reason: str) -> None:
        self.failed_because = reason
        self.loop.call_soon(stream.close)

    def watch_writable(self, stream: Stream, wanted: bool) -> None:
        if wanted:
            self.loop.add_writer(stream.fd, stream.writable)
        else:
            self.loop.remove_writer(stream.fd)

    def again(self, stream: Stream) -> None:
        self.loop.call_soon(stream.readable)

    def released(self, stream: Stream) -> None:
        self.loop.remove_reader(stream.fd)
        self.loop.remove_writer(stream.fd)


@contextlib.asynccontextmanager
async def receiver(limit_bytes: int = LIMIT) -> AsyncIterator[tuple[socket.socket, Receiver]]:
    """The sending end, as bare as it gets, and a stream at the other one."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    it = Receiver(theirs.detach(), limit_bytes)
    try:
        with ours:
            yield ours, it
    finally:
        it.stream.close()


@contextlib.contextmanager
def memory(length: int = RING_BYTES, seals: int = fcntl.F_SEAL_SHRINK) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def send_with(connection: socket.socket, data: bytes, *fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([data], rights)


def test_the_ring_carries_chunks_and_gives_credit_when_it_is_worth_a_wake_up() -> None:
    async def work() -> None:
        async with receiver() as (connection, it):
            with memory() as fd, mmap.mmap(fd, RING_BYTES) as ring:
                ring[:6] = b"abcdef"
                send_with(connection, record(RING, RING_BYTES) + record(RINGED, 6, b"h"), fd)
                connection.sendall(record(CHUNK, 4) + record(CHUNK, 2))
                await until(lambda: it.messages)
                assert it.messages == [b"abcdef"]
                ring[:6] = b"xxxxxx"  # copied: what was received is not in it any more
                assert it.messages == [b"abcdef"]
                rest = CREDIT_MIN - 6
                connection.sendall(record(RINGED, rest) + record(CHUNK, rest - 1))
                await until(lambda: not select.select([it.stream.fd], [], [], 0)[0])
                with pytest.raises(BlockingIOError):
                    connection.recv(100, socket.MSG_DONTWAIT)
                connection.sendall(record(CHUNK, 1))
                await until(lambda: len(it.messages) == 2)
                connection.settimeout(2)
                assert connection.recv(100) == record(CREDIT, CREDIT_MIN)

    run(work())


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (record(CHUNK, 4), "a chunk out of place"),
        (record(RINGED, 100) + record(CHUNK, 101), "a chunk out of place"),
        (record(RINGED, LIMIT + 1), "over the limit"),
        (record(RINGED, 3 << 20) + record(CHUNK, RING_BYTES + 1), "a chunk out of place"),
        (record(RINGED, 3 << 20) + record(CHUNK, 100) + record(CHUNK, RING_BYTES - 99), "a chunk out of place"),
        (record(RINGED, 100) + record(MESSAGE, 1) + b"x", "a message began before the last one ended"),
        (record(RING, RING_BYTES), "not a ring"),
        (record(CREDIT, 1), "a record out of place"),
        (record(CREDIT, 2**64 - 1), "a record out of place"),
        (record(6, 1), "a record out of place"),
        (record(CHUNK, 1, b"h"), "not a record"),
        (b"\0" * 16, "not a record"),
    ],
)  # fmt: skip
def test_a_lie_about_the_ring_ends_the_stream(lie: bytes, reason: str) -> None:
    async def work() -> None:
        async with receiver() as (connection, it):
            with memory() as fd:
                send_with(connection, record(RING, RING_BYTES), fd)
                connection.sendall(lie)
                await until(lambda: it.failed_because)
                assert reason in it.failed_because
                assert it.messages == []
                assert it.stream.fd == -1

    run(work())


@pytest.mark.parametrize("first", [CREDIT_MIN - 1, CREDIT_MIN // 2 + 1, 40_000])
def test_credit_that_is_kept_back_stops_nobody(first: int) -> None:
    """All that was sent is taken out and some of its room not given back: what comes next still gets through."""

    async def work() -> None:
        async with cluster("local") as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            data = os.urandom(3 * RING_BYTES)
            for count, size in enumerate([first] * 9 + [len(data)], 1):
                assert a.transport.send(b.member, [memoryview(data)[:size]])
                await until(lambda count=count: len(b.messages) == count)
                assert b.messages[-1][1] == data[:size]
            await until(lambda: a.transport.queued_bytes("b") == 0)

    run(work())


def test_no_more_credit_than_was_used() -> None:
    async def work() -> None:
        async with receiver() as (connection, it):
            assert it.stream.send(b"", [bytes(100_000)])
            assert it.stream.queued_bytes == 0
            connection.sendall(record(CREDIT, 60_000))
            assert it.stream.send(b"", [bytes(RING_BYTES)])
            assert it.stream.queued_bytes == RING_BYTES  # its last chunk waits
            connection.sendall(record(CREDIT, 40_000))
            await until(lambda: it.stream.queued_bytes == 0)
            connection.sendall(record(CREDIT, RING_BYTES + 1))
            await until(lambda: it.failed_because)
            assert it.failed_because == "a record out of place"

    run(work())


@pytest.mark.parametrize(
    "fault", ["it may shrink", "too short", "not memory", "before the hello", "two of them"]
)
def test_a_ring_that_could_hurt_us_is_refused(fault: str) -> None:
    async def work() -> None:
        limit = 4096 if fault == "before the hello" else LIMIT
        before = len(os.listdir("/proc/self/fd"))
        async with receiver(limit) as (connection, it):
            seals = fcntl.F_SEAL_GROW if fault == "it may shrink" else fcntl.F_SEAL_SHRINK
            with memory(4096 if fault == "too short" else RING_BYTES, seals) as fd:
                passed = connection.fileno() if fault == "not memory" else fd
                send_with(connection, record(RING, RING_BYTES), passed)
                if fault == "two of them":
                    send_with(connection, record(RING, RING_BYTES), passed)
                await until(lambda: it.failed_because)
                assert it.failed_because == "not a ring"
        assert len(os.listdir("/proc/self/fd")) == before

    run(work())


def test_without_memory_for_a_ring_the_socket_carries_everything() -> None:
    async def work() -> None:
        async with cluster("local") as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            large = os.urandom(2 << 20)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                assert a.transport.send(b.member, [large])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert a.transport.queued_bytes("b") == len(large)  # more than the socket takes at once, no ring
            assert a.transport.send(b.member, [large, b"!"])
            await until(lambda: len(b.messages) == 2)
            assert [data for _, data in b.messages] == [large, large + b"!"]

    run(work())


def test_a_writer_that_stops_and_dies_in_the_middle_leaves_nothing_behind() -> None:
    async def work() -> None:
        async with cluster("local") as make, child("local", "b") as b:
            a = await make("a", queue_bytes_max=64 << 20)
            await link_both(a, b)
            large = os.urandom(8 << 20)
            # The other process echoes them: its ring is full and its last message cut short.
            for _ in range(4):
                assert a.transport.send(b.member, [b"echo", large])
            await until(lambda: a.messages)
            b.signal(signal.SIGSTOP)
            await asyncio.sleep(0)
            assert a.transport.send(b.member, [b"echo", large])
            assert a.downs == []
            killed = time.monotonic()
            b.signal(signal.SIGKILL)
            await until(lambda: len(a.downs) == 2)
            assert time.monotonic() - killed < 0.5
            assert {data for _, data in a.messages} == {b"echo" + large}
            assert a.transport.queued_bytes("b") == 0

    run(work())


def test_messages_of_every_size_around_the_ring_arrive_in_order() -> None:
    async def work() -> None:
        async with cluster("local") as make:
            a, b = await make("a"), await make("b")
            await link(a, b)
            data = os.urandom(3 * RING_BYTES)
            edges = [1, 4096, 32 << 10, 256 << 10, 768 << 10, RING_BYTES, 2 * RING_BYTES]
            sizes = [edge + delta for edge in edges for delta in (-1, 0, 1)] * 3
            for size in sizes:
                cut = size // 3
                assert a.transport.send(b.member, [data[:cut], b"", memoryview(data)[cut:size], b""])
            await until(lambda: len(b.messages) == len(sizes), 20)
            assert [len(message) for _, message in b.messages] == sizes
            assert all(message == data[: len(message)] for _, message in b.messages)
            await until(lambda: a.transport.queued_bytes("b") == 0)

    run(work())
