"""What every request passes before anything looks at it: the API key, and the bound on its body."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from web.gateway.errors import ApiError
from web.gateway.http.api_keys import ApiKeys, Right
from web.manners import LOGGED

METRICS = "/metrics"
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
        if scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            try:
                caller = self._keys.match(headers.get("authorization"))
                if caller.right is Right.METRICS and scope["path"] != METRICS:
                    raise ApiError(403, f"this API key is for {METRICS} alone")
            except ApiError as error:
                return await _refuse(send, error)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > BODY_BYTES_MAX:
                return await _refuse(send, too_large())
            scope.setdefault("state", {}).update({"caller": caller, LOGGED: {"key": caller.name}})
        await self._app(scope, receive, send)
        return None


def too_large() -> ApiError:
    return ApiError(413, f"the body exceeds {BODY_BYTES_MAX} bytes")


async def _refuse(send: Send, error: ApiError) -> None:
    body = error.encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
