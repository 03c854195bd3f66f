"""Addresses: what is bound and what is registered, of IPv4, IPv6 and host names alike."""

from __future__ import annotations

import os
import socket
from pathlib import Path

UNIX_PATH_BYTES_MAX = 107  # of the kernel: sockaddr_un


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


def admin_socket(run_dir: Path, controller: str) -> Path | None:
    """Where a controller serves its admin API for kfadmin on the same host; None: the kernel takes no path so long."""
    path = run_dir / "admin" / f"{controller}.sock"
    return (
        path if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX - 8 else None
    )  # it is made under another name
