"""The admin API over real HTTP: who may, what comes back, and the bounds of the live stream."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

import web.ui
from controlplane.contract.events import Event, EventKind
from controlplane.contract.status import NodeState
from tests.web.admin_service import BEARER, TOKEN, MemoryService, drain, healthy
from tests.web.schemathesis_run import check_by_document
from web.admin import app, auth, feed
from web.admin.static import load_files

NEEDS_TOKEN = [
    ("GET", "/metrics"),
    ("GET", "/admin/v1/status"),
    ("GET", "/admin/v1/events"),
    ("GET", "/admin/v1/incidents"),
    ("GET", "/admin/v1/protection"),
    ("GET", "/admin/v1/figures"),
    ("GET", "/admin/v1/audit"),
    ("GET", "/admin/v1/requests?id=x"),
    ("GET", "/admin/v1/settings"),
    ("GET", "/admin/v1/operations"),
    ("POST", "/admin/v1/operations"),
    ("DELETE", "/admin/v1/operations/x"),
    ("POST", "/admin/v1/credentials"),
    ("GET", "/admin/v1/stream"),
    ("GET", "/session"),
    ("DELETE", "/session"),
    ("GET", "/no/such/path"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
]


@pytest.mark.parametrize(("method", "path"), NEEDS_TOKEN)
def test_nothing_works_without_the_token(client: httpx.Client, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == 401
    for cookie in ("", "junk", "9999999999.", f"9999999999.{'0' * 64}", "é.x"):
        sent = {b"cookie": f"{auth.COOKIE}={cookie}".encode()}
        assert client.request(method, path, headers=sent).status_code == 401


def test_open_paths_say_nothing_about_the_cluster(client: httpx.Client, service: MemoryService) -> None:
    assert client.get("/livez").text == "ok\n"
    assert client.get("/readyz").status_code == 200
    service.cluster = msgspec.structs.replace(service.cluster, troubles=("operations/x cannot be read",))
    wrong = ({}, {"authorization": "Bearer wrong"}, {"cookie": f"{auth.COOKIE}=junk"})
    assert {client.get("/readyz", headers=headers).text for headers in wrong} == {"ok\n"}
    assert client.get("/readyz", headers=BEARER).text == "ok\noperations/x cannot be read\n"
    service.ready = False
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    page = client.get("/")
    assert page.status_code == 200
    assert '<script type="module" src="/ui/app.js">' in page.text


def test_headers_that_keep_a_page_honest(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    status = client.get("/admin/v1/status", headers=BEARER)
    assert status.headers["cache-control"] == "no-store"
    assert status.headers["x-content-type-options"] == "nosniff"


def test_the_page_has_no_inline_code_and_no_foreign_address() -> None:
    files = load_files()
    page = files["index.html"].body.decode()
    assert page.count("<script") == page.count('<script type="module" src="/ui/')
    assert "style=" not in page
    ours = {name: file.body.decode() for name, file in files.items() if not name.startswith("vendor/")}
    for name, text in ours.items():
        assert "https://" not in text, name
    assert {"app.js", "view.js", "format.js", "style.css", "vendor/preact.js", "vendor/htm.js"} <= set(files)
    assert not any(name.endswith(".py") for name in files)


@pytest.mark.parametrize("path", ["../app.py", "%2e%2e/admin/app.py", "__init__.py", "vendor", "nothing.js"])
def test_only_the_pages_own_files_are_served(client: httpx.Client, path: str) -> None:
    assert client.get(f"/ui/{path}").status_code in {401, 404}


def test_every_vendored_file_has_its_licence() -> None:
    vendor = Path(web.ui.__file__).parent / "vendor"
    for module in vendor.glob("*.js"):
        assert module.with_suffix(".LICENSE").is_file()
        assert module.name in (vendor / "README.md").read_text()


def test_reads(client: httpx.Client, service: MemoryService) -> None:
    service.history = [Event(EventKind.DIED, "n1", f"event {i}", details={"silent_s": 0.2}) for i in range(5)]
    status = client.get("/admin/v1/status", headers=BEARER).json()
    assert status["leader"] == "c1"
    assert len(status["nodes"]) == 8
    events = client.get("/admin/v1/events?limit=2", headers=BEARER).json()["events"]
    assert [event["id"] for event in events] == [4, 5]
    assert events[0]["kind"] == "died"
    assert events[0]["details"] == {"silent_s": 0.2}
    assert len(client.get("/admin/v1/events?after=4", headers=BEARER).json()["events"]) == 1
    assert b"kevlarflow_epoch" in client.get("/metrics", headers=BEARER).content


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=100000", "after=-1", f"after={2**70}"])
def test_bad_queries_are_refused_in_words(client: httpx.Client, query: str) -> None:
    answer = client.get(f"/admin/v1/events?{query}", headers=BEARER)
    assert answer.status_code == 400
    assert query.split("=")[0] in answer.json()["error"]["message"]


def test_a_database_that_is_away_is_503(client: httpx.Client, service: MemoryService) -> None:
    service.history_away = True
    answer = client.get("/admin/v1/events", headers=BEARER)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert client.get("/admin/v1/status", headers=BEARER).status_code == 200


def test_operations(client: httpx.Client, service: MemoryService) -> None:
    client.headers.update(BEARER)
    dry = client.post("/admin/v1/operations", json=drain("n2", dry_run=True))
    assert (dry.status_code, dry.json()["accepted"]) == (200, False)
    assert dry.json()["plan"] == ["cordon n2"]
    assert service.known == {}

    first = client.post("/admin/v1/operations", json=drain("n2"))
    assert (first.status_code, first.json()["accepted"]) == (200, True)
    again = client.post("/admin/v1/operations", json=drain("n2"))
    assert again.json()["operation"] == first.json()["operation"]
    assert len(client.get("/admin/v1/operations").json()["operations"]) == 1

    refused = client.post("/admin/v1/operations", json=drain("n0", "op-2"))
    assert refused.status_code == 409
    assert refused.json()["checks"][0]["level"] == "fail"

    assert client.delete("/admin/v1/operations/op-1").json()["state"] == "cancelled"
    assert client.delete("/admin/v1/operations/op-1").status_code == 200
    assert client.delete("/admin/v1/operations/nope").status_code == 404


@pytest.mark.parametrize("kind", ["pause", "resume", "transfer-leader", "scale"])
def test_operations_about_the_group_name_no_node(
    client: httpx.Client, service: MemoryService, kind: str
) -> None:
    answer = client.post("/admin/v1/operations", json={"id": "op", "kind": kind}, headers=BEARER)
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (200, kind)


def test_the_quorum_is_told(client: httpx.Client, service: MemoryService) -> None:
    answer = client.get("/admin/v1/quorum", headers=BEARER)
    assert answer.json()["checks"][0]["level"] == "ok"
    assert client.get("/admin/v1/quorum").status_code == 401


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "truncated"),
        (b"[]", "object"),
        (json.dumps(drain("n1") | {"kind": "explode"}).encode(), "kind"),
        (json.dumps(drain("n/1")).encode(), "node"),
        (json.dumps(drain("n1", "../x")).encode(), "id"),
        (json.dumps(drain("n1") | {"force": True}).encode(), "force"),
        (json.dumps({"id": "a", "kind": "drain"}).encode(), "node"),
        (json.dumps({"id": "a", "kind": "restart"}).encode(), "node"),
        (json.dumps({"id": "a", "kind": "pause", "node": "n/1"}).encode(), "node"),
        (json.dumps(drain("n1", substitute="a b")).encode(), "substitute"),
    ],
)
def test_bad_operations_are_refused_in_words(client: httpx.Client, body: bytes, word: str) -> None:
    answer = client.post("/admin/v1/operations", content=body, headers=BEARER)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_a_huge_body_is_cut_off(client: httpx.Client) -> None:
    answer = client.post("/admin/v1/operations", content=b" " * 100_000, headers=BEARER)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b'{"token":"\xff"}',
        b'{"x":' + b"[" * 30_000,
        b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b',"token":"a"}',
    ],
)
def test_no_body_of_a_stranger_is_a_defect_of_ours(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/session", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
    assert client.post("/admin/v1/operations", content=body, headers=BEARER).status_code == 400


def test_a_body_that_does_not_come_is_not_waited_for(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.2)
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=5) as connection:
        connection.sendall(b"POST /session HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_wrong_method_is_told_the_right_one(client: httpx.Client) -> None:
    answer = client.put("/admin/v1/status", headers=BEARER)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    answer = client.put("/admin/v1/operations", headers=BEARER)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/", "/metrics", "/admin/v1/status", "/admin/v1/events"]
)
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    get, head = client.get(path, headers=BEARER), client.head(path, headers=BEARER)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/admin/v1/status").status_code == 401


def test_head_of_the_stream_ends(client: httpx.Client) -> None:
    head = client.head("/admin/v1/stream", headers=BEARER)
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


def test_paths_and_options(client: httpx.Client) -> None:
    assert client.get(f"{client.base_url}//admin/v1//status/", headers=BEARER).status_code == 200
    assert client.get(f"{client.base_url}//admin/v1//status/").status_code == 401
    answer = client.options("/admin/v1/operations", headers={"origin": "https://a.example"})
    assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    assert not any("access-control" in name for name in answer.headers)


def test_the_openapi_document(client: httpx.Client) -> None:
    text = client.get("/openapi.json", headers=BEARER).text
    document = json.loads(text)
    schemas = document["components"]["schemas"]
    assert {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]} <= set(schemas)
    assert "deadline_s" in schemas["OperationRequest"]["properties"]
    for path, methods in document["paths"].items():
        concrete = path.replace("{operation_id}", "x").replace("{path}", "x")
        allow = client.options(concrete).headers["allow"].split(", ")
        assert {m.upper() for m in methods} == set(allow), path
        for method, operation in methods.items():
            answers = set(operation["responses"])
            if method == "options":
                assert "204" in answers
                continue
            assert {"400", "405", "500", "503"} <= answers
            assert ("401" in answers) == (bool(operation["security"]) or path == "/session"), path
            if method == "get" and "{" not in path and path != "/admin/v1/stream":
                answer = client.get(path, headers=BEARER)
                assert str(answer.status_code) in answers
                media = answer.headers["content-type"].partition(";")[0]
                assert media in operation["responses"][str(answer.status_code)]["content"], path
    assert "requestBody" in document["paths"]["/admin/v1/operations"]["post"]
    assert client.get("/openapi.json").status_code == 401


@pytest.mark.timeout(450)  # 20 s on two quiet cores
def test_schemathesis_finds_nothing(server: tuple[str, MemoryService], tmp_path: Path) -> None:
    server[1].reset()
    endless = ("--exclude-path", "/admin/v1/stream")  # each try would take as long as its patience
    asyncio.run(check_by_document(server[0], TOKEN, 5, 69, tmp_path, *endless))


def test_compressed_bodies(client: httpx.Client) -> None:
    for coding, encode in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        body = encode(json.dumps({"token": TOKEN}).encode())
        answer = client.post("/session", content=body, headers={"content-encoding": coding})
        assert answer.status_code == 204
        bomb = client.post("/session", content=encode(b" " * (1 << 20)), headers={"content-encoding": coding})
        assert bomb.status_code == 413
    other = client.post("/session", content=b"x", headers={"content-encoding": "br"})
    assert (other.status_code, "br" in other.json()["error"]["message"]) == (415, True)
    assert other.headers["accept-encoding"] == "gzip, deflate, identity"


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "Bearer  "])
def test_the_scheme_of_a_token_has_no_case(client: httpx.Client, scheme: str) -> None:
    assert client.get("/session", headers={"authorization": scheme + TOKEN}).json()["name"] == "admin"
    assert client.get("/session", headers={"authorization": f"{scheme}wrong"}).status_code == 401
    assert client.get("/session", headers={"authorization": f"{scheme.strip()}{TOKEN}"}).status_code == 401


def test_a_body_may_begin_with_a_mark_of_its_encoding(client: httpx.Client) -> None:
    body = json.dumps({"token": TOKEN}).encode("utf-8-sig")
    assert client.post("/session", content=body).status_code == 204
    assert client.post("/session", content=body[:3] + body).status_code == 400


@pytest.mark.parametrize("path", ["/ui", "/ui/", "//ui", "/ui//", "/%75i", "/ui%2f", "/ui/index.html"])
def test_the_page_is_found_in_its_folder(client: httpx.Client, path: str) -> None:
    for headers in ({}, BEARER):
        get = client.get(f"{client.base_url}{path}", headers=headers)
        head = client.head(f"{client.base_url}{path}", headers=headers)
        assert (get.status_code, head.status_code) == (200, 200)
        assert get.content == load_files()["index.html"].body
        assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("path", ["/ui/.", "/ui/%2e", "/ui/%2e%2e/x", "/oidc/", "/admin/v1", "/admin/"])
def test_nothing_sends_anybody_round_in_circles(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers=BEARER)
    assert answer.status_code in {200, 404}
    assert "location" not in answer.headers


def stream(client: httpx.Client, query: str = "") -> Generator[tuple[str, object], None, None]:
    with client.stream("GET", f"/admin/v1/stream{query}", headers=BEARER) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def test_the_stream_tells_status_and_events_as_they_come(
    client: httpx.Client, service: MemoryService
) -> None:
    service.history = [Event(EventKind.JOINED, "n1", "one"), Event(EventKind.DIED, "n1", "two")]
    seen: list[int] = []
    statuses = 0
    started = time.monotonic()
    told_away = told_back = False
    for name, data in stream(client):
        match name, data:
            case (("status" | "difference"), dict()):
                statuses += 1
            case "events", list():
                seen += [row["id"] for row in data]
                if seen == [1, 2]:
                    service.history.append(Event(EventKind.RECOVERED, "p0", "three"))
                if seen == [1, 2, 3]:
                    service.history_away = True
            case "history", {"error": str() as error}:
                told_away = told_away or bool(error)
                told_back = told_away and not error
                service.history_away = False
        if told_back and statuses >= 4:
            break
        assert time.monotonic() - started < 10
    assert seen == [1, 2, 3]
    # No faster than promised, however much happens.
    assert statuses <= (time.monotonic() - started) / feed.PERIOD_S + 2


def test_the_whole_comes_once_and_then_what_changed(client: httpx.Client, service: MemoryService) -> None:
    service.cluster = healthy(250, 4)
    whole: dict[str, Any] = {}
    for name, data in stream(client):
        if name == "status":
            assert isinstance(data, dict)
            assert not whole or len(whole["nodes"]) != 1000, "the whole was sent twice"
            whole = data
            if len(whole["nodes"]) == 1000:
                dead = msgspec.structs.replace(
                    service.cluster.nodes[500], state=NodeState.RED, evidence="gone"
                )
                nodes = (*service.cluster.nodes[:500], dead, *service.cluster.nodes[501:])
                service.cluster = msgspec.structs.replace(service.cluster, nodes=nodes, counter=13)
        elif name == "difference" and len(whole["nodes"]) == 1000:
            assert isinstance(data, dict)
            assert (data["from"], data["to"]) == (whole["version"], whole["version"] + 1)
            whole["version"] = data["to"]
            assert len(data["nodes"]) <= 1
            if data["nodes"]:
                assert (data["nodes"][0]["node"], data["nodes"][0]["state"]) == (dead.node, "red")
                assert data["fields"]["counter"] == 13
                assert data["pipelines"] == []
                assert len(json.dumps(data)) < 2000
                break


def test_the_stream_resumes_where_a_client_was(client: httpx.Client, service: MemoryService) -> None:
    service.history = [Event(EventKind.JOINED, "n1", str(number)) for number in range(4)]
    for name, data in stream(client, "?after=3"):
        if name == "events":
            assert isinstance(data, list)
            assert [row["id"] for row in data] == [4]
            break


def test_the_number_of_streams_is_bounded(
    client: httpx.Client, service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "CLIENTS_MAX", 2)
    open_streams: list[Generator[tuple[str, object], None, None]] = []
    deadline = time.monotonic() + 5
    while len(open_streams) < 2:  # earlier tests' clients may just be leaving
        assert time.monotonic() < deadline
        with contextlib.suppress(AssertionError):
            item = stream(client)
            assert next(item)[0] == "status"
            open_streams.append(item)
    refused = client.get("/admin/v1/stream", headers=BEARER)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    for item in open_streams:
        item.close()
    deadline = time.monotonic() + 5
    while True:  # the places of clients that left are free again
        with client.stream("GET", "/admin/v1/stream", headers=BEARER) as answer:
            if answer.status_code == 200:
                break
        assert time.monotonic() < deadline


def test_streams_opened_in_one_moment_are_bounded_too(
    client: httpx.Client, service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "CLIENTS_MAX", 3)
    ask = f"GET /admin/v1/stream HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        address = (client.base_url.host, client.base_url.port or 0)
        connections = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(30)]
        for connection in connections:
            connection.sendall(ask)
        answers = [connection.recv(13).split()[1] for connection in connections]
    # Fewer when clients of an earlier test are just leaving.
    assert 0 < answers.count(b"200") <= 3
    assert answers.count(b"200") + answers.count(b"503") == 30


# ---- roles


def test_passwords_are_not_told(client: httpx.Client, service: MemoryService) -> None:
    url = "postgresql+asyncpg://kf:pa:ss@db.example:5432/kf?password=pass2"
    service.config = msgspec.structs.replace(service.config, database_url=url)
    answer = client.get("/admin/v1/settings", headers=BEARER)
    assert answer.json()["database_url"] == "postgresql+asyncpg://kf:***@db.example:5432/kf"
    assert "pass2" not in answer.text
    assert "pa:ss" not in answer.text


def test_a_reason_has_a_bound_and_an_epoch_is_a_number(client: httpx.Client) -> None:
    unshowable = [{"reason": f"a{char}b"} for char in "\x1b\x07\r\x7f\x9b\u202e"]
    for more in ({"reason": "x" * 501}, {"if_epoch": "12"}, *unshowable):
        body = drain("n2", "op-1", **more)
        assert client.post("/admin/v1/operations", json=body, headers=BEARER).status_code == 400
    refused = client.post("/admin/v1/operations", json=drain("n2", if_epoch=11), headers=BEARER)
    assert (refused.status_code, refused.json()["checks"][0]["name"]) == (409, "epoch")
    body = drain("n2", reason="its f\u00e4n\tis loud\nagain \U0001f468\u200d\U0001f527\n")
    assert client.post("/admin/v1/operations", json=body, headers=BEARER).status_code == 200
