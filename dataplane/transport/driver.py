"""What carries messages for links (`links.py`), and the addresses that say how a node can be reached.

An address lists what its node offers, `kind=where,kind=where`, so that nodes of different abilities agree: the
dialling side takes the first kind of PREFERENCE that it can use, and tries the next one if that does not open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .base import Part

IN_HOST = frozenset({"local", "emulated"})  # kinds that do not leave the host
PREFERENCE = ("emulated", "local", "ucx", "tcp")
"""UCX before TCP: where both are offered, UCX has a faster device (see `choose.py`). Emulated is offered alone."""


class Endpoint(Protocol):
    """One connection of a driver; see `_fast/stream.pyx` and `_fast/ucp.pyx`."""

    limit_bytes: int
    user: Any

    @property
    def open(self) -> bool: ...
    @property
    def queued_bytes(self) -> int: ...
    def send(self, header: bytes, parts: Sequence[Part]) -> bool: ...
    def close(self) -> None: ...


class Events(Protocol):
    """What a driver calls, from the loop and never from within a call of its own methods."""

    def on_connection(self, driver: Driver, request: object, /) -> None: ...
    def on_message(self, endpoint: Endpoint, header: bytes, data: memoryview, /) -> None: ...
    def on_failed(self, endpoint: Endpoint, reason: str, /) -> None: ...


class Driver(Protocol):
    """One way to move messages (`sockets.py`, `ucx.py`)."""

    @property
    def kinds(self) -> Sequence[str]: ...

    async def start(self, events: Events, host: str, port: int) -> dict[str, str]:
        """Listens. Returns where peers can reach it, by kind. Raises OSError."""
        ...

    def usable(self, kind: str, where: str) -> bool:
        """Whether an offer of one of our kinds can be reached from here at all."""
        ...

    async def connect(self, kind: str, where: str) -> Endpoint:
        """Begins to open an endpoint; failure may come later as `on_failed`. Raises OSError, ValueError."""
        ...

    def accept(self, request: object) -> Endpoint:
        """Opens the endpoint of an `on_connection`. Raises OSError."""
        ...

    def reject(self, request: object) -> None: ...

    def in_host(self, request: object) -> bool:
        """Whether the connection of an `on_connection` comes from this host, in memory that nobody else sees."""
        ...

    def origin_of(self, request: object) -> str:
        """From where an `on_connection` comes (see `network_of`); "" where nobody can say."""
        ...

    def close(self) -> None: ...


def parse_address(address: str) -> dict[str, str]:
    """What an address offers, by kind. Raises ValueError."""
    offers = dict(offer.split("=", 1) for offer in address.split(",") if "=" in offer)
    if len(offers) != address.count(",") + 1:
        raise ValueError(f"not an address of a node: {address!r}")
    return offers
