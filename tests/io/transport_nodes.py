"""What the transport tests share: recorded nodes, conditions with a deadline."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from controlplane.certs.folder import CertFolder
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from dataplane.transport.base import Transport, TransportConfig
from dataplane.transport.driver import Driver, parse_address
from dataplane.transport.links import LinkTransport
from dataplane.transport.memory import MemoryNetwork
from dataplane.transport.sealing import LinkIdentity
from dataplane.transport.sockets import SocketDriver
from dataplane.transport.ucx import UcxDriver
from tests.certificates import CLUSTER, folder
from tests.certificates import settings as tls_settings

SECRET = b"a secret of the test cluster"
NAMES = "abcdefghijk"
NETWORKED = ("ucx", "tcp", "local")
"""Every way between processes; "local" also listens on TCP."""


def driver(kind: str) -> Driver:
    if kind == "ucx":
        return UcxDriver()
    return SocketDriver(("tcp",) if kind in ("tcp", "sealed") else ("local", "tcp"))


@functools.cache
def certificates() -> CertFolder:
    """Of the nodes that the tests make."""
    path = tempfile.TemporaryDirectory(prefix="kf-certs-")
    atexit.register(path.cleanup)
    return folder(Path(path.name), *((ProcessRole.NODE, name) for name in NAMES))


def identity(name: str, certs: CertFolder | None = None) -> LinkIdentity:
    tls = tls_settings(certs or certificates())
    return LinkIdentity(Identity(tls, CLUSTER, ProcessName(ProcessRole.NODE, name)))


class Node:
    """A transport and everything it called back."""

    def __init__(
        self, kind: str, hub: MemoryNetwork, name: str, incarnation: str = "1", **settings: Any
    ) -> None:
        self.member = Member(name, incarnation)
        self.messages: list[tuple[Member, bytes]] = []
        self.ups: list[Member] = []
        self.downs: list[tuple[Member, str, float]] = []
        if kind == "sealed":
            settings = {"identity": identity(name), **settings}
        settings = {"cluster": CLUSTER, "secret": SECRET, **settings}
        self.config = TransportConfig(member=self.member, **settings)
        calls: dict[str, Any] = {
            "on_message": lambda peer, data: self.messages.append((peer, bytes(data))),
            "on_link_up": self.ups.append,
            "on_link_down": lambda peer, why: self.downs.append((peer, why, time.monotonic())),
        }
        self.transport: Transport
        if kind == "memory":
            self.transport = hub.add(self.config, **calls)
        else:
            self.transport = LinkTransport(self.config, [driver(kind)], **calls)
        self.address = ""

    @property
    def port(self) -> int:
        """What a node that comes after this one listens on to be found where this one was."""
        where = self.address if "=" not in self.address else parse_address(self.address).popitem()[1]
        return int(where.rpartition(":")[2])

    def down(self, direction: str) -> float | None:
        """When the link of this direction went down."""
        return next((at for _, why, at in self.downs if why.startswith(direction)), None)


Make = Callable[..., Awaitable[Node]]


@contextlib.asynccontextmanager
async def cluster(kind: str) -> AsyncIterator[Make]:
    hub = MemoryNetwork()
    nodes: list[Node] = []

    async def make(name: str, incarnation: str = "1", **settings: Any) -> Node:
        node = Node(kind, hub, name, incarnation, **settings)
        nodes.append(node)
        node.address = await node.transport.start()
        return node

    try:
        yield make
    finally:
        for node in nodes:
            await node.transport.close()


async def until(condition: Callable[[], Any], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.001)


async def link(a: Node, b: Node) -> None:
    a.transport.connect(b.member, b.address)
    await until(lambda: a.transport.connected(b.member))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 50))
