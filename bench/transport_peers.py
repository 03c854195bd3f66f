"""The two ends of what `bench/transport.py` measures: a `Side` here, and a process that answers it.

The answering process (`python -m bench.transport_peers NAME`) prints its address and ends with its standard input.
The first byte of a message says what to do: ECHO comes back as it is, of SINK every half window is acknowledged,
CPU is answered with the CPU seconds of the process.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib
import logging
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import structlog

from controlplane.certs.folder import CertFolder
from controlplane.contract.config import TlsConfig
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from dataplane.transport.base import TransportConfig
from dataplane.transport.choose import open_transport
from dataplane.transport.sealing import LinkIdentity

# Standard output carries addresses and results.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

Ours = Literal["ucx", "sockets", "auto", "sealed"]  # sealed: sockets between nodes with certificates
OURS: tuple[Ours, ...] = get_args(Ours)
CLUSTER, CERTS, LINKS_MAX = "bench", "KF_BENCH_CERTS", 16
ECHO, SINK, CPU = b"E", b"S", b"C"
WINDOW_BYTES = 8 << 20
PING_S = 0.2
LENGTH = struct.Struct("<Q")


class Absent(Exception):
    """A peer to compare with is not installed, or does not start."""


class Channel(Protocol):
    """Messages to and from the other process."""

    async def send(self, data: bytes | memoryview) -> None: ...
    async def receive(self) -> memoryview: ...


def half_window(size: int) -> int:
    """How many messages are acknowledged at once; twice as many may be on their way."""
    return max(2, WINDOW_BYTES // size // 2)


@functools.cache
def sunk(size: int) -> bytes:
    return SINK + os.urandom(size - 1)


class Side:
    """The measuring end."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def round_trips(self, size: int, count: int) -> None:
        data = ECHO + bytes(size - 1)
        for _ in range(count):
            await self._channel.send(data)
            await self._channel.receive()

    async def one_way(self, size: int, count: int) -> int:
        """Sends at least `count` messages, a whole number of half windows; returns how many."""
        data, half, outstanding = sunk(size), half_window(size), 0
        rounds = -(-count // half)
        for _ in range(rounds):
            if outstanding == 2:
                await self._channel.receive()
                outstanding -= 1
            for _ in range(half):
                await self._channel.send(data)
            outstanding += 1
        for _ in range(outstanding):
            await self._channel.receive()
        return rounds * half

    async def cpu_s(self) -> float:
        """CPU seconds of both processes."""
        await self._channel.send(CPU)
        theirs = float(struct.unpack("<d", (await self._channel.receive())[1:])[0])
        return time.process_time() + theirs


class Answer:
    """What the other process says to a message, if anything."""

    def __init__(self) -> None:
        self._sunk = 0

    def __call__(self, data: memoryview) -> bytes | memoryview | None:
        kind = bytes(data[:1])
        if kind == ECHO:
            return data
        if kind == CPU:
            return CPU + struct.pack("<d", time.process_time())
        self._sunk += 1
        return b"A" if self._sunk % half_window(len(data)) == 0 else None


async def until_end_of_input() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextlib.asynccontextmanager
async def answering(name: str, *arguments: str) -> AsyncIterator[str]:
    """The other process; yields the address that it printed. Raises Absent."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.transport_peers", name, *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(20):
            line = await process.stdout.readline()
        if not line:
            raise Absent(f"the {name} process ended with {await process.wait()}")
        yield line.decode().strip()
    finally:
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


# ---------------------------------------------------------------------- ours


def certificates() -> Path:
    """A folder with those of all nodes. Processes that are started from here find it in their environment."""
    if CERTS not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="kf-bench-certs-")
        atexit.register(folder.cleanup)
        made, now = CertFolder(Path(folder.name)), datetime.now(UTC)
        made.create(CLUSTER, now)
        names = ("near", *(f"far{number}" for number in range(LINKS_MAX)))
        made.issue([ProcessName(ProcessRole.NODE, name) for name in names], (), now)
        os.environ[CERTS] = folder.name
    return Path(os.environ[CERTS])


def _identity(name: str) -> LinkIdentity:
    folder = certificates()
    tls = TlsConfig(ca=str(folder / "ca.pem"), cert=str(folder / "{process}.pem"))
    return LinkIdentity(Identity(tls, CLUSTER, ProcessName(ProcessRole.NODE, name)))


class OurLinks:
    """One node's transport, and the messages that have arrived at it."""

    def __init__(self, kind: Ours, name: str, on_message: Callable[[Member, memoryview], None]) -> None:
        self.member = Member(name, "1")
        self.peers: dict[Member, str] = {}
        config = TransportConfig(
            member=self.member,
            cluster=CLUSTER,
            secret=b"links of a bench",
            identity=_identity(name) if kind == "sealed" else None,
        )
        self.transport = open_transport(
            "sockets" if kind == "sealed" else kind,
            config,
            on_message=on_message,
            on_link_up=lambda _: None,
            on_link_down=lambda *_: None,  # what then goes missing runs into its deadline
        )

    def connect(self, name: str, address: str) -> None:
        self.peers[Member(name, "1")] = address
        self.transport.connect(Member(name, "1"), address)

    async def linked(self) -> None:
        async with asyncio.timeout(10):
            while not all(map(self.transport.connected, self.peers)):  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def ping(self, seconds: float) -> None:
        """What a node says on links that carry nothing else."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(PING_S)
            for peer in self.peers:
                self.transport.send(peer, [b"ping"])


class OurChannel:
    def __init__(self, kind: Ours) -> None:
        self._arrived: asyncio.Queue[memoryview] = asyncio.Queue()
        self.links = OurLinks(kind, "near", lambda _, data: self._arrived.put_nowait(data))

    async def send(self, data: bytes | memoryview) -> None:
        for peer in self.links.peers:
            if not self.links.transport.send(peer, [data]):
                raise RuntimeError("the link refused a message")

    async def receive(self) -> memoryview:
        return await self._arrived.get()


@contextlib.asynccontextmanager
async def our_side(kind: Ours) -> AsyncIterator[Side]:
    channel = OurChannel(kind)
    links = channel.links
    address = await links.transport.start()
    try:
        async with answering(kind, address) as theirs:
            links.connect("far0", theirs)
            await links.linked()
            await channel.send(ECHO)  # answered once the link back is open, too
            await channel.receive()
            yield Side(channel)
    finally:
        await links.transport.close()


async def our_answers(kind: Ours, near: str, count: int, idle_s: float) -> None:
    """`count` nodes in this process, linked both ways with the one at `near`; several of them only ping."""
    answer = Answer()
    nodes: list[OurLinks] = []

    def on_message(peer: Member, data: memoryview) -> None:
        if (said := answer(data)) is not None:
            nodes[0].transport.send(peer, [said])

    nodes += [OurLinks(kind, f"far{i}", on_message) for i in range(count)]
    addresses = [await node.transport.start() for node in nodes]
    for node in nodes:
        node.connect("near", near)
        await node.linked()
    print(" ".join(addresses), flush=True)
    if count > 1:
        await asyncio.gather(*(node.ping(idle_s) for node in nodes))
    await until_end_of_input()
    for node in nodes:
        await node.transport.close()


async def idle_share(kind: Ours, count: int, seconds: float) -> float:
    """The share of a core that a node uses while `count` links each way carry only pings."""
    node = OurLinks(kind, "near", lambda *_: None)
    address = await node.transport.start()
    try:
        async with answering(kind, address, str(count), str(seconds)) as theirs:
            for number, where in enumerate(theirs.split()):
                node.connect(f"far{number}", where)
            await node.linked()
            cpu, started = time.process_time(), time.perf_counter()
            await node.ping(seconds)
            return (time.process_time() - cpu) / (time.perf_counter() - started)
    finally:
        await node.transport.close()


# ---------------------------------------------------------------------- plain asyncio sockets


class SocketChannel:
    """A length and the message, through the loop's socket calls and one reused buffer."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._loop = connection, asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(8 << 20))

    async def send(self, data: bytes | memoryview) -> None:
        if len(data) < 4096:
            await self._loop.sock_sendall(self._connection, LENGTH.pack(len(data)) + bytes(data))
        else:
            await self._loop.sock_sendall(self._connection, LENGTH.pack(len(data)))
            await self._loop.sock_sendall(self._connection, data)

    async def receive(self) -> memoryview:
        (length,) = LENGTH.unpack(await self._fill(LENGTH.size))
        return await self._fill(length)

    async def _fill(self, length: int) -> memoryview:
        filled = 0
        while filled < length:
            count = await self._loop.sock_recv_into(self._connection, self._buffer[filled:length])
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            filled += count
        return self._buffer[:length]


@contextlib.asynccontextmanager
async def socket_side() -> AsyncIterator[Side]:
    async with answering("asyncio") as address:
        with socket.create_connection(("127.0.0.1", int(address))) as connection:
            yield Side(SocketChannel(connection))


async def socket_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = await asyncio.to_thread(listener.accept)
    with connection, contextlib.suppress(ConnectionResetError):
        await answer_all(SocketChannel(connection))


async def answer_all(channel: Channel) -> None:
    answer = Answer()
    while True:
        if (said := answer(await channel.receive())) is not None:
            await channel.send(said)


# ---------------------------------------------------------------------- ucxx


class UcxxChannel:
    """Active messages of an endpoint of ucxx, as it comes."""

    def __init__(self, endpoint: Any) -> None:
        self._endpoint, self._numpy = endpoint, importlib.import_module("numpy")

    async def send(self, data: bytes | memoryview) -> None:
        await self._endpoint.am_send(self._numpy.frombuffer(data, self._numpy.uint8))

    async def receive(self) -> memoryview:
        return memoryview(await self._endpoint.am_recv()).cast("B")


def ucxx() -> Any:
    try:
        return importlib.import_module("ucxx")
    except ImportError as error:
        raise Absent(f"ucxx does not import: {error}") from error


@contextlib.asynccontextmanager
async def ucxx_side() -> AsyncIterator[Side]:
    module = ucxx()
    async with answering("ucxx") as address:
        endpoint = await module.create_endpoint("127.0.0.1", int(address))
        yield Side(UcxxChannel(endpoint))


async def ucxx_answers() -> None:
    tasks: list[asyncio.Task[None]] = []

    async def serve(endpoint: Any) -> None:
        tasks.append(asyncio.create_task(answer_all(UcxxChannel(endpoint))))

    listener = ucxx().create_listener(serve)
    print(listener.port, flush=True)
    await until_end_of_input()
    os._exit(0)  # its threads would hold the process


# ---------------------------------------------------------------------- who is who


def side(name: str) -> contextlib.AbstractAsyncContextManager[Side]:
    if name in OURS:
        return our_side(name)
    return socket_side() if name == "asyncio" else ucxx_side()


def main(name: str, near: str = "", count: str = "1", idle_s: str = "0") -> Coroutine[Any, Any, None]:
    if name in OURS:
        return our_answers(name, near, int(count), float(idle_s))
    return socket_answers() if name == "asyncio" else ucxx_answers()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
