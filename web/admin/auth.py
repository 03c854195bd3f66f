"""Who may use the admin API: the bearer of the admin token, or a browser that has shown it once.

The cookie is `<expiry>.<HMAC of it under the admin token>`. It needs no table, so that it is good at every
controller (browsers send a cookie to all ports of a host) and after a controller has restarted.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.contract.auth import bearer_matches

COOKIE = "kevlarflow_admin"
SESSION_S = 12 * 3600
# Paths that work without either. They say nothing about the cluster.
OPEN = {("GET", "/livez"), ("GET", "/readyz"), ("GET", "/"), ("POST", "/session")}
OPEN_PREFIX = "/ui/"
SAFE_METHODS = {"GET", "HEAD"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def session_cookie(token: str, now_unix_s: float) -> str:
    """A cookie's value that is good for `SESSION_S` seconds."""
    expiry = str(int(now_unix_s) + SESSION_S)
    return f"{expiry}.{_sign(token, expiry)}"


def cookie_matches(value: str, token: str, now_unix_s: float) -> bool:
    """Whether a cookie's value was made with `token` and has not expired."""
    expiry, _, signature = value.partition(".")
    good = hmac.compare_digest(signature.encode(), _sign(token, expiry).encode())
    return good and expiry.isascii() and expiry.isdigit() and int(expiry) > now_unix_s


def same_origin(headers: Headers) -> bool:
    """Whether a browser says that a page of this very address (port included) sent the request."""
    origin = headers.get("origin", "")
    site = headers.get("sec-fetch-site", "same-origin")
    return site == "same-origin" and origin.split("://", 1)[-1] == headers.get("host") and "://" in origin


class Guard:
    """ASGI middleware: refuses what is not allowed before a route is looked up, and hardens every answer."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, hardened)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        if (method, path) in OPEN or (method in SAFE_METHODS and path.startswith(OPEN_PREFIX)):
            return None
        if bearer_matches(headers.get("authorization"), self._token):
            return None
        if not cookie_matches(_cookie(headers), self._token, time.time()):
            return error(401, "the admin token is missing or wrong", {"www-authenticate": "Bearer"})
        if method not in SAFE_METHODS and not same_origin(headers):
            return error(403, "changes by cookie must come from the dashboard itself")
        return None


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The admin API's error body."""
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


def _cookie(headers: Headers) -> str:
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return ""  # somebody else's cookie on this host; without ours the request is refused anyway
    return jar[COOKIE].value if COOKIE in jar else ""


def _sign(token: str, expiry: str) -> str:
    return hmac.new(token.encode(), f"session/{expiry}".encode(), hashlib.sha256).hexdigest()
