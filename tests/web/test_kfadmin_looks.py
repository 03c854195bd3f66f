"""kfadmin's verbs that look, in every form; contexts, tokens, the support bundle; who answers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import yaml
from typer.testing import CliRunner, Result

from controlplane.contract.api_keys import KeyLimits, make_key
from controlplane.contract.audit import Action, AuditEntry
from controlplane.contract.auth import Role, derive, identify, load_secret, mint
from controlplane.contract.config import ClusterConfig
from controlplane.contract.events import Event, EventKind
from controlplane.contract.lives import Life, Pause, Place
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.kfadmin import bundle, exits
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.formats import Output, to_yaml
from controlplane.kfadmin.main import app
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import Endpoints, RunDir
from tests.web.admin_service import TOKEN, MemoryService, serving
from web.admin.auth import COOKIE, session_cookie

DIED = Event(
    EventKind.DIED, "n1", "n1 died: link broken", 100.0,
    details={"incarnation": "aaaa", "evidence": "link broken", "silent_s": 0.5},
)  # fmt: skip
EPOCH = Event(EventKind.EPOCH, "p0", "p0: stage 1: n1 -> n5", 100.1, 13, {"died": "n1@aaaa", "plan_s": 0.125})
RECOVERED = Event(
    EventKind.RECOVERED, "p0", "p0 serves again", 101.0, 13,
    {"connect_s": 0.25, "restore_s": 0.375, "first_token_s": 0.5, "requests": 7, "seen_unix_s": 100.25},
)  # fmt: skip
ENTRY = AuditEntry(
    1, 1.7e9, Action.DONE, "op-1", "drain", "n2", "", "it is empty", "disk fails", "alice", "operator",
    "10.0.0.7", 12, 15, "c1",
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, MemoryService]]:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
    service = MemoryService()
    with serving(service) as url:
        yield url, service
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def contexts_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("KF_CONTEXT", "KF_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_CONTEXTS", str(tmp_path / "config" / "contexts.json"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "config" / "contexts.json"


@pytest.fixture
def service(server: tuple[str, MemoryService]) -> MemoryService:
    server[1].reset()
    server[1].history = [DIED, EPOCH, RECOVERED]
    server[1].audited = [ENTRY]
    server[1].known["op-7"] = Operation("op-7", OperationKind.DRAIN, "n1", message="moving p0/1 to n5")
    return server[1]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def target(server: tuple[str, MemoryService], service: MemoryService, token: Path) -> list[str]:
    return ["--admin", server[0], "--token-file", str(token)]


def kfadmin(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def looked_at(service: MemoryService, times: int = 1) -> None:
    """Wait until kfadmin has asked so often."""
    deadline = time.monotonic() + 20
    while service.looks < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # the answer is on its way


# ---- every verb in every form

LOOKS = {
    ("status",): ["test"],
    ("nodes",): [f"n{k}" for k in range(8)],
    ("topology",): ["p0", "p1"],
    ("events",): ["1", "2", "3"],
    ("incidents",): ["1"],
    ("protection",): [f"n{k}" for k in range(8)],
    ("audit",): ["1"],
    ("operations", "list"): ["op-7"],
    ("describe", "node", "n1"): ["n1"],
    ("describe", "pipeline", "p0"): ["p0"],
    ("config", "show"): [field.name for field in msgspec.structs.fields(ClusterConfig)],
    ("check", "quorum"): ["etcd"],
}


@pytest.mark.parametrize("verb", LOOKS, ids=" ".join)
def test_every_verb_in_every_form(target: list[str], verb: tuple[str, ...]) -> None:
    said = {form: kfadmin(*verb, "-o", form.value, *target) for form in Output}
    assert {form: result.exit_code for form, result in said.items()} == dict.fromkeys(Output, 0)
    whole = json.loads(said[Output.JSON].stdout)
    assert yaml.safe_load(said[Output.YAML].stdout) == whole
    assert said[Output.NAME].stdout.splitlines() == LOOKS[verb]
    lines = [json.loads(line) for line in said[Output.JSONL].stdout.splitlines()]
    assert lines
    assert lines == whole if isinstance(whole, list) else all(isinstance(line, dict) for line in lines)
    for form in (Output.TABLE, Output.WIDE):
        assert said[form].stdout.strip()


@pytest.mark.parametrize("verb", ["nodes", "topology", "incidents", "protection", "audit", "operations list"])
def test_wide_tables_have_more(target: list[str], verb: str) -> None:
    narrow, wide = (kfadmin(*verb.split(), "-o", form, *target).stdout.split() for form in ("table", "wide"))
    assert len(wide) > len(narrow)


def test_an_incident_is_one_row(target: list[str]) -> None:
    header, row = kfadmin("incidents", *target).stdout.splitlines()
    assert header.split()[:4] == ["ID", "BEGAN", "NODE", "DETECT"]
    columns = row.split()
    assert columns[3:9] == ["n1", "0.500", "0.125", "0.250", "0.375", "0.500"]
    assert columns[9:11] == ["1.875", "7"]
    assert row.rstrip().endswith("p0: stage 1: n1 -> n5")


def test_who_did_what(target: list[str]) -> None:
    row = kfadmin("audit", *target).stdout.splitlines()[1]
    for word in ("alice", "10.0.0.7", "done", "drain n2", "12 -> 15", "disk fails", "it is empty"):
        assert word in row
    (line,) = kfadmin("audit", "-o", "jsonl", *target).stdout.splitlines()
    assert msgspec.json.decode(line, type=AuditEntry) == ENTRY
    assert kfadmin("audit", "--operation", "op-2", "-o", "json", *target).stdout.strip() == "[]"


def test_a_description_has_what_happened_and_is_under_way(target: list[str], service: MemoryService) -> None:
    told = kfadmin("describe", "node", "n1", *target).stdout
    for word in ("p0/1", "4001", "op-7", "moving p0/1 to n5", "n1 died: link broken", "ranks lost"):
        assert word in told
    value = json.loads(kfadmin("describe", "pipeline", "p0", "-o", "json", *target).stdout)
    assert [row["event"]["kind"] for row in value["events"]] == ["epoch", "recovered"]
    assert value["incidents"][0]["node"] == "n1"
    assert value["operations"][0]["id"] == "op-7"
    for verb in ("node", "pipeline"):
        result = kfadmin("describe", verb, "x9", *target)
        assert (result.exit_code, f"there is no {verb} x9" in result.stderr) == (2, True)


def test_the_life_of_a_request_is_told_in_order(target: list[str], service: MemoryService) -> None:
    place = Place(0.002, 0, "p0", "n0", 12)
    pause = Pause(1.5, 0.4, 0, "continued", "p0", 13, "failure of p0, epoch 12 -> 13: stage 1: n1 -> n5")
    service.lived = [
        Life(
            "abc", "g1", "chat", "alice", "m", True, False, 1, 7, 1.7e9, 0.002, 0.05, 3.0, 64, 200, "length",
            (place,), (pause,), 0, 0.4,
        )
    ]  # fmt: skip
    said = kfadmin("describe", "request", "chatcmpl-abc", *target)
    assert said.exit_code == 0
    order = (
        "key alice",
        "admitted",
        "to the scheduler on n0",
        "first token",
        "pause, continued",
        "end, HTTP 200",
    )
    places = [said.stdout.index(word) for word in order]
    assert places == sorted(places)
    assert "epoch 12 -> 13: stage 1: n1 -> n5 (incident 1)" in said.stdout
    assert "no answer from g2" in said.stderr
    assert (
        json.loads(kfadmin("describe", "request", "abc", "-o", "json", *target).stdout)["lives"][0]["tokens"]
        == 64
    )
    none = kfadmin("describe", "request", "other", *target)
    assert (none.exit_code, "no gateway remembers a request other" in none.stderr) == (2, True)


def test_top_counts_steps_in_between(target: list[str], service: MemoryService) -> None:
    def advance() -> None:
        looked_at(service)
        nodes = tuple(
            msgspec.structs.replace(node, progress=node.progress + 100 * k)
            for k, node in enumerate(service.cluster.nodes)
        )
        service.cluster = msgspec.structs.replace(service.cluster, nodes=nodes)

    thread = threading.Thread(target=advance)
    thread.start()
    answer = json.loads(kfadmin("top", "-o", "json", *target).stdout)
    thread.join()
    rates = {node["node"]: node["steps_per_s"] for node in answer["nodes"]}
    assert rates["n0"] == 0.0
    assert 0.0 < rates["n1"] <= 100.0
    assert abs(rates["n7"] - 7 * rates["n1"]) < 0.2
    assert answer["running"] == 16
    assert abs(answer["nodes"][0]["kv"] - 800 / 2048) < 1e-3


# ---- watching


def test_watching_prints_what_changes(target: list[str], service: MemoryService) -> None:
    def change() -> None:
        looked_at(service)
        service.cluster = msgspec.structs.replace(service.cluster, counter=13)

    thread = threading.Thread(target=change)
    thread.start()
    result = kfadmin("topology", "--watch", "--timeout", "3", *target)
    thread.join()
    assert result.exit_code == 0
    counters = [line for line in result.stdout.splitlines() if line.startswith("epoch counter")]
    assert [line.split()[2] for line in counters] == ["12,", "13,"]


def test_a_terminal_is_painted_over(target: list[str], service: MemoryService) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "controlplane.kfadmin.main", "topology", "--watch", "--timeout", "2.5"]
    process = subprocess.Popen([*command, *target], stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    text = b""
    with (
        contextlib.suppress(OSError),
        os.fdopen(ours, "rb", buffering=0) as screen,
    ):  # its end is an error there
        while some := screen.read(65536):
            text += some
    assert process.wait(20) == 0
    assert text.count(b"\x1b[H\x1b[2J") >= 2
    assert text.count(b"epoch counter 12") >= 2
    assert process.stderr is not None
    process.stderr.close()


def test_following_events_prints_each_once(target: list[str], service: MemoryService) -> None:
    def add() -> None:
        looked_at(service)
        service.history = [*service.history, Event(EventKind.JOINED, "n1", "n1 joined")]

    thread = threading.Thread(target=add)
    thread.start()
    result = kfadmin("events", "--follow", "--timeout", "3.5", "-o", "name", *target)
    thread.join()
    assert result.stdout.split() == ["1", "2", "3", "4"]


def test_following_waits_for_a_history_that_is_away(target: list[str], service: MemoryService) -> None:
    def outage() -> None:
        looked_at(service)
        service.history_away = True
        looked_at(service, service.looks + 2)
        service.history = [*service.history, Event(EventKind.JOINED, "n1", "n1 joined")]
        service.history_away = False

    thread = threading.Thread(target=outage)
    thread.start()
    result = kfadmin("events", "-f", "--timeout", "6", "-o", "name", *target)
    thread.join()
    assert (result.exit_code, result.stdout.split()) == (0, ["1", "2", "3", "4"])
    assert result.stderr.count("waiting for a controller") == 1


def test_a_look_gives_up_in_time(tmp_path: Path, token: Path) -> None:
    """The controller takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        result = kfadmin(
            "status", "--timeout", "0.5", "--admin", url, "--admin", url, "--token-file", str(token)
        )
    assert result.exit_code == 5
    assert 0.4 < time.monotonic() - began < 3.0


