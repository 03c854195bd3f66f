"""Addresses: what is bound and what is registered, of IPv4, IPv6 and host names alike."""

from __future__ import annotations

import socket


def join(host: str, port: int) -> str:
    """ "host:port", and "[host]:port" of an IPv6 address: as URLs and gRPC want it."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def port_of(address: str) -> int:
    """Raises ValueError."""
    return int(address.rpartition(":")[2])


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket bound to a name or an address of this machine; port 0 picks a free one. Raises OSError."""
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
    except OSError:
        made.close()
        raise
    return made
