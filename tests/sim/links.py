"""A driver for dataplane/transport/links.py that carries messages over the simulated network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataplane.transport.base import OnLinkDown, OnLinkUp, OnMessage, TransportConfig
from dataplane.transport.driver import Driver
from dataplane.transport.links import LinkTransport
from tests.sim.network import End, Network
from tests.sim.world import Process

# A link that nobody answers on: sometimes TCP gives up soon, mostly it is patient for minutes.
PATIENCES_S = (1e9, 1e9, 1.0, 3.0)


class SimEndpoint:
    """See dataplane/transport/driver.Endpoint."""

    def __init__(self, driver: SimDriver, end: End) -> None:
        self.limit_bytes = 0
        self.user: Any = None
        self._driver = driver
        self._end = end
        end.receive = self._receive
        end.down = self._down

    @property
    def open(self) -> bool:
        return self._end.up

    @property
    def queued_bytes(self) -> int:
        return 0

    def send(self, header: bytes, parts: Sequence[Any]) -> bool:
        if not self._end.up:
            return False
        self._end.send(("frame", header, b"".join(parts)))
        return True

    def close(self) -> None:
        self._end.close()

    def _receive(self, item: tuple[str, bytes, bytes]) -> None:
        _, header, data = item
        if len(data) > self.limit_bytes:
            self._end.close()
            self._driver.events.on_failed(self, "a message over the limit")
        else:
            self._driver.events.on_message(self, header, memoryview(bytearray(data)))

    def _down(self, reason: str) -> None:
        self._driver.events.on_failed(self, reason)


class SimDriver:
    """See dataplane/transport/driver.Driver."""

    kinds = ("tcp",)

    def __init__(self, net: Network, process: Process) -> None:
        self.events: Any = None
        self._net = net
        self._process = process
        self._address = ""

    async def start(self, events: Any, host: str, port: int) -> dict[str, str]:
        self.events = events
        self._address = self._net.address()
        self._net.listen(self._address, self._process, self._accepted)
        return {"tcp": self._address}

    def usable(self, kind: str, where: str) -> bool:
        return True

    async def connect(self, kind: str, where: str) -> SimEndpoint:
        patience_s = PATIENCES_S[int(self._net.world.random.random() * len(PATIENCES_S))]
        return SimEndpoint(self, self._net.dial(self._process, where, patience_s, lambda: None))

    def accept(self, request: Any) -> SimEndpoint:
        return SimEndpoint(self, request)

    def in_host(self, request: Any) -> bool:
        return False

    def origin_of(self, request: Any) -> str:
        return ""

    def reject(self, request: Any) -> None:
        request.close()

    def close(self) -> None:
        self._net.unlisten(self._address)

    def _accepted(self, end: End) -> None:
        self.events.on_connection(self, end)


def open_transport(
    net: Network,
    process: Process,
    config: TransportConfig,
    *,
    on_message: OnMessage,
    on_link_up: OnLinkUp,
    on_link_down: OnLinkDown,
) -> LinkTransport:
    """What dataplane/transport/choose.open_transport gives, over the simulated network."""
    driver: Driver = SimDriver(net, process)
    return LinkTransport(
        config, [driver], on_message=on_message, on_link_up=on_link_up, on_link_down=on_link_down
    )