# ---- operations


def test_operations_are_listed_watched_and_cancelled(target: list[str], service: MemoryService) -> None:
    over = Operation("op-8", OperationKind.CORDON, "n2", state=OperationState.DONE, message="so it is")
    failed = Operation("op-9", OperationKind.CORDON, "n2", state=OperationState.FAILED, message="no")
    service.known |= {"op-8": over, "op-9": failed}
    listed = kfadmin("operations", "list", "-o", "name", *target)
    assert listed.stdout.split() == ["op-7"]
    assert kfadmin("operations", "list", "--all", "-o", "name", *target).stdout.split() == [
        "op-7",
        "op-8",
        "op-9",
    ]
    assert kfadmin("operations", "watch", "op-8", *target).exit_code == 0
    assert kfadmin("operations", "watch", "op-9", *target).exit_code == 1
    running = kfadmin("operations", "watch", "op-7", "--timeout", "0.4", *target)
    assert (running.exit_code, "moving p0/1 to n5" in running.stderr) == (4, True)
    assert kfadmin("operations", "watch", "nope", *target).exit_code == 2
    cancelled = kfadmin("operations", "cancel", "op-7", *target)
    assert (cancelled.exit_code, "cancelled" in cancelled.stdout) == (0, True)
    assert kfadmin("operations", "cancel", "op/../9", *target).exit_code == 2


