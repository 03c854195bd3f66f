"""Login with a provider, over real HTTP and with real keys: who gets in, for what, and all that must not work."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
import pytest
import structlog

from controlplane.contract.auth import Caller, Role
from controlplane.contract.errors import ConfigError
from controlplane.contract.oidc import Oidc, OidcConfig, OidcRoles, load_oidc
from tests.web.admin_service import TOKEN, MemoryService, serving
from tests.web.oidc_provider import CLIENT_ID, CLIENT_SECRET, LocalProvider, SigningKey, provider
from web.admin import auth
from web.admin.oidc import provider as asking
from web.admin.oidc.login import LOGIN_COOKIE, LoginError, caller_of_claims, login_cookie, login_of_cookie
from web.admin.oidc.provider import Provider

ROLES = OidcRoles(viewer=("kf-viewers",), operator=("kf-operators",))
KEY = SigningKey()


def config(issuer: str, url: str, **more: object) -> OidcConfig:
    known = {
        "issuer": issuer,
        "client_id": CLIENT_ID,
        "redirect_urls": (f"{url}/oidc/callback",),
        "roles": ROLES,
    }
    return OidcConfig(**{**known, "provider": "corp", **more})  # type: ignore[arg-type]


def signing_in(issuer: LocalProvider, **more: object) -> Callable[[str], Provider]:
    return lambda url: Provider(Oidc(config(issuer.url, url, **more), client_secret=CLIENT_SECRET))


@pytest.fixture(scope="module")
def issuer() -> Iterator[LocalProvider]:
    with provider() as served:
        yield served


@pytest.fixture(scope="module")
def server(issuer: LocalProvider) -> Iterator[tuple[str, MemoryService]]:
    service = MemoryService()
    with serving(service, provider=signing_in(issuer)) as url:
        yield url, service


@pytest.fixture
def corp(issuer: LocalProvider) -> LocalProvider:
    issuer.reset(KEY)
    return issuer


@pytest.fixture
def browser(server: tuple[str, MemoryService], corp: LocalProvider) -> Iterator[httpx.Client]:
    server[1].reset()
    with httpx.Client(base_url=server[0], timeout=15, verify=False) as client:
        yield client


def way_back(client: httpx.Client, corp: LocalProvider) -> str:
    """From the click on "sign in" to the address that the provider sends the browser to."""
    answer = client.get("/oidc/login")
    assert answer.status_code == 303, answer.text
    query = {name: values[0] for name, values in parse_qs(urlsplit(answer.headers["location"]).query).items()}
    return corp.authorize(query)


def is_refused(client: httpx.Client, answer: httpx.Response, status: int, words: str) -> None:
    """It is a page that says so, and leaves nothing that opens a door."""
    assert answer.status_code == status, answer.text
    assert words in answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert auth.COOKIE not in client.cookies
    assert client.get("/admin/v1/status").status_code == 401


def test_a_login(browser: httpx.Client, corp: LocalProvider, server: tuple[str, MemoryService]) -> None:
    assert browser.get("/oidc").json() == {"provider": "corp"}
    begun = browser.get("/oidc/login")
    assert begun.status_code == 303
    sent = {name: values[0] for name, values in parse_qs(urlsplit(begun.headers["location"]).query).items()}
    assert sent["redirect_uri"] == f"{server[0]}/oidc/callback"
    given = begun.headers["set-cookie"].lower()
    assert {"httponly", "samesite=lax", "path=/oidc"} <= {part.strip() for part in given.split(";")}

    ended = browser.get(corp.authorize(sent))
    assert (ended.status_code, ended.headers["location"]) == (303, "/")
    session = next(
        text for text in ended.headers.get_list("set-cookie") if text.startswith(auth.COOKIE)
    ).lower()
    assert {"httponly", "samesite=strict"} <= {part.strip() for part in session.split(";")}
    assert 3500 < int(session.partition("max-age=")[2].partition(";")[0]) <= 3600
    assert LOGIN_COOKIE not in browser.cookies  # it is good once
    who = browser.get("/session").json()
    assert (who["name"], who["role"]) == ("corp:alice", "operator")
    assert time.time() < who["expiry_unix_s"] <= time.time() + 3600

    # PKCE: the provider was told a hash, then what it is of; neither it nor the secret is in an address.
    (request,) = corp.token_requests
    proof = hashlib.sha256(request["code_verifier"].encode()).digest()
    assert base64.urlsafe_b64encode(proof).rstrip(b"=").decode() == sent["code_challenge"]
    assert request["code_verifier"] not in begun.headers["location"] + given
    assert CLIENT_SECRET not in begun.headers["location"]


def test_what_is_done_is_done_by_the_subject(
    browser: httpx.Client, corp: LocalProvider, server: tuple[str, MemoryService]
) -> None:
    url, service = server
    browser.get(way_back(browser, corp))
    body = {"id": "op-1", "kind": "drain", "node": "n2"}
    # Changes by cookie come from the very page, as with a token.
    for headers in ({}, {"origin": corp.url}, {"origin": url, "sec-fetch-site": "cross-site"}):
        assert browser.post("/admin/v1/operations", json=body, headers=headers).status_code == 403
    assert service.known == {}
    good = {"origin": url, "sec-fetch-site": "same-origin"}
    assert browser.post("/admin/v1/operations", json=body, headers=good).status_code == 200
    caller = service.callers[-1]
    assert (caller.name, caller.role, caller.address) == ("corp:alice", Role.OPERATOR, "127.0.0.1")

    assert browser.delete("/session", headers=good).status_code == 204
    assert browser.get("/admin/v1/status").status_code == 401


@pytest.mark.parametrize(
    ("claims", "role"),
    [
        ({"groups": ["kf-viewers"]}, "viewer"),
        ({"groups": ["kf-viewers", "kf-operators"]}, "operator"),
        ({"groups": "kf-viewers"}, "viewer"),
        ({"groups": ["others", "KF-OPERATORS", 7, None, ["kf-operators"]]}, None),
        ({"groups": None}, None),
        ({"groups": {"kf-operators": True}}, None),
        ({"groups": ["admin", "operator"]}, None),
    ],
)
def test_roles_come_from_the_claim(
    browser: httpx.Client, corp: LocalProvider, claims: dict[str, object], role: str | None
) -> None:
    corp.claims = claims
    answer = browser.get(way_back(browser, corp))
    if role is None:
        is_refused(browser, answer, 403, "alice")
    else:
        assert browser.get("/session").json()["role"] == role


def test_nobody_gets_anything_by_default_and_claims_may_lie_deeper() -> None:
    claims = {
        "sub": "alice",
        "realm_access": {"roles": ["kf-operators"]},
        "https://x.example/roles": "kf-viewers",
    }
    with pytest.raises(LoginError):
        caller_of_claims(
            {**claims, "groups": ["kf-operators"]}, config("https://a", "https://b", roles=OidcRoles()), 1.0
        )
    deep = config("https://a", "https://b", roles_claim="realm_access.roles")
    assert caller_of_claims(claims, deep, 1.0) == Caller("corp:alice", Role.OPERATOR, expiry_unix_s=3601)
    dotted = config("https://a", "https://b", roles_claim="https://x.example/roles")
    assert caller_of_claims(claims, dotted, 1.0).role is Role.VIEWER
    with pytest.raises(LoginError):
        caller_of_claims(claims, config("https://a", "https://b", roles_claim="realm_access.roles.more"), 1.0)


@pytest.mark.parametrize("subject", [None, "", 7, "ä", "a\nb", "x" * 300])
def test_a_subject_that_the_audit_cannot_have_is_refused(subject: object) -> None:
    with pytest.raises(LoginError):
        caller_of_claims({"sub": subject, "groups": "kf-viewers"}, config("https://a", "https://b"), 1.0)


def test_a_name_is_shown_beside_the_subject_and_never_in_its_place() -> None:
    named = config("https://a", "https://b", name_claim="email")
    claims = {"sub": "auth0|1.2", "groups": "kf-viewers", "email": "Ælice\x00.x; @ex"}
    caller = caller_of_claims(claims, named, 1.0)
    assert caller.name == "corp:auth0|1.2 (Ælice.x; @ex)"
    # And it goes through the cookie as it is.
    cookie = auth.session_cookie(TOKEN, 1.0, caller)
    found = auth.caller_of_cookie(cookie, TOKEN, 2.0)
    assert found is not None
    assert msgspec.structs.replace(found, ids=()) == caller
    assert set(cookie) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-%~")
    assert len(caller_of_claims({**claims, "sub": "s" * 190, "email": "e" * 90}, named, 1.0).name) <= 200


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"nonce": "another login's"}, "could not be verified"),
        ({"nonce": None}, "could not be verified"),
        ({"aud": "another-client"}, "could not be verified"),
        ({"aud": ["another-client"]}, "could not be verified"),
        ({"aud": [CLIENT_ID, "another-client"]}, "could not be verified"),  # and no azp
        ({"azp": "another-client"}, "could not be verified"),
        ({"iss": "https://evil.example"}, "could not be verified"),
        ({"exp": int(time.time()) - 120, "iat": int(time.time()) - 500}, "has expired"),
        ({"exp": None}, "could not be verified"),
        ({"iat": int(time.time()) + 3600}, "could not be verified"),
        ({"nbf": int(time.time()) + 3600}, "could not be verified"),
        ({"sub": None}, "could not be verified"),
    ],
)
def test_a_token_that_is_not_for_this_login_lets_nobody_in(
    browser: httpx.Client, corp: LocalProvider, claims: dict[str, object], words: str
) -> None:
    corp.claims = claims
    is_refused(browser, browser.get(way_back(browser, corp)), 403, words)


def test_several_audiences_with_us_as_the_party_are_good(browser: httpx.Client, corp: LocalProvider) -> None:
    corp.claims = {"aud": ["another-client", CLIENT_ID], "azp": CLIENT_ID}
    assert browser.get(way_back(browser, corp)).status_code == 303


@pytest.mark.parametrize("header", [{}, {"kid": "unknown"}, {"alg": "none"}, {"alg": "HS256"}, {"crit": "x"}])
def test_a_signature_of_somebody_else_lets_nobody_in(
    browser: httpx.Client, corp: LocalProvider, header: dict[str, str]
) -> None:
    corp.signs, corp.header = SigningKey(kid=KEY.kid), header
    is_refused(browser, browser.get(way_back(browser, corp)), 403, "could not be verified")


def test_keys_are_rotated(browser: httpx.Client, corp: LocalProvider) -> None:
    assert browser.get(way_back(browser, corp)).status_code == 303
    browser.cookies.clear()
    fresh = SigningKey()
    corp.keys = [KEY, fresh]
    assert browser.get(way_back(browser, corp)).status_code == 303
    browser.cookies.clear()
    corp.keys, corp.signs = [fresh], KEY  # withdrawn, and somebody has it
    is_refused(browser, browser.get(way_back(browser, corp)), 403, "could not be verified")


def test_a_state_of_another_login_lets_nobody_in(
    browser: httpx.Client, corp: LocalProvider, server: tuple[str, MemoryService]
) -> None:
    """Somebody is sent a link with a code of somebody else, or goes back to a login that is over."""
    with httpx.Client(base_url=server[0], verify=False) as other:
        foreign = way_back(other, corp)
    is_refused(browser, browser.get(foreign), 400, "has not begun in this browser")
    own = way_back(browser, corp)
    is_refused(browser, browser.get(foreign), 400, "has not begun in this browser")
    is_refused(browser, browser.get(own), 400, "has not begun in this browser")  # its cookie is gone
    assert corp.token_requests == []
    own = way_back(browser, corp)
    is_refused(browser, browser.get(own + "x"), 400, "has not begun")
    for without in ("code", "state"):
        browser.cookies.clear()
        query = {
            k: v[0] for k, v in parse_qs(urlsplit(way_back(browser, corp)).query).items() if k != without
        }
        is_refused(browser, browser.get("/oidc/callback", params=query), 400, "has not begun")


def test_the_cookie_of_a_login_ends_and_cannot_be_made() -> None:
    cookie = login_cookie(TOKEN, "seed", 1000.0)
    login = login_of_cookie(cookie, TOKEN, 1599.0)
    assert login is not None
    assert len({login.state, login.nonce, login.verifier}) == 3
    assert len(login.verifier) == 43
    assert login_of_cookie(cookie, TOKEN, 1601.0) is None
    assert login_of_cookie(cookie, "other", 1000.0) is None
    assert login_of_cookie(cookie.replace("seed", "feed"), TOKEN, 1000.0) is None
    assert login_of_cookie(cookie.replace("1600", "9999"), TOKEN, 1000.0) is None
    assert login_of_cookie("", TOKEN, 1000.0) is None


def test_a_code_is_good_once(browser: httpx.Client, corp: LocalProvider) -> None:
    back = way_back(browser, corp)
    cookie = browser.cookies[LOGIN_COOKIE]
    assert browser.get(back).status_code == 303
    browser.cookies.clear()
    answer = browser.get(back, headers={"cookie": f"{LOGIN_COOKIE}={cookie}"})
    is_refused(browser, answer, 502, "(invalid_grant)")


def test_the_provider_says_no(browser: httpx.Client, corp: LocalProvider) -> None:
    state = parse_qs(urlsplit(way_back(browser, corp)).query)["state"][0]
    query = {"state": state, "error": "access_denied", "error_description": "<script>"}
    answer = browser.get("/oidc/callback", params=query)
    is_refused(browser, answer, 403, "did not let you in (access_denied)")
    assert "<script>" not in answer.text
    state = parse_qs(urlsplit(way_back(browser, corp)).query)["state"][0]
    answer = browser.get("/oidc/callback", params={"state": state, "error": "<b>call 555</b>"})
    is_refused(browser, answer, 403, "no reason given")
    assert "555" not in answer.text


@pytest.mark.parametrize(
    ("path", "answer", "status"),
    [
        ("/token", (500, b"{}"), 503),
        ("/token", (400, b'{"error": "invalid_grant"}'), 502),
        ("/token", (401, b"no JSON"), 502),
        ("/token", (200, b"[]"), 502),
        ("/token", (200, b"5"), 502),
        ("/token", (200, b'{"access_token": "x"}'), 502),
        ("/token", (200, b'{"id_token": "a.b.c"}'), 403),
        ("/token", (302, b""), 502),
        ("/token", (200, b" " * (asking.ANSWER_BYTES_MAX + 1)), 503),
        ("/jwks", (503, b""), 503),
        ("/jwks", (200, b'{"keys": []}'), 403),
        ("/jwks", (200, b'{"keys": [{"kty": "RSA"}, {"kty": "oct", "k": "AA"}, {}]}'), 403),
        ("/jwks", (200, b'{"keys": [5]}'), 502),
        ("/jwks", (200, b"[" * 100_000), 502),
    ],
)
def test_nonsense_of_a_provider_is_a_page(
    browser: httpx.Client, corp: LocalProvider, path: str, answer: tuple[int, bytes], status: int
) -> None:
    back = way_back(browser, corp)
    corp.broken[path] = answer
    is_refused(browser, browser.get(back), status, "Not signed in")


def test_a_discovery_document_that_is_wrong(corp: LocalProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "REST_S", 0.0)
    with (
        serving(MemoryService(), provider=signing_in(corp)) as url,
        httpx.Client(base_url=url, verify=False) as client,
        structlog.testing.capture_logs() as logs,
    ):
        for metadata in (
            {"issuer": "https://somebody.else"},
            {"token_endpoint": "http://login.example/token"},
            {"jwks_uri": 5},
            {"authorization_endpoint": "javascript:alert(1)"},
        ):
            corp.metadata = metadata
            is_refused(client, client.get("/oidc/login"), 502, "does not answer as it should")
            assert [line["cause"] for line in logs if line["event"] == "not signed in"].pop()
        corp.metadata = {}
        assert client.get("/oidc/login").status_code == 303


def test_the_secret_goes_as_the_provider_wants_it(corp: LocalProvider) -> None:
    corp.metadata = {"token_endpoint_auth_methods_supported": ["client_secret_post", "client_secret_basic"]}
    with (
        serving(MemoryService(), provider=signing_in(corp)) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        assert client.get(way_back(client, corp)).status_code == 303
    assert corp.token_requests[-1]["client_secret"] == CLIENT_SECRET


def test_an_issuer_in_the_answer_has_to_be_ours(corp: LocalProvider) -> None:
    corp.metadata = {"authorization_response_iss_parameter_supported": True}
    with (
        serving(MemoryService(), provider=signing_in(corp)) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        is_refused(client, client.get(way_back(client, corp)), 400, "did not come from")
        is_refused(
            client, client.get(f"{way_back(client, corp)}&iss=https://evil.example"), 400, "did not come from"
        )
        assert client.get(f"{way_back(client, corp)}&iss={corp.url}").status_code == 303


def test_a_provider_that_is_down_is_a_page_and_tokens_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with provider() as gone:
        pass
    monkeypatch.setattr(asking, "REST_S", 0.0)
    with (
        serving(MemoryService(), provider=signing_in(gone)) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        with structlog.testing.capture_logs() as logs:
            answer = client.get("/oidc/login")
        is_refused(client, answer, 503, "tokens go on working")
        assert answer.headers["retry-after"] == "2"
        assert "style-src 'self'" in answer.headers["content-security-policy"]
        assert any("ConnectError" in line.get("cause", "") for line in logs)
        assert client.post("/session", json={"token": TOKEN}).status_code == 204
        assert client.get("/admin/v1/status").status_code == 200


def test_a_provider_that_is_down_is_not_asked_by_every_click(
    corp: LocalProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    discovery = asking.DISCOVERY
    corp.broken[discovery] = (500, b"")
    with (
        serving(MemoryService(), provider=signing_in(corp)) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        monkeypatch.setattr(asking, "REST_S", 600.0)
        for _ in range(5):
            is_refused(client, client.get("/oidc/login"), 503, "does not answer")
        assert corp.asked_for.count(discovery) == 1
        monkeypatch.setattr(asking, "REST_S", 0.0)
        corp.broken.clear()
        for _ in range(3):
            assert client.get("/oidc/login").status_code == 303
        assert corp.asked_for.count(discovery) == 2


def test_logins_at_a_time_are_bounded(
    browser: httpx.Client, corp: LocalProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "LOGINS_MAX", 0)
    is_refused(browser, browser.get(way_back(browser, corp)), 503, "Too many people")


def test_an_address_that_the_provider_does_not_know_is_told(
    browser: httpx.Client, server: tuple[str, MemoryService]
) -> None:
    for host in ("evil.example", "127.0.0.1:1", "[::1", ""):
        answer = browser.get("/oidc/login", headers={"host": host} if host else {"host": "x"})
        is_refused(browser, answer, 400, server[0])


def test_cookies_are_for_https_alone_where_the_dashboard_is(corp: LocalProvider) -> None:
    """Also behind a proxy that ends TLS."""
    https = ("https://admin.example/oidc/callback",)
    with (
        serving(MemoryService(), provider=signing_in(corp, redirect_urls=https)) as url,
        httpx.Client(base_url=url, headers={"host": "admin.example"}, verify=False) as client,
    ):
        begun = client.get("/oidc/login")
        assert "; secure" in begun.headers["set-cookie"].lower()
        sent = {
            name: values[0] for name, values in parse_qs(urlsplit(begun.headers["location"]).query).items()
        }
        assert sent["redirect_uri"] == https[0]
        cookie = begun.headers["set-cookie"].partition(";")[0]
        back = urlsplit(corp.authorize(sent))
        ended = client.get(f"{url}{back.path}?{back.query}", headers={"cookie": cookie})
        assert ended.status_code == 303
        session = next(text for text in ended.headers.get_list("set-cookie") if text.startswith(auth.COOKIE))
        assert "; secure" in session.lower()


def test_neither_secret_nor_code_nor_token_is_logged(browser: httpx.Client, corp: LocalProvider) -> None:
    with structlog.testing.capture_logs() as logs:
        browser.get(way_back(browser, corp))
        corp.claims = {"nonce": "x"}
        browser.get(way_back(browser, corp))
    told = json.dumps(logs, default=str)
    assert '"who": "corp:alice"' in told
    (first, second) = corp.token_requests
    for secret in (
        CLIENT_SECRET,
        first["code"],
        second["code"],
        first["code_verifier"],
        browser.cookies[auth.COOKIE],
    ):
        assert secret not in told
    assert CLIENT_SECRET not in repr(Oidc(config("https://a", "https://b"), client_secret=CLIENT_SECRET))


def test_a_stream_ends_with_its_session(corp: LocalProvider) -> None:
    """Who may no longer read is not told on and on."""
    with serving(MemoryService()) as url, httpx.Client(base_url=url, timeout=20, verify=False) as client:
        soon = Caller("corp:alice", Role.VIEWER, expiry_unix_s=int(time.time()) + 2)
        client.cookies.set(auth.COOKIE, auth.session_cookie(TOKEN, time.time(), soon))
        with client.stream("GET", "/admin/v1/stream") as answer:
            assert answer.status_code == 200
            for _ in answer.iter_bytes():
                assert time.time() < soon.expiry_unix_s + 15
        assert time.time() >= soon.expiry_unix_s - 1
        assert client.get("/admin/v1/stream").status_code == 401


def test_without_a_provider_there_is_no_login() -> None:
    with serving(MemoryService()) as url, httpx.Client(base_url=url, verify=False) as client:
        assert client.get("/oidc").json() == {"provider": ""}
        for path in ("/oidc/login", "/oidc/callback?code=x&state=y"):
            assert client.get(path).status_code == 404


# ---- settings

GOOD = """
issuer = "https://login.example/realms/main"
client_id = "kevlarflow"
client_secret_file = "oidc-secret"
redirect_urls = ["https://h1.example:8100/oidc/callback", "https://h2.example/oidc/callback"]
[roles]
operator = ["kf operators"]
"""


def written(folder: Path, text: str, secret: str = "shh", mode: int = 0o600) -> Path:
    (folder / "oidc-secret").write_text(f"{secret}\n")
    (folder / "oidc-secret").chmod(mode)
    (folder / "oidc.toml").write_text(text)
    (folder / "oidc.toml").chmod(0o644)
    return folder / "oidc.toml"


def test_the_file_of_settings(tmp_path: Path) -> None:
    assert load_oidc(tmp_path / "oidc.toml") is None
    with pytest.raises(ConfigError, match="there is no"):
        load_oidc(tmp_path / "oidc.toml", required=True)
    found = load_oidc(written(tmp_path, GOOD))
    assert found is not None
    assert (found.client_secret, found.config.session_s, found.config.roles_claim) == ("shh", 3600, "groups")
    assert found.config.roles.best(frozenset({"kf operators"})) is Role.OPERATOR
    first, second = found.config.redirect_urls
    for host, url in (
        ("h1.example:8100", first), ("H1.example:8100", first), ("h1.example", None), ("h2.example:443", second),
        ("h2.example", second), ("h2.example:80", None), ("h2.example.evil", None), ("", None), ("[", None),
    ):  # fmt: skip
        assert found.config.redirect_url(host) == url, host


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('issuer = "https', 'issuer = "http', "loopback only"),
        ('issuer = "https', 'issuer = "ftp', "https://HOST"),
        ("login.example/realms/main", "user@login.example", "without a user"),
        ("login.example/realms/main", "login.example/?a=b", "a query"),
        ("login.example/realms/main", "login.example:99999", "ort"),
        ('client_id = "kevlarflow"', 'client_id = ""', "client_id"),
        ('client_id = "kevlarflow"', "", "client_id"),
        ('["https://h1.example:8100/oidc/callback"', '["https://h1.example:8100/back"', "/oidc/callback"),
        ('["https://h1', '["http://h1', "loopback only"),
        ("redirect_urls", "redirect_urls = [] #", "redirect_urls"),
        ("[roles]", 'scopes = ["email"]\n[roles]', "openid"),
        ("[roles]", "session_s = 5\n[roles]", "session_s = 5"),
        ("[roles]", "session_s = 86400\n[roles]", "43,200"),
        ("[roles]", 'provider = "a:b"\n[roles]', "provider"),
        ("[roles]", 'secret = "x"\n[roles]', "secret"),
        ('operator = ["kf operators"]', 'admin = ["kf operators"]', "admin"),
        ('operator = ["kf operators"]', 'operator = [""]', "operator"),
        ('operator = ["kf operators"]', 'operator = "kf operators"', "operator"),
        ("issuer =", "issuer", "line 2"),
    ],
)
def test_settings_that_cannot_be_are_told_in_words(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        load_oidc(path)
    assert str(path) in str(raised.value)


def test_files_that_others_could_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        load_oidc(written(tmp_path, GOOD, mode=0o644))
    for secret in ("", "a\nb", "x" * 5000, "ä"):
        with pytest.raises(ConfigError, match="client_secret_file"):
            load_oidc(written(tmp_path, GOOD, secret))
    path = written(tmp_path, GOOD)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod go-w"):
        load_oidc(path)
    path.chmod(0o600)
    (tmp_path / "oidc-secret").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*oidc-secret"):
        load_oidc(path)


def test_authorities_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no PEM")
    with pytest.raises(ConfigError, match="ca_file"):
        Provider(Oidc(config("https://a", "https://b"), tmp_path / "ca.pem"))
