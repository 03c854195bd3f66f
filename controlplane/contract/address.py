"""Addresses: what is bound and what is registered, of IPv4, IPv6 and host names alike."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from controlplane.contract.errors import ConfigError

UNIX_PATH_BYTES_MAX = 107  # of the kernel: sockaddr_un
ANY_PORT = (0,)  # whichever is free


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


def port_range(text: str) -> range:
    """ "7100", "7100-7163"; "" has none. Raises ValueError unless they are 1 to 65,535 and in order."""
    if not text:
        return range(0)
    low, dash, high = text.partition("-")
    first, last = int(low), int(high if dash else low)
    if not 0 < first <= last < 65536:
        raise ValueError("ports are 1 to 65,535, the lower one first")
    return range(first, last + 1)


def ports_of(text: str, process: str) -> tuple[int, ...]:
    """The ports of a setting in the order in which a process is to try them. n3 begins with the fourth: processes that
    start together on a host rarely want the same one, and get the same one again where each can have its own."""
    ports = port_range(text)
    if not ports:
        return ANY_PORT
    digits = re.search(r"[0-9]*$", process)
    begin = int(digits[0] or 0) % len(ports) if digits else 0
    return (*ports[begin:], *ports[:begin])


def listen_first(what: str, host: str, ports: Sequence[int], listen: Callable[[int], int]) -> int:
    """Call `listen`, which raises OSError, with each until one of them is not taken; the port. Raises ConfigError."""
    for port in ports:
        try:
            return listen(port)
        except OSError as error:
            refused(what, host, port, error)
    raise all_taken(what, host, ports)


def refused(what: str, host: str, port: int, error: OSError) -> None:
    """Nothing if the port is taken, so that another one may be free. Raises ConfigError."""
    if error.errno != errno.EADDRINUSE or not port:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {join(host, port)} for {what}: {reason}") from error


def too_few(setting: str, text: str, processes: int) -> ConfigError | None:
    """Why a host's processes cannot each have a port of the setting; None: they can."""
    size = len(port_range(text))
    if not size or size >= processes:
        return None
    return ConfigError(
        f"{setting} = {text!r} has {size} ports, and {processes} processes are to have one each"
    )


def all_taken(what: str, host: str, ports: Sequence[int]) -> ConfigError:
    """`what` names who listens and the setting."""
    low, high = min(ports), max(ports)
    those = f"port {low} is" if low == high else f"ports {low} to {high} are"
    return ConfigError(f"{those} taken on {host}: none is left for {what}")


def admin_socket(run_dir: Path, controller: str) -> Path | None:
    """Where a controller serves its admin API for kfadmin on the same host; None: the kernel takes no path so long."""
    path = run_dir / "admin" / f"{controller}.sock"
    return (
        path if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX - 8 else None
    )  # it is made under another name