def test_only_in_an_epoch_and_with_a_reason(target: list[str], service: MemoryService) -> None:
    refused = kfadmin("drain", "n2", "--if-epoch", "11", "--detach", *target)
    assert refused.exit_code == 3
    assert "another epoch" in refused.stdout
    done = kfadmin("drain", "n2", "--if-epoch", "12", "--detach", "-m", "disk fails", "-o", "name", *target)
    assert done.exit_code == 0
    request = service.requests[-1]
    assert done.stdout.split() == [request.id]
    assert (request.if_epoch, request.reason) == (12, "disk fails")


# ---- who answers


def test_what_has_to_be_current_comes_from_the_leader(
    server: tuple[str, MemoryService], service: MemoryService, token: Path
) -> None:
    other = MemoryService()
    other.cluster = msgspec.structs.replace(service.cluster, answered_by="c2", counter=11)
    with serving(other) as url:
        both = ["--admin", url, "--admin", server[0], "--token-file", str(token)]
        result = kfadmin("topology", "-o", "json", *both)
        assert (json.loads(result.stdout)["counter"], result.stderr) == (12, "")
        assert kfadmin("check", "drain", "n1", *both).exit_code == 0
        kfadmin("drain", "n1", "--detach", "--operation-id", "op-1", *both)
        assert kfadmin("operations", "list", "-o", "name", *both).stdout.split() == ["op-7", "op-1"]
        assert "op-1" in service.known
        assert other.requests == []

        alone = kfadmin("topology", "-o", "json", "--admin", url, "--token-file", str(token))
        assert json.loads(alone.stdout)["counter"] == 11
        assert "c2 answers, which does not lead" in alone.stderr
        other.cluster = msgspec.structs.replace(other.cluster, leader="")
        alone = kfadmin("status", "--admin", url, "--token-file", str(token))
        assert (alone.exit_code, "nobody leads" in alone.stderr) == (0, True)


