"""Who may do what with the admin API: sessions of browsers, roles, and what is taken back."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any, cast

import httpx
import msgspec
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from controlplane.contract.auth import MINTED, Role, mint
from controlplane.contract.errors import ConfigError
from controlplane.main import _admin_server
from tests.web.admin_service import BEARER, TOKEN, MemoryService, drain
from web.admin import auth
from web.gateway.http.server import make_server


def test_a_browser_session(client: httpx.Client, service: MemoryService) -> None:
    assert client.post("/session", json={"token": "wrong"}).status_code == 401
    answer = client.post("/session", json={"token": TOKEN})
    assert answer.status_code == 204
    set_cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in set_cookie
    assert "samesite=strict" in set_cookie
    assert TOKEN not in set_cookie
    assert client.get("/admin/v1/status").status_code == 200

    # Changes by cookie: only from the very page, its port included (cookies ignore ports).
    host = f"{client.base_url.host}:{client.base_url.port}"
    for headers in (
        {},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": f"http://{host}", "sec-fetch-site": "same-site"},
    ):
        assert client.post("/admin/v1/operations", json=drain("n2"), headers=headers).status_code == 403
    assert service.known == {}
    good = {"origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    assert client.post("/admin/v1/operations", json=drain("n2"), headers=good).status_code == 200

    assert client.delete("/session", headers=good).status_code == 204
    assert client.get("/admin/v1/status").status_code == 401


@pytest.mark.parametrize(
    "foreign",
    [
        'prefs={"a":1}',
        "path=/x",
        "n@me=1",
        "a b=1",
        "a[b]=1",
        'open="1',
        "x=a,b",
        "theme",
        "u=J\u00f6rg",
        "=",
    ],
)
def test_a_cookie_of_others_on_the_host_is_in_nobodys_way(client: httpx.Client, foreign: str) -> None:
    ours = with_cookie(client, TOKEN)["cookie"]
    host = f"{client.base_url.host}:{client.base_url.port}"
    page = {"origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    for cookies in (f"{ours}; {foreign}", f"{foreign}; {ours}", f"{foreign};{ours}"):
        sent = {"cookie": cookies.encode("latin-1")}
        assert client.get("/admin/v1/status", headers=sent).status_code == 200, cookies
    assert client.delete("/session", headers={**page, **sent}).status_code == 204
    assert client.get("/admin/v1/status", headers={"cookie": ours}).status_code == 401  # it was revoked


def test_a_session_ends_by_itself() -> None:
    cookie = auth.session_cookie(TOKEN, 1000.0)
    assert auth.caller_of_cookie(cookie, TOKEN, 1000.0 + auth.SESSION_S - 1)
    assert not auth.caller_of_cookie(cookie, TOKEN, 1000.0 + auth.SESSION_S + 1)
    assert not auth.caller_of_cookie(cookie, "other", 1000.0)
    role, name, expiry, session, signature = cookie.split(".")
    longer = f"{role}.{name}.{int(expiry) + 1}.{session}.{signature}"
    assert not auth.caller_of_cookie(longer, TOKEN, 1000.0)


def minted(role: Role, name: str = "alice", expiry: float | None = None) -> dict[str, str]:
    until = int(time.time()) + 60 if expiry is None else int(expiry)
    return {"authorization": f"Bearer {mint(TOKEN, name, role, until)}"}


def test_every_route_is_denied_to_roles_below_the_one_that_it_takes(
    client: httpx.Client, service: MemoryService
) -> None:
    """All routes of the app, so that a new one cannot be forgotten."""
    document = client.get("/openapi.json", headers=BEARER).json()
    order = list(Role)
    for path, methods in document["paths"].items():
        concrete = path.replace("{operation_id}", "x").replace("{path}", "x")
        for method, operation in methods.items():
            if not operation["security"] or path == "/admin/v1/stream":
                continue
            needed = auth.role_needed(method.upper(), concrete)
            assert client.request(method, concrete).status_code == 401, path
            for role in MINTED:
                answer = client.request(method, concrete, headers=minted(role))
                if order.index(role) < order.index(needed):
                    assert answer.status_code == 403, (role, method, path)
                    assert method == "head" or needed.value in answer.json()["error"]["message"]
                else:
                    assert answer.status_code not in {401, 403}, (role, method, path)


def test_routes_that_need_no_token_are_these_alone(client: httpx.Client) -> None:
    document = client.get("/openapi.json", headers=BEARER).json()
    documented = {
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if not operation["security"]
    }
    assert {path for method, path in documented if method == "OPTIONS"} == set(document["paths"])
    assert {path for method, path in documented if method == "HEAD"} == {
        path for method, path in documented if method == "GET"
    }
    documented = {(method, path) for method, path in documented if method not in {"HEAD", "OPTIONS"}}
    login = {("GET", "/oidc"), ("GET", "/oidc/login"), ("GET", "/oidc/callback")}
    assert documented == {
        ("GET", "/livez"), ("GET", "/readyz"), ("GET", "/"), ("GET", "/ui"), ("GET", "/ui/{path}"),
        ("POST", "/session"), *login,
    }  # fmt: skip
    assert documented - {("GET", "/ui/{path}")} == auth.OPEN
    for path in (
        "/oidc/x",
        "/oidc/login/x",
        "/oidc/callback/x",
        "/oidcx",
    ):  # nor is anything beside them open
        assert client.get(path).status_code == 401, path
    for _method, path in login:
        assert client.post(path).status_code == 401, path


def test_what_roles_are_for(client: httpx.Client, service: MemoryService) -> None:
    assert client.get("/metrics", headers=minted(Role.METRICS)).status_code == 200
    assert client.get("/admin/v1/status", headers=minted(Role.METRICS)).status_code == 403
    assert client.get("/admin/v1/status", headers=minted(Role.VIEWER)).status_code == 200
    for path in ("/admin/v1/audit", "//admin//v1/audit", "/admin/v1/%61udit", "/admin/v1/audit?limit=1"):
        assert client.get(f"{client.base_url}{path}", headers=minted(Role.VIEWER)).status_code == 403, path
        assert client.head(f"{client.base_url}{path}", headers=minted(Role.VIEWER)).status_code == 403, path
        assert client.get(f"{client.base_url}{path}", headers=minted(Role.OPERATOR)).status_code == 200, path
    slash = client.get(f"{client.base_url}/admin/v1/audit/", headers=minted(Role.VIEWER))
    assert slash.status_code == 403
    body = drain("n2")
    assert client.post("/admin/v1/operations", json=body, headers=minted(Role.VIEWER)).status_code == 403
    assert service.known == {}
    assert client.post("/admin/v1/operations", json=body, headers=minted(Role.OPERATOR)).status_code == 200
    caller = service.callers[-1]
    assert (caller.name, caller.role, caller.address) == ("alice", Role.OPERATOR, "127.0.0.1")
    client.post("/admin/v1/operations", json=drain("n3", "op-9"), headers=BEARER)
    assert (service.callers[-1].name, service.callers[-1].role) == ("admin", Role.ADMIN)


@pytest.mark.parametrize("end", ["%0a", "%0A", "%0d", "%0d%0a", "%00", "%7f", "/%0a", "%0a/"])
def test_a_path_with_a_line_end_is_no_other_way_to_what_a_role_may_not(
    client: httpx.Client, service: MemoryService, end: str
) -> None:
    """Routes take one at their end: viewers read settings and audit, and operators took tokens back."""
    for path in sorted(auth.OPERATORS_READ):
        answer = client.get(f"{client.base_url}{path}{end}?id=x", headers=minted(Role.VIEWER))
        assert answer.status_code == 404, path
    revocations = f"{client.base_url}{auth.REVOCATIONS}{end}"
    assert client.post(revocations, json={"name": "bob"}, headers=minted(Role.OPERATOR)).status_code == 404
    assert service.revoked == {}


@pytest.mark.parametrize(
    "config_of", [lambda app: _admin_server(app).config, lambda app: make_server(app).config]
)
def test_nobody_on_the_host_can_say_that_he_connected_from_elsewhere(
    config_of: Callable[[ASGIApp], uvicorn.Config],
) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    config = config_of(app)
    config.load()
    forged = [(b"x-forwarded-for", b"10.66.6.6"), (b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "client": ("127.0.0.1", 5), "scheme": "http", "headers": forged}
    asyncio.run(cast("Any", config.loaded_app)(scope, None, None))
    assert (seen[0]["client"], seen[0]["scheme"]) == (("127.0.0.1", 5), "http")


def test_tokens_that_are_no_good(client: httpx.Client) -> None:
    good = mint(TOKEN, "alice", Role.OPERATOR, int(time.time()) + 60)
    said, _, signature = good.rpartition(".")
    kf, role, name, expiry = said.split(".")
    forged = [
        mint("another token", "alice", Role.OPERATOR, int(time.time()) + 60),
        mint(TOKEN, "alice", Role.OPERATOR, int(time.time()) - 1),
        f"{kf}.admin.{name}.{expiry}.{signature}",
        f"{kf}.{role}.bob.{expiry}.{signature}",
        f"{kf}.{role}.{name}.{int(expiry) + 1}.{signature}",
        said,
        f"{good}0",
    ]
    for token in forged:
        answer = client.get("/admin/v1/status", headers={"authorization": f"Bearer {token}"})
        assert answer.status_code == 401, token
    assert client.get("/admin/v1/status", headers={"authorization": f"Bearer {good}"}).status_code == 200
    for name, role in (("", Role.VIEWER), ("a.b", Role.VIEWER), ("admin", Role.VIEWER), ("a", Role.ADMIN)):
        with pytest.raises(ConfigError):
            mint(TOKEN, name, role, 1)


def test_a_session_keeps_the_role_and_the_name(client: httpx.Client, service: MemoryService) -> None:
    token = mint(TOKEN, "eve", Role.VIEWER, int(time.time()) + 60)
    answer = client.post("/session", json={"token": token})
    assert answer.status_code == 204
    assert token.rpartition(".")[2] not in answer.headers["set-cookie"]  # no cookie is a token
    assert 0 < int(answer.headers["set-cookie"].lower().partition("max-age=")[2].partition(";")[0]) <= 60
    assert client.get("/admin/v1/status").status_code == 200
    assert client.post("/admin/v1/operations", json=drain("n2"), headers=own(client)).status_code == 403
    assert service.known == {}


@pytest.mark.parametrize("said", ["", "admin.admin."])
def test_cookies_of_releases_in_which_they_had_no_id_are_refused(client: httpx.Client, said: str) -> None:
    said = f"{said}{int(time.time()) + 60}"
    signature = hmac.new(TOKEN.encode(), f"session/{said}".encode(), hashlib.sha256).hexdigest()
    answer = client.get("/admin/v1/status", headers={"cookie": f"{auth.COOKIE}={said}.{signature}"})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "odd", [{"change": "x"}, {"id": "A/.."}, {"name": "a\nb"}, {"by": "\x1b"}, {"secret": "x"}]
)
def test_what_was_done_to_credentials_is_told_by_the_clusters_own_token_alone(
    client: httpx.Client, service: MemoryService, odd: dict[str, str]
) -> None:
    body = {"change": "revoke-key", "id": "00aa", "name": "alice", "by": "root@h1"}
    refused = client.post("/admin/v1/credentials", json=body, headers=minted(Role.OPERATOR))
    assert (refused.status_code, service.noted) == (403, [])
    assert client.post("/admin/v1/credentials", json=body | odd, headers=BEARER).status_code == 400
    assert service.noted == []
    assert client.post("/admin/v1/credentials", json=body, headers=BEARER).status_code == 204
    ((change, caller),) = service.noted
    assert (change.name, caller.name, caller.address) == ("alice", "admin", "127.0.0.1")


def test_a_scrapers_token_reads_metrics_and_nothing_else(
    client: httpx.Client, service: MemoryService
) -> None:
    service.cluster = msgspec.structs.replace(service.cluster, troubles=("operations/x cannot be read",))
    for method in ("GET", "HEAD"):
        for path in ("/openapi.json", "/session", "/admin/v1/status"):
            answer = client.request(method, path, headers=minted(Role.METRICS))
            assert answer.status_code == 403, (method, path)
    assert client.get("/readyz", headers=minted(Role.METRICS)).text == "ok\n"
    assert "cannot be read" in client.get("/readyz", headers=minted(Role.VIEWER)).text


# ---- what is taken back


def own(client: httpx.Client) -> dict[str, str]:
    """Of a change that the dashboard's own page asks for."""
    return {
        "origin": f"http://{client.base_url.host}:{client.base_url.port}",
        "sec-fetch-site": "same-origin",
    }


