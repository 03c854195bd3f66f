"""What a stream needs of its connection, past ASGI: to write without waiting, and to know whether the client reads.

ASGI's `send` is a coroutine, so only a task can write; waking one for each token cost more than everything else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from web.protocol import BoundedProtocol

EXTENSION = "kevlarflow.wire"


class StreamProtocol(BoundedProtocol):
    """Puts a Wire into the scope of each request."""

    on_writable: Callable[[], None] | None = None
    on_quiet: Callable[[], None] | None = None

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None:  # there is none yet of a request that offers another protocol
            self.scope["extensions"] = {EXTENSION: Wire(self, self.cycle)}  # type: ignore[dict-item]

    def say_something(self) -> None:
        if self.on_quiet is not None:
            self.on_quiet()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()


class Wire:
    """Writes the pieces of one answer's body, but for the last: `send` sends that, and at first status and headers."""

    __slots__ = ("_cycle", "_flow", "_protocol", "_transport")

    def __init__(self, protocol: StreamProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        # Its scope has this object: held weakly, so that no request is left for the collector to find.
        self._cycle = weakref.ref(cycle)
        self._flow = protocol.flow
        self._transport = protocol.transport

    @property
    def paused(self) -> bool:
        """The client does not take what has been written: whatever else there is has to wait."""
        return self._flow.write_paused

    def write(self, data: bytes) -> None:
        """Of a client that is gone nothing is heard here: ASGI's `receive` tells it."""
        cycle = self._cycle()
        if not (cycle is None or cycle.disconnected or self._transport.is_closing()):
            # HTTP/1.0 has no chunks.
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if cycle.chunked_encoding else data)

    def watch(self, on_writable: Callable[[], None] | None, on_quiet: Callable[[], None] | None) -> None:
        """Call the first whenever `paused` has ended, the second for something to say (see Http1Protocol)."""
        self._protocol.on_writable, self._protocol.on_quiet = on_writable, on_quiet


def wire_of(scope: Scope) -> Wire:
    return cast(Wire, scope["extensions"][EXTENSION])
