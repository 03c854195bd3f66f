"""Which transport a node uses: `ClusterConfig.transport`.

`auto` measures nothing at run time; `python -m bench transport` has: between processes of one host Unix sockets with
shared memory carry more than either. Over TCP UCX and our sockets are equal at 64 KB in rate and CPU; at 4 MB, more
than a block or a microbatch has, UCX carries half as much again on a quiet machine and less on a busy one. So UCX
joins in where it finds a device that is faster than TCP. The choice is made for each link: see `driver.PREFERENCE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

from .base import OnLinkDown, OnLinkUp, OnMessage, TransportConfig
from .driver import Driver
from .libucp import rdma_devices
from .links import LinkTransport
from .sockets import SocketDriver
from .ucx import UcxDriver

Kind = Literal["auto", "ucx", "sockets"]


def drivers(kind: Kind) -> list[Driver]:
    """`sockets` is TCP alone, so that it can be compared and works across every kind of host boundary."""
    match kind:
        case "ucx":
            return [UcxDriver()]
        case "sockets":
            return [SocketDriver(("tcp",))]
        case "auto":
            return [SocketDriver(), *([UcxDriver()] if rdma_devices() else [])]
        case _:
            assert_never(kind)


def open_transport(
    kind: Kind,
    config: TransportConfig,
    *,
    on_message: OnMessage,
    on_link_up: OnLinkUp,
    on_link_down: OnLinkDown,
    emulate: Callable[[Driver], Driver] | None = None,
) -> LinkTransport:
    """A transport that is not started yet; see `base.Transport`. `emulate`: what to wrap its first driver in."""
    choice = drivers(kind)
    if emulate is not None:
        choice = [emulate(choice[0])]
    return LinkTransport(
        config, choice, on_message=on_message, on_link_up=on_link_up, on_link_down=on_link_down
    )