def with_cookie(client: httpx.Client, token: str) -> dict[str, str]:
    """A session's cookie as a header, for requests of somebody who has copied it."""
    assert client.post("/session", json={"token": token}).status_code == 204
    copied = {"cookie": f"{auth.COOKIE}={client.cookies[auth.COOKIE]}"}
    client.cookies.clear()
    return copied


def test_who_has_copied_a_cookie_is_signed_out_as_well(client: httpx.Client, service: MemoryService) -> None:
    copied, other = with_cookie(client, TOKEN), with_cookie(client, TOKEN)
    assert client.get("/admin/v1/status", headers=copied).status_code == 200
    assert client.delete("/session", headers=copied | own(client)).status_code == 204
    refused = client.get("/admin/v1/status", headers=copied)
    assert (refused.status_code, "revoked" in refused.text) == (401, True)
    # Another session of the same name.
    assert client.get("/admin/v1/status", headers=other).status_code == 200
    assert client.get("/admin/v1/status", headers=BEARER).status_code == 200
    (entry,) = service.revoked.values()
    assert entry.id not in json.dumps(BEARER)
    assert 0 < entry.expiry_unix_s - time.time() <= auth.SESSION_S


def test_an_open_stream_ends_with_its_session(client: httpx.Client) -> None:
    copied = with_cookie(client, TOKEN)
    with client.stream("GET", "/admin/v1/stream", headers=copied) as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("data: "))
        assert client.delete("/session", headers=copied | own(client)).status_code == 204
        for _ in lines:
            pass  # it ends; else the client's timeout does


