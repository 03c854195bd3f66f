"""Sockets as a driver of links: TCP, and Unix sockets with shared memory between processes of one host.

Python only opens and closes; what moves bytes is `_fast/stream.pyx`. kill -9 of a peer ends its sockets, which
the loop sees at once, on idle links too.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import structlog

from controlplane.contract.address import network_of
from dataplane._fast.stream import Stream

if TYPE_CHECKING:
    from .driver import Events

log = structlog.get_logger(__name__)

Where = str | tuple[str, int] | tuple[str, int, int, int]  # as sockets take it

BACKLOG = 128
ACCEPTS_IN_A_ROW = 32
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_ROOM_PAUSE_S = 0.5
# What the peer's kernel has not acknowledged for so long: the path is gone, and the link is opened anew. TCP itself
# would wait twice as long from try to try, so that a path that is back after 4 s would be used after 7.
UNACKNOWLEDGED_MAX_MS = 2000
# What the kernel may hold of a connection beyond what is on its way: the rest waits with us, where it is seen to wait
# (lane.py). Enough for 2 ms at 1 Gbps.
UNSENT_MAX = 256 << 10
UCRED = struct.Struct("iII")  # pid, uid, gid
TCP_NOTSENT_LOWAT = 25  # Linux; the socket module does not name it


def host_id() -> str:
    """The same for processes that reach each other's abstract Unix sockets: one boot, one network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/net").st_ino
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A numeric address. `where` is as sockets take it: of IPv6 its last item is the zone, the index of the interface
    to which a link-local address belongs, or 0."""

    family: int
    where: tuple[str, int] | tuple[str, int, int, int]

    @property
    def host(self) -> str:
        """As text, with the zone's name: an interface has another index on each host."""
        if len(self.where) == 4 and self.where[3]:
            return f"{self.where[0]}%{socket.if_indextoname(self.where[3])}"
        return self.where[0]


def split_address(where: str) -> tuple[str, int]:
    """ "host:port" or "[host]:port" to its parts. Raises ValueError."""
    host, _, digits = where.rpartition(":")
    port = int(digits)
    if not 0 <= port < 65536:  # the resolver would take its lower 16 bits
        raise ValueError(f"port out of range: {port}")
    return host.strip("[]"), port


async def resolve(where: str) -> Resolved:
    """ "host:port" or "[host]:port" to a numeric address. Raises OSError, ValueError."""
    host, port = split_address(where)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # of labels that are empty or too long
        raise OSError(errno.EINVAL, f"{host!r} is not a host name") from None
    return Resolved(found[0][0], cast("tuple[str, int]", found[0][4]))


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def uid_of(connection: socket.socket) -> int:
    """Of who connected to our Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    uid: int = UCRED.unpack(credentials)[1]
    return uid


class SocketDriver:
    """`kinds`: "tcp" alone, or "local" and "tcp"."""

    def __init__(self, kinds: Sequence[str] = ("local", "tcp")) -> None:
        self.kinds = tuple(kinds)
        self._host_id = host_id()
        self._listeners: list[socket.socket] = []

    async def start(self, events: Events, host: str, port: int) -> dict[str, str]:
        self._events = events
        self._loop = asyncio.get_running_loop()
        self.on_message = events.on_message
        ours = await resolve(join_address(host, port))
        taken = self._listen(ours.family, ours.where).getsockname()[1]  # first: it may be refused
        offers: dict[str, str] = {}
        if "local" in self.kinds:
            name = f"kevlarflow-{secrets.token_hex(8)}"
            self._listen(socket.AF_UNIX, f"\0{name}")
            offers["local"] = f"{self._host_id}/{name}"
        return {**offers, "tcp": join_address(ours.host, taken)}

    def _listen(self, family: int, address: Where) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if family != socket.AF_UNIX:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._on_acceptable, listener)
        return listener

    def usable(self, kind: str, where: str) -> bool:
        return kind != "local" or where.partition("/")[0] == self._host_id

    async def connect(self, kind: str, where: str) -> Stream:
        if kind == "local":
            return self._open(socket.AF_UNIX, "\0" + where.partition("/")[2])
        peer = await resolve(where)
        return self._open(peer.family, peer.where)

    def _open(self, family: int, address: Where) -> Stream:
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(address)
        except BlockingIOError as error:
            if error.errno != errno.EINPROGRESS:  # EAGAIN: too many wait at a Unix socket
                connection.close()
                raise
        except OSError:
            connection.close()
            raise
        return self._stream(connection)

    def _stream(self, connection: socket.socket) -> Stream:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MAX_MS)
            connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_MAX)
        local = connection.family == socket.AF_UNIX
        stream = Stream(connection.detach(), self, local)
        self._loop.add_reader(stream.fd, stream.readable)  # also told if a connect fails
        return stream

    # Connections of others.

    def _on_acceptable(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_IN_A_ROW):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                # The connection stays in the backlog: without a pause the loop would do nothing else.
                log.warning("cannot accept connections", error=str(error))
                self._loop.remove_reader(listener)
                self._loop.call_later(NO_ROOM_PAUSE_S, self._accept_again, listener)
                return
            if connection.family == socket.AF_UNIX and uid_of(connection) not in (0, os.geteuid()):
                connection.close()  # anybody here finds the name in /proc; a peer of another user takes the port
                continue
            connection.setblocking(False)
            self._events.on_connection(self, connection)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._on_acceptable, listener)

    def accept(self, request: object) -> Stream:
        return self._stream(cast("socket.socket", request))

    def in_host(self, request: object) -> bool:
        return cast("socket.socket", request).family == socket.AF_UNIX

    def origin_of(self, request: object) -> str:
        connection = cast("socket.socket", request)
        if connection.family == socket.AF_UNIX:
            return ""
        try:
            return network_of(connection.getpeername()[0])
        except OSError:  # it is gone again
            return ""

    def reject(self, request: object) -> None:
        cast("socket.socket", request).close()

    def close(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    # What streams tell their owner; `on_message` goes on without a stop here.

    def failed(self, stream: Stream, reason: str) -> None:
        self._loop.call_soon(self._events.on_failed, stream, reason)

    def watch_writable(self, stream: Stream, wanted: bool) -> None:
        if wanted:
            self._loop.add_writer(stream.fd, stream.writable)
        else:
            self._loop.remove_writer(stream.fd)

    def again(self, stream: Stream) -> None:
        self._loop.call_soon(stream.readable)

    def released(self, stream: Stream) -> None:
        self._loop.remove_reader(stream.fd)
        self._loop.remove_writer(stream.fd)
