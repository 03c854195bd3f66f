"""Transports between real processes: death, stops, strangers on the ports, descriptors, idle cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from controlplane.contract.ids import Member
from dataplane.transport.driver import Driver, Endpoint, parse_address
from dataplane.transport.hello import TOKEN_BYTES, Initiator, new_nonce
from dataplane.transport.links import HELLO, MESSAGE
from dataplane.transport.memory import MemoryNetwork
from dataplane.transport.sockets import split_address

from .transport_nodes import NETWORKED, SECRET, Node, cluster, driver, link, run, until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=NETWORKED)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Child:
    """A transport in its own process; see transport_child.py."""

    def __init__(self, process: asyncio.subprocess.Process, member: Member) -> None:
        self.process, self.member, self.address = process, member, ""

    async def line(self, *expected: str) -> str:
        assert self.process.stdout is not None
        while True:
            line = (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode().strip()
            assert line, "the child ended"
            if line.split()[: len(expected)] == list(expected):
                return line

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((" ".join(words) + "\n").encode())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@contextlib.asynccontextmanager
async def child(kind: str, name: str, incarnation: str = "1") -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.io.transport_child", kind, name, incarnation, SECRET.hex(),
        cwd=REPOSITORY, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    it = Child(process, Member(name, incarnation))
    try:
        it.address = (await it.line("address")).split()[1]
        yield it
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def link_both(a: Node, b: Child) -> None:
    a.transport.connect(b.member, b.address)
    b.tell("connect", a.member.node, a.member.incarnation, a.address)
    await until(lambda: a.transport.connected(b.member), 10)
    await b.line("up", a.member.node)


async def echo(a: Node, b: Child, data: bytes) -> None:
    count = len(a.messages)
    assert a.transport.send(b.member, [b"echo", data])
    await until(lambda: len(a.messages) > count)
    assert a.messages[-1] == (b.member, b"echo" + data)


async def end_of(pid: int) -> float:
    """When this loop has learnt that the process has ended, by its clock."""
    loop, process = asyncio.get_running_loop(), os.pidfd_open(pid)
    ended: asyncio.Future[float] = loop.create_future()
    loop.add_reader(process, lambda: ended.done() or ended.set_result(time.monotonic()))
    try:
        return await ended
    finally:
        loop.remove_reader(process)
        os.close(process)


@pytest.mark.parametrize("activity", ["idle", "sending"])
def test_killed_peer_is_seen_at_once(kind: str, activity: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make, child(kind, "b") as b:
            a = await make("a")
            await link_both(a, b)
            await echo(a, b, bytes(100_000))
            if activity == "sending":
                for _ in range(100):
                    assert a.transport.send(b.member, [bytes(1 << 20)])
                await asyncio.sleep(0)
            # On a busy machine the end of the process itself reaches this loop as late as that of its connections.
            end = asyncio.create_task(end_of(b.process.pid))
            await asyncio.sleep(0)
            b.signal(signal.SIGKILL)
            ended = await end
            await until(lambda: a.down("outgoing") and a.down("incoming"))
            outgoing, incoming = a.down("outgoing"), a.down("incoming")
            assert outgoing is not None
            assert incoming is not None
            assert outgoing - ended < 0.1
            assert incoming - ended < 0.1
            assert a.transport.stats.links_down == 2
            assert not a.transport.send(b.member, [b"after death"])
            assert a.transport.queued_bytes("b") == 0
            await asyncio.sleep(0.3)  # several attempts to dial the dead: no further event
            assert len(a.downs) == 2

    run(work())


def test_stopped_peer_does_not_hold_up_the_sender(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make, child(kind, "b") as b:
            a = await make("a", queue_bytes_max=8 << 20)
            await link_both(a, b)
            b.signal(signal.SIGSTOP)
            try:
                accepted, slowest_s = 0, 0.0
                started = time.monotonic()
                while time.monotonic() - started < 5:
                    before = time.monotonic()
                    sent = a.transport.send(b.member, [b"xxxx", bytes(1 << 20)])
                    await asyncio.sleep(0)
                    slowest_s = max(slowest_s, time.monotonic() - before)
                    if not sent:
                        break
                    accepted += 1
                assert not sent, "the queue never filled"
                assert 0 < a.transport.queued_bytes("b") <= 8 << 20
                assert slowest_s < 0.25
                assert a.downs == []
            finally:
                b.signal(signal.SIGCONT)
            await until(lambda: a.transport.queued_bytes("b") == 0)
            await echo(a, b, b"awake")
            assert a.transport.stats.messages_sent == accepted + 1

    run(work())


def listening(pid: int) -> list[tuple[int, Any]]:
    """Every socket that a process of ours listens on: what it announces, UCX's own data ports, Unix sockets."""
    inodes = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(entry.path))
    tcp = [row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    unix = [row.split() for row in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
    found: list[tuple[int, Any]] = [
        (socket.AF_INET, ("127.0.0.1", int(r[1].split(":")[1], 16)))
        for r in tcp if r[3] == "0A" and f"socket:[{r[9]}]" in inodes
    ]  # fmt: skip
    accepts = "00010000"
    names = [r[7] for r in unix if r[3] == accepts and f"socket:[{r[6]}]" in inodes]
    return found + [(socket.AF_UNIX, "\0" + name[1:]) for name in names]


def test_garbage_on_every_port_changes_nothing(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make, child(kind, "b") as b:
            a = await make("a")
            await link_both(a, b)
            ports = listening(b.process.pid)
            assert {family for family, _ in ports} == {
                socket.AF_INET,
                *([socket.AF_UNIX] * (kind == "local")),
            }
            held = []
            garbage = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 3, b"\x00" * 4096, b"\xff" * 4096]
            garbage += [secrets.token_bytes(length) for length in (1, 8, 16, 64, 2048, 70_000)]
            garbage += [b"KF\x01\x00" + bytes(4) + b"\xff" * 8, b"KF\x03\x00" + bytes(12)]
            for family, where in ports:
                for data in garbage:
                    connection = socket.socket(family)
                    connection.settimeout(2)
                    connection.connect(where)
                    held.append(connection)
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        connection.sendall(data)
            await echo(a, b, b"with garbage connected")
            for connection in held:
                connection.close()
            await echo(a, b, b"after the garbage")
            async with child(kind, "c") as c:
                c.tell("connect", "b", "1", b.address)
                await c.line("up", "b")
            assert a.downs == []
            assert b.process.returncode is None

    run(work())


class RawClient:
    """A peer below the transport, to say what the transport never would."""

    def __init__(self, kind: str, address: str) -> None:
        self.heard: list[bytes] = []
        self.failures = 0
        self.driver = driver(kind)
        self.kind, self.where = kind, parse_address(address)[kind]

    async def connect(self) -> Endpoint:
        endpoint = await self.driver.connect(self.kind, self.where)
        endpoint.limit_bytes = 1 << 20
        return endpoint

    def on_connection(self, driver: Driver, request: object) -> None:
        raise AssertionError("nobody knows where it listens")

    def on_message(self, endpoint: Endpoint, header: bytes, data: memoryview) -> None:
        self.heard.append(bytes(data))

    def on_failed(self, endpoint: Endpoint, reason: str) -> None:
        self.failures += 1
        endpoint.close()


@contextlib.asynccontextmanager
async def raw_client(kind: str, address: str) -> AsyncIterator[RawClient]:
    raw = RawClient(kind, address)
    await raw.driver.start(raw, "127.0.0.1", 0)
    try:
        yield raw
    finally:
        raw.driver.close()


def test_silent_connections_are_bounded_in_number_and_time(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            b = await make("b", connect_timeout_s=0.4, unauthenticated_max=3)
            async with raw_client(kind, b.address) as raw:
                held = [await raw.connect() for _ in range(5)]
                await until(lambda: b.transport.stats.auth_failures == 2)  # two too many
                await until(lambda: raw.failures == 5)  # and the others in time
                assert b.transport.stats.auth_failures == 5
                assert len(held) == 5
                a = await make("a")
                await link(a, b)

    run(work())


def test_silent_connections_keep_no_peer_out(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            b = await make("b", connect_timeout_s=30.0, unauthenticated_max=3)
            async with raw_client(kind, b.address) as raw:
                held = [await raw.connect() for _ in range(3)]
                await until(lambda: len(raw.heard) == 3)  # all three hold a place
                a = await make("a", connect_timeout_s=1.0)
                with structlog.testing.capture_logs() as told:
                    await link(a, b)
                    held += [await raw.connect() for _ in range(10)]
                    await until(lambda: raw.failures >= 10)
                assert (raw.failures, len(held)) == (10, 13)  # three may wait
                assert a.transport.connected(b.member)
                assert len([line for line in told if line["event"] == "link refused"]) == 1

    run(work())


def test_silent_connections_of_one_address_end_none_of_another() -> None:
    """The flood's own make room: a slow peer from elsewhere is not cut off in the middle of its hello."""

    async def work() -> None:
        async with cluster("tcp") as make:
            b = await make("b", connect_timeout_s=30.0, unauthenticated_max=4)
            host, port = split_address(parse_address(b.address)["tcp"])
            loop = asyncio.get_running_loop()
            held: list[socket.socket] = []

            async def silent(source: str) -> socket.socket:
                connection = socket.socket()
                held.append(connection)
                connection.setblocking(False)
                connection.bind((source, 0))
                await loop.sock_connect(connection, (host, port))
                assert await loop.sock_recv(connection, 1 << 16)  # the challenge: it holds a place
                return connection

            slow = [await silent("127.0.0.2"), await silent("127.0.0.3")]
            flood = [await silent("127.0.0.4") for _ in range(12)]
            await until(lambda: b.transport.stats.auth_failures == 10)
            for connection in slow:
                with pytest.raises(BlockingIOError):
                    connection.recv(1)
            assert [connection.recv(1) for connection in flood[:10]] == [b""] * 10
            for connection in held:
                connection.close()

    run(work())


@pytest.mark.parametrize("attack", ["message first", "no hello", "long hello", "wrong token", "hello again"])
def test_unauthenticated_messages_have_no_effect(kind: str, attack: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            b = await make("b")
            async with raw_client(kind, b.address) as raw:
                endpoint = await raw.connect()
                await until(lambda: raw.heard)
                if attack in ("wrong token", "hello again"):
                    hello = Initiator(SECRET, "test", Member("a", "1"), b.member, new_nonce())
                    response = hello.answer(raw.heard[0])
                    endpoint.send(HELLO, [response])
                    await until(lambda: len(raw.heard) == 2)
                    token = hello.confirm(raw.heard[1])
                    endpoint.send(MESSAGE.pack(1, token, 0), [b"accepted"])
                    await until(lambda: b.messages)
                    header = HELLO if attack == "hello again" else MESSAGE.pack(1, bytes(TOKEN_BYTES), 1)
                    endpoint.send(header, [response])
                    await until(lambda: b.downs)
                elif attack == "message first":
                    endpoint.send(MESSAGE.pack(1, bytes(TOKEN_BYTES), 0), [b"x"])
                elif attack == "no hello":
                    endpoint.send(HELLO, [b"\x00" * 100])
                else:
                    endpoint.send(HELLO, [b"\x00" * 10_000])
                await until(lambda: raw.failures)
                assert [data for _, data in b.messages] in ([], [b"accepted"])
                assert attack == "long hello" or b.transport.stats.auth_failures == 1

    run(work())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_lost_in_200_cycles(kind: str) -> None:
    async def work() -> None:
        async with cluster(kind) as make:
            a = await make("a", retry_min_s=0.001)
            worst = first = 0
            for cycle in range(200):
                b = Node(kind, MemoryNetwork(), "b", str(cycle))
                b.address = await b.transport.start()
                await link(a, b)
                await link(b, a)
                assert a.transport.send(b.member, [b"hello"])
                await until(lambda: b.messages)  # noqa: B023
                await b.transport.close()  # nothing is said on the links: to the peer it looks like a death
                await until(lambda: len(a.downs) == 2 * cycle + 2)  # noqa: B023
                worst = max(worst, descriptors())
                first = worst if cycle == 20 else first
            assert worst <= first + 4
            assert a.transport.stats.links_down == 400

    run(work())


def test_idle_links_cost_nothing(kind: str) -> None:
    """In processes that do nothing else: this one also collects the garbage of the tests before."""

    def cpu_s(it: Child) -> float:
        tasks = Path(f"/proc/{it.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    async def work() -> None:
        async with child(kind, "a") as a, child(kind, "b") as b:
            for one, other in ((a, b), (b, a)):
                one.tell("connect", other.member.node, other.member.incarnation, other.address)
            for one, other in ((a, b), (b, a)):
                await one.line("up", other.member.node)
            for one, other in ((a, b), (b, a)):
                one.tell("send", other.member.node, other.member.incarnation, "100000")
                await other.line("got", one.member.node, "100000")
            before, started = (cpu_s(a), cpu_s(b)), time.monotonic()
            await asyncio.sleep(1)
            elapsed = time.monotonic() - started
            assert (cpu_s(a) - before[0]) / elapsed < 0.02
            assert (cpu_s(b) - before[1]) / elapsed < 0.02

    run(work())