# ---- contexts


def test_contexts(
    server: tuple[str, MemoryService], service: MemoryService, token: Path, contexts_file: Path
) -> None:
    assert kfadmin("status").exit_code == 5  # nothing is known
    made = kfadmin("context", "set", "prod", "--admin", server[0], "--token-file", str(token))
    assert made.exit_code == 0
    assert kfadmin("context", "set", "lab", "--run-dir", "/nowhere").exit_code == 0
    assert kfadmin("context", "list", "-o", "name").stdout.split() == ["lab", "prod"]
    assert TOKEN not in contexts_file.read_text()
    assert contexts_file.stat().st_mode & 0o077 == 0
    assert kfadmin("status").exit_code == 0  # the first one is the current one
    assert kfadmin("--context", "lab", "status").exit_code == 5
    assert CliRunner().invoke(app, ["status"], env={"KF_CONTEXT": "lab"}).exit_code == 5
    assert kfadmin("context", "use", "lab").exit_code == 0
    assert kfadmin("status").exit_code == 5
    assert kfadmin("--context", "prod", "drain", "n2", "--dry-run").exit_code == 0
    assert kfadmin("status", "--admin", server[0], "--token-file", str(token)).exit_code == 0  # options win
    unknown = kfadmin("--context", "nope", "status")
    assert (unknown.exit_code, "lab, prod" in unknown.stderr) == (2, True)
    assert kfadmin("context", "use", "nope").exit_code == 2
    assert kfadmin("context", "remove", "lab").exit_code == 0
    assert kfadmin("context", "list", "-o", "name").stdout.split() == ["prod"]
    contexts_file.write_text("{")
    broken = kfadmin("status")
    assert (broken.exit_code, str(contexts_file) in broken.stderr) == (1, True)