def test_a_revoked_token_takes_its_sessions_along(client: httpx.Client, service: MemoryService) -> None:
    until = int(time.time()) + 60
    lost, kept = (mint(TOKEN, name, Role.OPERATOR, until) for name in ("alice", "bob"))
    session = with_cookie(client, lost)
    for body in ({"token": lost}, {"name": "alice"}):
        answer = client.post("/admin/v1/revocations", json=body, headers=minted(Role.OPERATOR, "bob"))
        assert answer.status_code == 403  # operators do not decide about each other
        service.revoked.clear()
        assert client.get("/admin/v1/status", headers=session).status_code == 200
        answer = client.post("/admin/v1/revocations", json=body, headers=BEARER)
        assert (answer.status_code, answer.json()["name"]) == (200, "alice")
        assert lost not in answer.text
        for headers in (session, {"authorization": f"Bearer {lost}"}):
            assert client.get("/admin/v1/status", headers=headers).status_code == 401
        assert client.post("/session", json={"token": lost}).status_code == 401
        assert client.get("/admin/v1/status", headers={"authorization": f"Bearer {kept}"}).status_code == 200
    # The name: another token of it as well.
    assert client.get("/admin/v1/status", headers=minted(Role.VIEWER, "alice")).status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400), ({"name": "a", "token": "b"}, 400), ({"name": "a\n"}, 400), ({"name": "a", "all": 1}, 400),
        ({"token": "kf.operator.alice.99.00"}, 404), ({"token": TOKEN}, 409), ({"name": "admin"}, 409),
    ],
)  # fmt: skip
def test_what_cannot_be_revoked_is_refused_in_words(
    client: httpx.Client, service: MemoryService, body: dict[str, object], status: int
) -> None:
    answer = client.post("/admin/v1/revocations", json=body, headers=BEARER)
    assert answer.status_code == status, answer.text
    assert service.revoked == {}


def test_nothing_that_may_be_revoked_is_good_before_it_is_known(
    client: httpx.Client, service: MemoryService
) -> None:
    copied = with_cookie(client, TOKEN)
    service.ready = False
    for headers in (copied, minted(Role.VIEWER)):
        assert client.get("/admin/v1/status", headers=headers).status_code == 503
    assert client.get("/admin/v1/status", headers=BEARER).status_code == 200
