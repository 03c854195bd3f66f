"""Loads libucp and the extension that binds it, and says how libucp is set up by default."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_OPTIONS: Mapping[str, str] = {
    "TLS": "tcp",
    # A connect to a host that does not answer must not hold up the loop.
    "TCP_CONN_NB": "y",
    "TCP_CM_REUSEADDR": "y",
    "TCP_MAX_NUM_EPS": "inf",
    # One lane: the fragments of a link stay in order.
    "MAX_EAGER_LANES": "1",
    # Never rendezvous, and no second reassembly; see ucp.pyx. A fragment of ours fills one segment.
    "RNDV_THRESH": "inf",
    "TCP_TX_SEG_SIZE": "257k",
    "TCP_RX_SEG_SIZE": "257k",
}

# Where RDMA devices are: reliable connections beside TCP, both of which report a dead peer.
RDMA_OPTIONS: Mapping[str, str] = {"TLS": "rc,tcp", "NET_DEVICES": "all"}
RDMA_CLASS = Path("/sys/class/infiniband")

SIOCGIFADDR = 0x8915
INTERFACES_IPV6 = Path("/proc/net/if_inet6")


def rdma_devices() -> list[str]:
    """RDMA devices (InfiniBand, RoCE) with an active port; libucp is faster than sockets on these only."""
    states = RDMA_CLASS.glob("*/ports/*/state") if RDMA_CLASS.is_dir() else []
    return sorted({state.parts[-4] for state in states if "ACTIVE" in state.read_text()})


def default_options(host: str) -> dict[str, str]:
    """UCX variables, without their prefix, for a node that listens on the numeric address `host`."""
    # libucp 1.21 corrupts its heap when a peer of one family meets a device that it knows by the other.
    families = {"TCP_AF_PRIO": "inet6,inet" if ":" in host else "inet,inet6"}
    return {
        **DEFAULT_OPTIONS,
        **families,
        **(RDMA_OPTIONS if rdma_devices() else {"NET_DEVICES": device_of(host)}),
    }


@functools.cache
def binding() -> Any:
    """The extension module, after the UCX libraries it needs. Not at import: a launcher forks without them."""
    # UCX reads these when it is loaded. Its hooks into the C library's memory functions serve a registration
    # cache that we do not use, cost 0.4 s of every start, and rewrite code under torch's feet.
    hooks = {"UCX_MEM_EVENTS": "n", "UCX_MEM_MMAP_HOOK_MODE": "none"}
    ours = {name: value for name, value in hooks.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        importlib.import_module("libucx").load_library()
    finally:
        for name in ours:
            del os.environ[name]
    module = importlib.import_module("dataplane._fast.ucp")
    if "UCX_LOG_LEVEL" not in os.environ:
        # A dead peer or garbage on a port is an event for us, not an error to print.
        module.set_log_level("fatal")
    return module


def device_of(host: str) -> str:
    """The network interface that has the numeric address `host`; "all" if none does (a wildcard)."""
    if ":" in host:
        digits = socket.inet_pton(socket.AF_INET6, host).hex()
        lines = [line.split() for line in INTERFACES_IPV6.read_text().splitlines()]
        return next((line[-1] for line in lines if line[0] == digits), "all")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no IPv4 address
                request = struct.pack("256s", name.encode())
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == host:
                    return name
    return "lo" if host.startswith("127.") else "all"
