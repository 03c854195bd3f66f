"""`kfadmin keys`: made, listed, revoked; nothing that lets somebody in is kept or told twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from controlplane.contract.auth import Role
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import Endpoints, RunDir
from tests.web.admin_service import TOKEN, MemoryService, serving
from web.gateway.http.api_keys import ApiKeys, Right


def keys(run_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--run-dir", str(run_dir)])


def test_a_key_from_its_making_to_its_end(tmp_path: Path) -> None:
    done = keys(
        tmp_path, "create", "alice", "--owner", "team a", "--for", "30d", "--tokens-per-minute", "1000",
        "--model", "m1", "--model", "m2", "--priority-floor", "5",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    text = done.stdout.strip()
    store = ApiKeys.load(tmp_path / "api-keys", tmp_path / "keys.json")
    assert store.match(f"Bearer {text}").limits.models == ("m1", "m2")
    assert text.split("-", 2)[2] not in (tmp_path / "keys.json").read_text()
    again = keys(tmp_path, "create", "alice")
    assert again.exit_code == 2
    assert "revoke it first" in again.output
    listed = json.loads(keys(tmp_path, "list", "-o", "json").stdout)
    assert [(key["name"], key["owner"], key["state"]) for key in listed] == [("alice", "team a", "active")]
    assert listed[0]["expires_unix_s"] - listed[0]["created_unix_s"] == 30 * 86400
    assert not {"hash", "salt", "key"} & listed[0].keys()
    table = keys(tmp_path, "list").stdout
    assert "only m1, m2; 1000 tokens/min; priority 5 or more" in " ".join(table.split())
    assert keys(tmp_path, "revoke", "alice").exit_code == 0
    assert keys(tmp_path, "revoke", "alice").exit_code == 2
    assert keys(tmp_path, "list", "-o", "name").stdout == ""
    assert keys(tmp_path, "list", "--all", "-o", "name").stdout == "alice\n"
    assert keys(tmp_path, "create", "alice").exit_code == 0, "the name is free again"


def test_what_was_revoked_is_told_in_every_form(tmp_path: Path) -> None:
    assert keys(tmp_path, "create", "alice", "--owner", "team a").exit_code == 0
    keys(tmp_path, "create", "bob")
    keys(tmp_path, "create", "carol")
    done = keys(tmp_path, "revoke", "alice", "-o", "json")
    assert done.exit_code == 0, done.output
    (told,) = json.loads(done.stdout)
    assert (told["name"], told["owner"], told["state"]) == ("alice", "team a", "revoked")
    assert not {"hash", "salt", "key"} & told.keys()
    assert keys(tmp_path, "revoke", "bob", "-o", "name").stdout == "bob\n"
    plain = keys(tmp_path, "revoke", "carol")
    assert (plain.stdout, "carol is revoked" in plain.stderr) == ("", True)


def test_a_scrapers_key_is_for_metrics_alone(tmp_path: Path) -> None:
    text = keys(tmp_path, "create", "prometheus", "--metrics").stdout.strip()
    store = ApiKeys.load(tmp_path / "api-keys", tmp_path / "keys.json")
    assert store.match(f"Bearer {text}").right is Right.METRICS
    assert "only /metrics" in keys(tmp_path, "list").stdout
    assert keys(tmp_path, "create", "other", "--metrics", "--streams", "1").exit_code == 2


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    assert keys(tmp_path, "create", "a b").exit_code != 0
    assert keys(tmp_path, "create", "a", "--for", "1 day").exit_code != 0
    assert keys(tmp_path, "create", "a", "--streams", "-1").exit_code == 2
    for command in (["list"], ["create", "a"], ["revoke", "a"]):
        done = keys(tmp_path / "nowhere", *command)
        assert done.exit_code == 2
        assert "there is no directory" in done.output
    assert not (tmp_path / "keys.json").exists()


def test_the_audit_is_told_what_was_made_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDir, "admin_token", lambda _run_dir: TOKEN)
    service = MemoryService()
    with serving(service) as url:
        RunDir(tmp_path).write("endpoints.json", Endpoints((), (url,)))
        done = keys(tmp_path, "create", "alice", "--owner", "team a")
        assert (done.exit_code, done.stderr) == (0, "")
        by_file = ["keys", "revoke", "alice", "--file", str(tmp_path / "keys.json")]
        assert CliRunner().invoke(app, by_file).stderr == "alice is revoked\n"
        for words in (
            ["--run-dir", str(tmp_path)],
            ["--run-dir", str(tmp_path), "--file", str(tmp_path / "t")],
        ):
            made = CliRunner().invoke(app, ["token", "create", "bob", "--role", "viewer", *words])
            assert (made.exit_code, made.stderr) == (0, "")
    _, key_id, secret = done.stdout.split()[-1].split("-", 2)  # the server logs there as well
    told = [(change.change.value, change.name, change.more) for change, _ in service.noted]
    of_key = [("create-key", "alice", "team a"), ("revoke-key", "alice", "team a")]
    assert told == [*of_key, *[("create-token", "bob", "viewer")] * 2]
    assert [change.id for change, _ in service.noted][:2] == [key_id] * 2
    assert all("@" in change.by for change, _ in service.noted)
    assert {(caller.role, caller.address) for _, caller in service.noted} == {(Role.ADMIN, "127.0.0.1")}
    assert secret not in repr(service.noted)


def test_what_cannot_be_told_is_done_all_the_same_and_said(tmp_path: Path) -> None:
    assert keys(tmp_path, "create", "alice").exit_code == 0
    done = keys(tmp_path, "revoke", "alice")
    assert (done.exit_code, "the audit has no line of it" in done.stderr) == (0, True)
    assert keys(tmp_path, "list", "-o", "name").stdout == ""
