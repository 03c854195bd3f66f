"""What every route of an HTTP API does alike, whatever it is for: HEAD, OPTIONS, other origins, sloppy paths.

ASGI middleware, the outermost one; raw, because Starlette's own kind would stand in the way of disconnects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPOSED = "Content-Location, Retry-After, X-Request-Id, X-Should-Retry"
PREFLIGHT_S = 600  # that a browser may remember it
SLASHES = re.compile("/{2,}")
METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "POST"}
HEAD = "head"  # in a request's state: only headers are wanted

Pairs = list[tuple[bytes, bytes]]


class Manners:
    """`routes`: of the application, when they are all there. `origins`: whose pages may read answers; "*": all."""

    def __init__(
        self, app: ASGIApp, routes: Callable[[], Sequence[Any]], origins: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._routes = routes
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = SLASHES.sub("/", scope["path"])
        scope = {**scope, "path": path.rstrip("/") or "/"}
        headers, allowed = Headers(scope=scope), self._allowed(scope["path"])
        more = self._cors(headers)
        if scope["method"] == "OPTIONS" and (allowed or path == "*"):
            if "access-control-request-method" in headers:
                more += _preflight(headers, allowed, bool(more))
            start = {
                "type": "http.response.start",
                "status": 204,
                "headers": [*more, _allow(allowed or METHODS)],
            }
            await send(start)
            return await send({"type": "http.response.body", "body": b""})
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET", "state": {**scope.get("state", {}), HEAD: True}}
        answer = _Answer(receive, send, more, allowed, "expect" in headers)
        return await self._app(scope, answer.receive, answer.send)

    def _allowed(self, path: str) -> set[str]:
        """Methods that the path has; none: there is no such path."""
        found: set[str] = set()
        for route in self._routes():
            if route.path_regex.match(path):
                found |= route.methods or set()
        return found | ({"HEAD"} if "GET" in found else set()) | ({"OPTIONS"} if found else set())

    def _cors(self, headers: Headers) -> Pairs:
        if not self._origins:
            return []
        everybody = "*" in self._origins
        pairs: Pairs = [] if everybody else [(b"vary", b"Origin")]
        origin = headers.get("origin", "")
        if origin and (everybody or origin in self._origins):
            pairs.append((b"access-control-allow-origin", b"*" if everybody else origin.encode("latin-1")))
            pairs.append((b"access-control-expose-headers", EXPOSED.encode()))
        return pairs


class _Answer:
    """One exchange: adds headers to the answer."""

    def __init__(self, receive: Receive, send: Send, more: Pairs, allowed: set[str], expects: bool) -> None:
        self._receive = receive
        self._send = send
        self._more = more
        self._allowed = allowed
        self._waits = expects  # for a word before it sends its body

    async def receive(self) -> Message:
        self._waits = False
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), *self._more]
            if message["status"] == 405:
                headers = [pair for pair in headers if pair[0].lower() != b"allow"] + [_allow(self._allowed)]
            if self._waits:  # whether its body comes now, nobody can know
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)


def _allow(methods: set[str]) -> tuple[bytes, bytes]:
    return b"allow", ", ".join(sorted(methods)).encode()


def _preflight(headers: Headers, allowed: set[str], welcome: bool) -> Pairs:
    if not welcome:
        return []
    wanted = headers.get("access-control-request-headers", "authorization, content-type")
    return [
        (b"access-control-allow-methods", ", ".join(sorted(allowed)).encode()),
        (b"access-control-allow-headers", wanted.encode("latin-1")),
        (b"access-control-max-age", str(PREFLIGHT_S).encode()),
    ]
