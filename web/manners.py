"""What every route of an HTTP API does alike: request ids, HEAD, OPTIONS, other origins, sloppy paths.

ASGI middleware, the outermost one; raw, because Starlette's own kind would stand in the way of disconnects.
"""

from __future__ import annotations

import functools
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.bodies import CODINGS

log = structlog.get_logger()

EXPOSED = "Content-Location, Retry-After, X-Request-Id, X-Should-Retry"
PREFLIGHT_S = 600  # that a browser may remember it
SLASHES = re.compile("/{2,}")
CONTROLS = re.compile("[\\x00-\\x1f\\x7f]")
METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "POST"}
HEAD = "head"  # in a request's state: only headers are wanted
LOGGED = "logged"  # in a request's state: what its line in the log says besides
REQUEST_ID = re.compile("[!-~]{1,128}")  # others are not taken over: an own one is made
READS = {"GET", "HEAD", "OPTIONS"}  # pollers ask all the time: only what goes wrong with these is logged
PATH_CHARS_MAX = 200  # of a client's path, in logs

Pairs = list[tuple[bytes, bytes]]


def own_request_id(given: str | None) -> str:
    """What a client calls its request, if that can be an id, else ""."""
    return given if given is not None and REQUEST_ID.fullmatch(given) else ""


def request_id_of(given: str | None) -> str:
    """The client's own `X-Request-Id` if it can be one, else a new one."""
    return own_request_id(given) or uuid.uuid4().hex


class Manners:
    """`routes`: of the application, when they are all there. `origins`: whose pages may read answers; "*": all.

    Each answer carries `X-Request-Id`, and so does each log line that is written for its request.
    """

    def __init__(
        self, app: ASGIApp, routes: Callable[[], Sequence[Any]], origins: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._routes = routes
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = _plain(scope["path"])
        scope = {**scope, "path": path.rstrip("/") or "/"}
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get("x-request-id"))
        structlog.contextvars.bind_contextvars(request_id=request_id)
        more = [(b"x-request-id", request_id.encode()), *self._cors(headers)]
        if scope["method"] == "OPTIONS":
            allowed = METHODS if path == "*" else self._allowed(scope["path"])
            preflight = bool(self._origins) and "access-control-request-method" in headers
            if allowed or preflight:  # browsers send no key with a preflight
                more += _preflight(headers, allowed) if preflight and allowed else []
                return await _options(send, allowed, more)
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET", "state": {**scope.get("state", {}), HEAD: True}}
        answer = _Answer(
            receive, send, more, functools.partial(self._allowed, scope["path"]), "expect" in headers
        )
        began = time.perf_counter()
        try:
            return await self._app(scope, answer.receive, answer.send)
        finally:
            if scope["method"] not in READS or answer.status >= 400:
                path, seconds = scope["path"][:PATH_CHARS_MAX], round(time.perf_counter() - began, 3)
                more_words = scope.get("state", {}).get(LOGGED, {})
                log.info(
                    "request",
                    method=scope["method"],
                    path=path,
                    status=answer.status,
                    duration_s=seconds,
                    **more_words,
                )

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


def _plain(path: str) -> str:
    """Read alike by who guards a path and by who looks its route up. A route's pattern ends with `$`, which lets a line
    end pass that no rule for the path has seen: control characters stay encoded, and name nothing."""
    return CONTROLS.sub(lambda found: quote(found[0]), SLASHES.sub("/", path))


class _Answer:
    """One exchange: adds headers to the answer."""

    def __init__(
        self, receive: Receive, send: Send, more: Pairs, allowed: Callable[[], set[str]], expects: bool
    ) -> None:
        self._receive = receive
        self._send = send
        self._more = more
        self._allowed = allowed
        self._waits = expects  # for a word before it sends its body
        self.status = 0  # none: the client left before

    async def receive(self) -> Message:
        self._waits = False
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), *self._more]
            if message["status"] == 405:
                headers = [pair for pair in headers if pair[0].lower() != b"allow"] + [
                    _allow(self._allowed())
                ]
            if message["status"] == 415:  # of its coding: nothing else of a body is refused so
                headers.append((b"accept-encoding", CODINGS.encode()))
            if self._waits:  # whether its body comes now, nobody can know
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)


async def _options(send: Send, allowed: set[str], headers: Pairs) -> None:
    """`allowed`: methods of the path; none: there is no such path."""
    end = _allow(allowed) if allowed else (b"content-length", b"0")
    status = 204 if allowed else 404
    await send({"type": "http.response.start", "status": status, "headers": [*headers, end]})
    await send({"type": "http.response.body", "body": b""})


def _allow(methods: set[str]) -> tuple[bytes, bytes]:
    return b"allow", ", ".join(sorted(methods)).encode()


def _preflight(headers: Headers, allowed: set[str]) -> Pairs:
    wanted = headers.get("access-control-request-headers", "authorization, content-type")
    return [
        (b"access-control-allow-methods", ", ".join(sorted(allowed)).encode()),
        (b"access-control-allow-headers", wanted.encode("latin-1")),
        (b"access-control-max-age", str(PREFLIGHT_S).encode()),
    ]
