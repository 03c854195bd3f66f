"""Who may use the admin API, and for what: the bearer of the admin token or of one that was minted with it
(`controlplane.contract.auth`), or a browser that has shown either once or has signed in with a provider (`oidc`).

The cookie is `<role>.<name>.<expiry>.<id>.<HMAC of these under the admin token>`; of the name, which a provider may
have given, what a cookie cannot hold is percent-encoded. No table has the sessions, so that one is good at every
controller (browsers send a cookie to all ports of a host) and after a controller has restarted; what was revoked
(signing out does) is known to all of them, by the session's id or by that of the token that opened it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote, unquote

import msgspec
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.contract.auth import ADMIN_CALLER, Caller, Role, identify_bearer
from controlplane.contract.errors import Unavailable

COOKIE = "kevlarflow_admin"
SESSION_S = 12 * 3600
READY = "/readyz"
# Paths that work without either. They say nothing about the cluster, but to who has a token.
OPEN = {
    ("GET", "/livez"),
    ("GET", READY),
    ("GET", "/"),
    ("GET", "/ui"),
    ("POST", "/session"),
    ("GET", "/oidc"),
    ("GET", "/oidc/login"),
    ("GET", "/oidc/callback"),
}
OPEN_PREFIX = "/ui/"
SAFE_METHODS = {"GET", "HEAD"}
REVOCATIONS = "/admin/v1/revocations"  # of what others were given: only with the cluster's own token
CREDENTIALS = "/admin/v1/credentials"  # what kfadmin has done to them: with it as well
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
    ids = "-".join((f"s{secrets.token_hex(16)}", *caller.ids))
    said = f"{caller.role.value}.{quote(caller.name, safe='')}.{expiry}.{ids}"
    return f"{said}.{_sign(token, said)}"


def session_s(caller: Caller, now_unix_s: float) -> int:
    """How long a session may last that begins now."""
    return min(SESSION_S, int(caller.expiry_unix_s - now_unix_s)) if caller.expiry_unix_s else SESSION_S


def caller_of_cookie(value: str, token: str, now_unix_s: float) -> Caller | None:
    """Who a cookie was made for; None: it was not made with `token`, or has expired. Whether it was revoked is not
    looked at."""
    said, _, signature = value.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _sign(token, said).encode()):
        return None
    role, _, rest = said.partition(".")
    name, expiry, ids = rest.rsplit(".", 2)  # the name of somebody at a provider may have dots
    if int(expiry) <= now_unix_s:
        return None
    return Caller(unquote(name), Role(role), expiry_unix_s=int(expiry), ids=tuple(ids.split("-")))


def session_of(headers: Headers, token: str, now_unix_s: float) -> Caller | None:
    """Whose session a browser has; None: none."""
    return caller_of_cookie(_cookie(headers), token, now_unix_s)


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
        if path in (REVOCATIONS, CREDENTIALS):
            return Role.ADMIN
        return Role.VIEWER if (method, path) == ("DELETE", "/session") else Role.OPERATOR
    if path == "/metrics":
        return Role.METRICS
    return Role.OPERATOR if path in OPERATORS_READ else Role.VIEWER


def is_known(scope: Scope) -> bool:
    """Whether an open path was asked with a credential that lets its bearer read."""
    return CALLER in scope.get("state", {})


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
    """ASGI middleware: refuses what is not allowed before a route is looked up, and hardens every answer.

    `revoked`: see `AdminService.is_revoked`.
    """

    def __init__(self, app: ASGIApp, token: str, revoked: Callable[[Sequence[str]], bool]) -> None:
        self._app = app
        self._token = token
        self._revoked = revoked

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
        if method in SAFE_METHODS and path == READY:
            if headers.get("authorization") or _cookie(headers):
                self._refused(scope, headers)  # with a credential that is not good it answers as without one
            return None
        if (method, path) in OPEN or (method in SAFE_METHODS and path.startswith(OPEN_PREFIX)):
            return None
        return self._refused(scope, headers)

    def _refused(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        method, path = scope["method"], scope["path"]
        now = time.time()
        caller = identify_bearer(headers.get("authorization"), self._token, now)
        by_cookie = caller is None
        if caller is None:
            caller = session_of(headers, self._token, now)
        if caller is None:
            return error(401, "the admin token is missing or wrong", {"www-authenticate": "Bearer"})
        try:
            if caller.ids and self._revoked(caller.revoked_by):
                return error(401, "this token or session was revoked", {"www-authenticate": "Bearer"})
        except Unavailable as problem:
            return error(503, str(problem), {"retry-after": "1"})
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
    """Ours, whatever others on this host have set beside it: `http.cookies` gives up at the first name or value that it
    finds odd, and leaves out what follows."""
    return cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def _sign(token: str, said: str) -> str:
    # Cookies of releases in which a session had no id were signed as "session/": they are refused.
    return hmac.new(token.encode(), f"session2/{said}".encode(), hashlib.sha256).hexdigest()
