"""UCX as a driver of links: libucp endpoints driven by the asyncio loop.

The loop watches the worker's event descriptor and sleeps when nothing moves. Death of a peer process arrives as
an endpoint error, on idle links too, in both directions; it needs transports that report peer failure (TCP and
RDMA do, shared memory does not), hence the explicit lists in `libucp.py`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from controlplane.contract.address import bound

from .libucp import binding, default_options
from .sockets import Resolved, join_address, resolve

if TYPE_CHECKING:
    from dataplane._fast import ucp

    from .driver import Events

POLL_BUDGET_S = 0.002  # then the loop gets its turn


def of_libucp(found: Resolved) -> tuple[str, int]:
    """Host and port. Raises OSError for an address with a zone: libucp listens there, and then connects without it."""
    if "%" in found.host:
        raise OSError(errno.EADDRNOTAVAIL, 'UCX knows no link-local addresses (transport = "sockets" does)')
    return found.where[0], found.where[1]


class UcxDriver:
    """`options` are UCX variables without their prefix, over `libucp.default_options`."""

    kinds = ("ucx",)

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self._options = options or {}
        self._worker: ucp.Worker | None = None
        self._pump_is_due = False

    async def start(self, events: Events, host: str, port: int) -> dict[str, str]:
        self._events = events
        self._loop = asyncio.get_running_loop()
        self.on_message, self.on_failed = events.on_message, events.on_failed
        numeric, _ = of_libucp(await resolve(join_address(host, port)))
        if port:
            bound(numeric, port).close()  # libucp does not say what keeps it from listening
        options = {**default_options(numeric), **self._options}
        worker = cast("ucp.Worker", binding().Worker(self, options))
        try:
            taken = worker.listen(numeric, port)
        except OSError as error:
            worker.close()
            if port:  # somebody was faster
                raise OSError(errno.EADDRINUSE, str(error)) from error
            raise
        self._worker = worker
        self._loop.add_reader(self._worker.fd, self._pump)
        self.on_work()
        return {"ucx": join_address(numeric, taken)}

    def usable(self, kind: str, where: str) -> bool:
        return True

    async def connect(self, kind: str, where: str) -> ucp.Endpoint:
        host, port = of_libucp(await resolve(where))
        if self._worker is None:
            raise ConnectionAbortedError("closed")
        return self._worker.connect(host, port)

    def accept(self, request: object) -> ucp.Endpoint:
        assert self._worker is not None
        return self._worker.accept(request)

    def in_host(self, request: object) -> bool:
        return False

    def origin_of(self, request: object) -> str:
        return ""  # the binding does not ask libucp

    def reject(self, request: object) -> None:
        assert self._worker is not None
        self._worker.reject(request)

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            self._loop.remove_reader(worker.fd)
            worker.close()

    def on_connection(self, request: int) -> None:
        self._events.on_connection(self, request)

    # Progress.

    def on_work(self) -> None:
        """The worker has something to do that its descriptor does not tell."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        quiet = self._worker is None
        try:
            if self._worker is not None:
                quiet = self._worker.poll(POLL_BUDGET_S)
        finally:
            if not quiet:  # also after a callback raised: the rest of the events must not wait
                self.on_work()
