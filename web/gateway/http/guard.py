"""What every request passes before anything looks at it: the API key, and the bound on its body."""

from __future__ import annotations

import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from web.gateway.errors import ApiError
from web.gateway.http.api_keys import ApiKeys, Caller, Right
from web.manners import LOGGED

METRICS = "/metrics"
# Whoever shows a key is told more by some of them; a wrong one is no reason not to say whether we live.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/version"})
BODY_BYTES_MAX = 4 << 20


class Guard:
    """ASGI middleware; raw, because Starlette's own kind would stand in the way of disconnects."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return None
        headers = Headers(scope=scope)
        if scope["path"] in OPEN_PATHS:
            with contextlib.suppress(ApiError):
                self._admit(scope, self._keys.match(headers.get("authorization")))
        else:
            try:
                caller = self._keys.match(headers.get("authorization"))
                if caller.right is Right.METRICS and scope["path"] != METRICS:
                    raise ApiError(403, f"this API key is for {METRICS} alone")
            except ApiError as error:
                return await _refuse(send, error)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > BODY_BYTES_MAX:
                return await _refuse(send, too_large())
            self._admit(scope, caller)
        await self._app(scope, receive, send)
        return None

    def _admit(self, scope: Scope, caller: Caller) -> None:
        scope.setdefault("state", {}).update({"caller": caller, LOGGED: {"key": caller.name}})


def too_large() -> ApiError:
    return ApiError(413, f"the body exceeds {BODY_BYTES_MAX} bytes")


async def _refuse(send: Send, error: ApiError) -> None:
    body = error.encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