def test_a_context_elsewhere_restarts_nothing_here(service: MemoryService, token: Path) -> None:
    kfadmin("context", "set", "prod", "--admin", "http://127.0.0.1:1", "--token-file", str(token))
    result = kfadmin("restart", "launcher")
    assert (result.exit_code, "on its own machine" in result.stderr) == (2, True)


# ---- tokens


def test_tokens(target: list[str], service: MemoryService, tmp_path: Path, token: Path) -> None:
    file = tmp_path / "alice"
    arguments = ["token", "create", "alice", "--role", "viewer", "--token-file", str(token)]
    made = kfadmin(*arguments, "--for", "2h", "--file", str(file))
    assert (made.exit_code, made.stdout) == (0, "")
    assert file.stat().st_mode & 0o777 == 0o600
    caller = identify(file.read_text().strip(), TOKEN, time.time())
    assert caller is not None
    assert (caller.name, caller.role) == ("alice", Role.VIEWER)
    assert 7190 < caller.expiry_unix_s - time.time() <= 7201
    assert "alice, viewer" in kfadmin("token", "show", str(file), "--token-file", str(token)).stdout
    url = ["--admin", target[1], "--token-file", str(file)]
    assert kfadmin("status", *url).exit_code == 0
    refused = kfadmin("drain", "n2", *url)
    assert (refused.exit_code, "operator" in refused.stderr) == (6, True)
    assert kfadmin("audit", *url).exit_code == 6
    assert kfadmin(*arguments, "--file", str(file)).exit_code == 1  # it is there
    for bad in ("0h", "8", "x", "400d", "-1h"):
        assert kfadmin(*arguments, "--for", bad).exit_code == 2, bad
    assert kfadmin("token", "create", "a", "--role", "admin", "--token-file", str(token)).exit_code == 1
    assert kfadmin("token", "revoke", *target).exit_code == 2
    assert kfadmin("token", "revoke", "alice", *url).exit_code == 6  # only who gives them takes them back
    revoked = kfadmin("token", "revoke", "--file", str(file), *target)
    assert (revoked.exit_code, "a token of alice is revoked" in revoked.stderr) == (0, True)
    assert kfadmin("status", *url).exit_code == 6
    revoked = kfadmin("token", "revoke", "corp:bob", *target)
    assert (revoked.exit_code, "everything of corp:bob is revoked" in revoked.stderr) == (0, True)
    junk = tmp_path / "junk"
    junk.write_text("junk")
    assert kfadmin("token", "revoke", "--file", str(junk), *target).exit_code == 2
    assert kfadmin("token", "show", str(junk), "--token-file", str(token)).exit_code == 6


# ---- what others wrote


