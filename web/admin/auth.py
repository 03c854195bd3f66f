"""Who may use the admin API, and for what: the bearer of the admin token or of one that was minted with it
(`controlplane.contract.auth`), or a browser that has shown either once or has signed in with a provider (`oidc`).

The cookie is `<role>.<name>.<expiry>.<HMAC of these under the admin token>`; of the name, which a provider may have
given, what a cookie cannot hold is percent-encoded. It needs no table, so that it is good at
every controller (browsers send a cookie to all ports of a host) and after a controller has restarted.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, unquote

import msgspec
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.contract.auth import ADMIN_CALLER, Caller, Role, identify_bearer

COOKIE = "kevlarflow_admin"
SESSION_S = 12 * 3600
# Paths that work without either. They say nothing about the cluster.
OPEN = {
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/"),
    ("POST", "/session"),
    ("GET", "/oidc"),
    ("GET", "/oidc/login"),
    ("GET", "/oidc/callback"),
}
OPEN_PREFIX = "/ui/"
SAFE_METHODS = {"GET", "HEAD"}
OPERATORS_READ = {"/admin/v1/audit", "/admin/v1/requests", "/admin/v1/settings"}  # more than viewers need
CALLER = "kf_caller"  # key of the scope's state
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


def session_cookie(token: str, now_unix_s: float, caller: Caller = ADMIN_CALLER) -> str:
    """A cookie's value that is good for `SESSION_S` seconds, or as long as the caller's own token. `token`: the admin
    token."""
    expiry = int(now_unix_s) + session_s(caller, now_unix_s)
    said = f"{caller.role.value}.{quote(caller.name, safe='')}.{expiry}"
    return f"{said}.{_sign(token, said)}"


def session_s(caller: Caller, now_unix_s: float) -> int:
    """How long a session may last that begins now."""
    return min(SESSION_S, int(caller.expiry_unix_s - now_unix_s)) if caller.expiry_unix_s else SESSION_S


def caller_of_cookie(value: str, token: str, now_unix_s: float) -> Caller | None:
    """Who a cookie was made for; None: it was not made with `token`, or has expired."""
    said, _, signature = value.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _sign(token, said).encode()):
        return None
    role, _, rest = said.partition(".")
    name, dot, expiry = rest.rpartition(".")  # the name of somebody at a provider may have dots
    if not dot:  # of a release before there were roles
        return None
    return Caller(unquote(name), Role(role), expiry_unix_s=int(expiry)) if int(expiry) > now_unix_s else None


def set_session(response: Response, token: str, now_unix_s: float, caller: Caller, *, secure: bool) -> None:
    """Give a browser its cookie. `secure`: it is at an https address. The cookie comes with no request that a page of
    another site has caused; the dashboard's own requests carry it also where a provider has sent the browser there."""
    response.set_cookie(
        COOKIE,
        session_cookie(token, now_unix_s, caller),
        max_age=session_s(caller, now_unix_s),
        httponly=True,
        samesite="strict",
        secure=secure,
    )


def role_needed(method: str, path: str) -> Role:
    """The least role that a request needs: reading for viewers, and all else for operators unless it is named here."""
    if method not in SAFE_METHODS:
        return Role.VIEWER if (method, path) == ("DELETE", "/session") else Role.OPERATOR
    if path == "/metrics":
        return Role.METRICS
    return Role.OPERATOR if path in OPERATORS_READ else Role.VIEWER


def caller_of(scope: Scope) -> Caller:
    """Who sent a request that the guard has let through."""
    caller: Caller = scope["state"][CALLER]
    return caller


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
        """Why the request is not let through; a caller who is known is left in the scope's state."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        if (method, path) in OPEN or (method in SAFE_METHODS and path.startswith(OPEN_PREFIX)):
            return None
        now = time.time()
        caller = identify_bearer(headers.get("authorization"), self._token, now)
        by_cookie = caller is None
        if caller is None:
            caller = caller_of_cookie(_cookie(headers), self._token, now)
        if caller is None:
            return error(401, "the admin token is missing or wrong", {"www-authenticate": "Bearer"})
        needed = role_needed(method, path)
        if not caller.role.includes(needed):
            return error(403, f"{caller.name} has the role {caller.role.value}, this takes {needed.value}")
        if by_cookie and method not in SAFE_METHODS and not same_origin(headers):
            return error(403, "changes by cookie must come from the dashboard itself")
        address = scope["client"][0] if scope.get("client") else "local"  # a Unix socket
        scope.setdefault("state", {})[CALLER] = msgspec.structs.replace(caller, address=address)
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


def _sign(token: str, said: str) -> str:
    return hmac.new(token.encode(), f"session/{said}".encode(), hashlib.sha256).hexdigest()
