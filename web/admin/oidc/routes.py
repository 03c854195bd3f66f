"""Login with an OpenID Connect provider: to it and back, as pages of the admin API.

    GET /oidc            {"provider": ...}; "" without one
    GET /oidc/login      to the provider, with a cookie that knows the way back
    GET /oidc/callback   back from it: a session, and on to the dashboard

Who is let in gets the cookie that a token gets, with its own expiry. What goes wrong is a page that says so.
"""

from __future__ import annotations

import html
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from web.admin.auth import error, set_session
from web.admin.oidc.login import (
    LOGIN_COOKIE,
    LOGIN_S,
    LoginError,
    caller_of_claims,
    login_cookie,
    login_of_cookie,
    same_state,
)

if TYPE_CHECKING:  # it imports what only a cluster with a provider needs
    from web.admin.oidc.provider import Provider

log = structlog.get_logger()

PATH = "/oidc"
ERROR_CODE = re.compile(r"[A-Za-z_]{1,64}")  # as OAuth has them; what else a link may say is not shown
CODE_CHARS_MAX = 4096
NONE = "this cluster has no login provider: sign in with a token"
NOT_BEGUN = (
    "This login has not begun in this browser, was used before, or took longer than ten minutes. Start again from the"
    " dashboard."
)
WRONG_ADDRESS = (
    "The login provider does not know the address at which you opened the dashboard. It knows: {known}. Sign in at one"
    " of these, or with a token."
)
REVOKED = "Whoever operates the cluster has withdrawn your access."
DENIED = "The login provider did not let you in ({code})."
PAGE = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <meta name="color-scheme" content="light dark">
    <title>Not signed in - KevlarFlow</title>
    <link rel="icon" href="/ui/icon.svg" type="image/svg+xml">
    <link rel="stylesheet" href="/ui/style.css">
  </head>
  <body>
    <main class="signin">
      <h1>Not signed in</h1>
      <p class="problem" role="alert">{message}</p>
      <p><a href="/">Back to the dashboard</a></p>
    </main>
  </body>
</html>
"""


def add_login(
    app: FastAPI, token: str, provider: Provider | None, revoked: Callable[[Sequence[str]], bool]
) -> None:
    """`token`: the admin token, which signs cookies. `revoked`: see `AdminService.is_revoked`."""

    @app.get(PATH)
    async def offered() -> Response:
        return JSONResponse({"provider": provider.config.provider if provider is not None else ""})

    @app.get(f"{PATH}/login")
    async def begin(request: Request) -> Response:
        if provider is None:
            return error(404, NONE)
        try:
            back = _redirect_url(provider, request)
            made = login_cookie(token, secrets.token_urlsafe(32), time.time())
            login = login_of_cookie(made, token, time.time())
            assert login is not None
            response: Response = RedirectResponse(await provider.authorization_url(login, back), 303)
        except LoginError as problem:
            return _not_signed_in(request, problem)
        response.set_cookie(
            LOGIN_COOKIE,
            made,
            max_age=LOGIN_S,
            path=PATH,
            httponly=True,
            samesite="lax",  # it has to come back from another site
            secure=back.startswith("https:"),
        )
        return response

    @app.get(f"{PATH}/callback")
    async def finish(request: Request) -> Response:
        if provider is None:
            return error(404, NONE)
        try:
            response = await _signed_in(request, token, provider, revoked)
        except LoginError as problem:
            response = _not_signed_in(request, problem)
        response.delete_cookie(LOGIN_COOKIE, path=PATH, httponly=True, samesite="lax")
        return response


async def _signed_in(
    request: Request, token: str, provider: Provider, revoked: Callable[[Sequence[str]], bool]
) -> Response:
    """Raises LoginError, Unavailable."""
    asked, now = request.query_params, time.time()
    back = _redirect_url(provider, request)
    login = login_of_cookie(request.cookies.get(LOGIN_COOKIE, ""), token, now)
    if login is None or not same_state(login, asked.get("state", "")):
        raise LoginError(400, NOT_BEGUN, "no cookie of the login" if login is None else "another state")
    if (denied := asked.get("error")) is not None:
        told = denied if ERROR_CODE.fullmatch(denied) else "no reason given"
        raise LoginError(403, DENIED.format(code=told), f"the provider said {denied!r:.300}")
    code = asked.get("code", "")
    if not 0 < len(code) <= CODE_CHARS_MAX:
        raise LoginError(400, NOT_BEGUN, "no code, or one that is too long")
    claims = await provider.claims(code, asked.get("iss", ""), login, back)
    now = time.time()
    caller = caller_of_claims(claims, provider.config, now)
    if revoked(caller.revoked_by):
        raise LoginError(403, REVOKED, f"{caller.name} is revoked")
    log.info("signed in", who=caller.name, role=caller.role.value, address=_address(request))
    response = RedirectResponse("/", 303)
    set_session(response, token, now, caller, secure=back.startswith("https:"))
    return response


def _redirect_url(provider: Provider, request: Request) -> str:
    found = provider.config.redirect_url(request.headers.get("host", ""))
    if found is None:
        known = ", ".join(url.removesuffix("oidc/callback") for url in provider.config.redirect_urls)
        raise LoginError(400, WRONG_ADDRESS.format(known=known), "an address that is not in redirect_urls")
    return found


def _not_signed_in(request: Request, problem: LoginError) -> Response:
    log.warning("not signed in", status=problem.status, cause=problem.cause, address=_address(request))
    retry = {"retry-after": "2"} if problem.status == 503 else None
    return HTMLResponse(PAGE.format(message=html.escape(problem.message)), problem.status, retry)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else "local"