def test_nothing_that_others_wrote_moves_the_terminal(
    target: list[str], service: MemoryService, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a controller of an older release may have it."""
    odd = "\x1b]0;x\x07\x1b[2J\x9b1m\u202e\r"
    service.audited = [msgspec.structs.replace(ENTRY, reason=f"{odd}disk", message=f"\u5b57 {odd}")]
    service.known["op-7"] = Operation("op-7", OperationKind.DRAIN, "n1", message=f"moving{odd} p0/1")
    service.cluster = msgspec.structs.replace(service.cluster, troubles=(f"{odd}trouble",))
    for verb in (["audit"], ["operations", "list", "--all"], ["status"]):
        text = kfadmin(*verb, *target).stdout
        assert not set(odd) - set("0;x[2J]1m") & set(text), verb
    assert "disk" in kfadmin("audit", *target).stdout
    progress(f"a{odd}b")
    assert capsys.readouterr().err == "a]0;x[2J1mb\n"


# ---- the support bundle


def test_the_support_bundle_has_no_secret(
    server: tuple[str, MemoryService], service: MemoryService, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    secret = load_secret(run_dir.path / "secret").decode()
    minted = mint(derive(secret.encode(), "admin"), "alice", Role.VIEWER, 1 << 40)
    hidden = [
        secret,
        run_dir.api_key(),
        run_dir.admin_token(),
        derive(secret.encode(), "grpc"),
        minted,
        "pa55word",
    ]
    url = "postgresql+asyncpg://kf:pa55word@db/kf"
    run_dir.write(
        "cluster.json", ClusterConfig(str(run_dir.path), "model", ("127.0.0.1:1",), database_url=url)
    )
    run_dir.write("endpoints.json", Endpoints((), (server[0],)))
    named, _ = make_key("alice", "", 1, 0, KeyLimits())
    session = session_cookie(TOKEN, 1.0)
    said = [
        *hidden, f"Authorization: Bearer {'z' * 20}", f"connecting to {url}", "kf-" + "0" * 48, named,
        f"cookie: a=b; {COOKIE}={session}; c=d", f'set-cookie: {COOKIE}="{session}"; path=/',
    ]  # fmt: skip
    run_dir.log("c1").write_text("\n".join(said) + "\nit started\n")
    service.history = [Event(EventKind.JOINED, "n1", f"with {secret}")]
    file = tmp_path / "out.tar.gz"
    token = tmp_path / "token"
    token.write_text(TOKEN)
    result = kfadmin(
        "support-bundle", "--run-dir", str(run_dir.path), "--token-file", str(token), "--file", str(file)
    )
    assert (result.exit_code, result.stdout.strip()) == (0, str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    parts = contents(file)
    assert {
        "out/status.json",
        "out/audit.json",
        "out/metrics.txt",
        "out/logs/c1.log",
        "out/version.txt",
    } <= set(parts)
    assert "out/errors.txt" not in parts
    assert "it started" in parts["out/logs/c1.log"]
    everything = "\n".join(parts.values())
    for one in [*hidden, "z" * 20, "0" * 48, TOKEN, named.split("-", 2)[2], session.rpartition(".")[2]]:
        assert one not in everything
    assert json.loads(parts["out/status.json"])["leader"] == "c1"
    # It is there.
    assert kfadmin("support-bundle", "--run-dir", str(run_dir.path), "--file", str(file)).exit_code == 1


def test_a_source_of_secrets_that_is_not_there_keeps_no_other_from_being_hidden(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    url = "postgresql+asyncpg://kf:pa55%2Fword@db/kf"
    run_dir.write(
        "cluster.json", ClusterConfig(str(run_dir.path), "model", ("127.0.0.1:1",), database_url=url)
    )
    (run_dir.path / "secret").write_text("short")  # no secret of ours
    run_dir.log("c1").write_text("pa55%2Fword was pa55/word\n")
    file = tmp_path / "out.tar.gz"
    result = kfadmin("support-bundle", "--run-dir", str(run_dir.path), "--file", str(file))
    assert result.exit_code == 0
    assert "only what looks like a credential" in result.stderr
    assert "pa55" not in contents(file)["out/logs/c1.log"]
    for name in ("api-keys", "secret"):
        (run_dir.path / name).unlink(missing_ok=True)
    file.unlink()
    assert kfadmin("support-bundle", "--run-dir", str(run_dir.path), "--file", str(file)).exit_code == 0
    assert "pa55" not in contents(file)["out/logs/c1.log"]


def test_a_bundle_of_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    run_dir.log("etcd0").write_text("no space left on device\n")
    file = tmp_path / "out.tar.gz"
    result = kfadmin("support-bundle", "--run-dir", str(run_dir.path), "--file", str(file))
    assert result.exit_code == 0
    parts = contents(file)
    assert "no space left" in parts["out/logs/etcd0.log"]
    assert "the cluster" in parts["out/errors.txt"]
    assert "not in the bundle: the cluster" in result.stderr


def contents(file: Path) -> dict[str, str]:
    with tarfile.open(file) as archive:
        found = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        return {name: part.read().decode() for name, part in found.items() if part is not None}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Bearer abcdefgh12", f"Bearer {bundle.HIDDEN}"),
        ("http://u:p@h/x", f"http://{bundle.HIDDEN}@h/x"),
        ("http://host:80/x@y", "http://host:80/x@y"),
        ("n1 died at 127.0.0.1:80", "n1 died at 127.0.0.1:80"),
    ],
)
def test_what_looks_like_a_credential(text: str, left: str) -> None:
    assert bundle.redact(text, ["", "hunter2"]) == left
    assert bundle.redact("x hunter2 y", ["hunter2"]) == f"x {bundle.HIDDEN} y"


# ---- kfadmin itself


def test_versions(target: list[str]) -> None:
    assert kfadmin("version", "--client").stdout.startswith("kfadmin ")
    value = json.loads(kfadmin("version", "-o", "json", *target).stdout)
    assert {"n0", "c1", "g1"} <= {one["name"] for one in value["processes"]}
    assert kfadmin("version", "--admin", "http://127.0.0.1:1", *target[2:]).exit_code == 5


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = kfadmin("completion", shell).stdout
    assert "_KFADMIN_COMPLETE" in script
    assert kfadmin("completion", "cmd").exit_code == 2


def test_a_shell_is_told_verbs(tmp_path: Path) -> None:
    """As bash asks: what may follow "kfadmin operations "."""
    environment = {
        "_KFADMIN_COMPLETE": "complete_bash",
        "COMP_WORDS": "kfadmin operations ",
        "COMP_CWORD": "2",
    }
    command = [sys.executable, "-c", "from controlplane.kfadmin.main import main; main()"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert set(told.stdout.split()) == {"list", "watch", "cancel"}, told


def test_exit_codes_are_documented() -> None:
    assert set(exits.WORDS) == set(Exit)
    document = (Path(__file__).parents[2] / "docs" / "kfadmin.md").read_text()
    for code, words in exits.WORDS.items():
        assert f"| {code.value} | {words} |" in document
    for name in ("drain", "incidents", "support-bundle", "operations watch", "describe node", "token create"):
        assert f"`kfadmin {name}" in document


HARD: list[Any] = [
    {"a": "true", "b": True, "c": None, "d": "", "e": "x: y", "f": "- z", "g": "# no", "h": "1.5", "i": 1.5},
    {
        "list": [],
        "map": {},
        "nested": [[1, [2]], {"k": [{"x": 'é\n"q"'}]}],
        "~": "~",
        "yes": "no",
        "null": "null",
    },
    [],
    "plain",
    {"0x1": "0x1", "t": "2001-01-01", "u": "@x", "v": "a_b/c.d-e", "n": "NaN", "o": "off", "w": " s "},
]


@pytest.mark.parametrize("value", HARD)
def test_yaml_is_read_as_it_was_meant(value: Any) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


def test_what_is_done_about_a_token_is_told_in_every_form(
    target: list[str], tmp_path: Path, token: Path
) -> None:
    arguments = ["token", "create", "alice", "--role", "viewer", "--token-file", str(token)]
    made = json.loads(kfadmin(*arguments, "-o", "json").stdout)
    caller = identify(made["token"], TOKEN, time.time())
    assert caller is not None
    told = (made["name"], made["role"], made["expiry_unix_s"])
    assert told == (caller.name, caller.role, caller.expiry_unix_s)
    file = tmp_path / "alice"
    written = kfadmin(*arguments, "--file", str(file), "-o", "yaml")
    assert str(file) in written.stdout
    assert file.read_text().strip() not in written.stdout  # who asks for a file does not want it on a screen
    revoked = json.loads(kfadmin("token", "revoke", "--file", str(file), *target, "-o", "json").stdout)
    assert revoked["name"] == "alice"
