"""Addresses: what is bound and what is registered, of IPv4, IPv6 and host names alike."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from controlplane.contract.errors import ConfigError

UNIX_PATH_BYTES_MAX = 107  # of the kernel: sockaddr_un
NAME_CHARS_MAX = 253
LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")  # of a host name
NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
PORT = re.compile(r"[0-9]{1,5}")
PORT_AFTER = re.compile(r"(\]|^[^:]*):[^:\]]*$")  # of a URL's host
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
ANY_PORT = (0,)  # whichever is free


def join(host: str, port: int) -> str:
    """ "host:port", and "[host]:port" of an IPv6 address: as URLs and gRPC want it."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def port_of(address: str) -> int:
    """Raises ValueError."""
    return int(address.rpartition(":")[2])


def address_of(host: str) -> Address | None:
    """The address that a host stands for, as whoever connects reads it; None: it is a name. IPv4 may be written in
    fewer parts, in octal and in hexadecimal ("0" is 0.0.0.0), and within IPv6. Raises ValueError if it is neither."""
    bare, _, scope = host.removeprefix("[").removesuffix("]").partition("%")
    if host != bare and host not in (f"[{bare}]", f"{bare}%{scope}", f"[{bare}%{scope}]"):
        raise ValueError(f"{host!r}: brackets go around an address")
    if scope and not LABEL.fullmatch(scope):
        raise ValueError(f"{host!r}: no interface has such a name")
    if ":" in bare:
        found = ipaddress.IPv6Address(f"{bare}%{scope}" if scope else bare)
        return found.ipv4_mapped or found
    if host != bare:
        raise ValueError(f"{host!r}: brackets and scopes are of IPv6 addresses")
    labels = bare.removesuffix(".").split(".")
    if len(bare) > NAME_CHARS_MAX or not all(map(LABEL.fullmatch, labels)):
        raise ValueError(f"{host!r} is not a host name")
    if NUMBER.fullmatch(labels[-1]):  # no top-level domain is one: resolvers take it for an address
        try:
            return ipaddress.IPv4Address(socket.inet_aton(bare))
        except OSError:
            raise ValueError(f"{host!r} is not an IPv4 address") from None
    return None


def network_of(host: str) -> str:
    """Whose connections are counted together: of one IPv4 address, or of one network of IPv6, where a host has as many
    addresses as it likes; "" where it is no address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or f"{address.packed[:8].hex()}/64")


def host_of(text: str) -> str:
    """A host without a port. Raises ValueError."""
    address_of(text)
    return text


def endpoint_of(text: str) -> tuple[str, int]:
    """Host and port of "host:port" and "[host]:port". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or not PORT.fullmatch(port):
        raise ValueError(f"{text!r} is not host:port")
    if not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: ports are 1 to 65,535")
    return host_of(host), int(port)


def authority_of(text: str) -> tuple[str, int | None]:
    """The same where a URL has it: the port may be left out. Raises ValueError."""
    if PORT_AFTER.search(text):
        return endpoint_of(text)
    if ":" in text and not text.startswith("["):
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets")
    return host_of(text), None


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket bound to a name or an address of this machine; port 0 picks a free one. Raises OSError."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except UnicodeError:  # of labels that are empty or too long
        raise OSError(errno.EINVAL, f"{host!r} is not a host name") from None
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
    # It is made under another name.
    return path if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX - 8 else None
