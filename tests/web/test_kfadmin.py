"""kfadmin against the real admin API: what it prints, and every exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import structlog
from typer.testing import CliRunner, Result

from controlplane.contract.auth import derive, load_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.events import Event, EventKind
from controlplane.contract.ids import Member
from controlplane.contract.records import OperationKind, OperationState
from controlplane.contract.status import Check, NodeState, PipelineState
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import Endpoints, ProcessFile, RunDir
from controlplane.kfadmin.up import demo_model, settings_of
from controlplane.process import start_ticks
from tests.io.etcd_server import free_ports
from tests.web import admin_service
from tests.web.admin_service import TOKEN, MemoryService, serving


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, MemoryService]]:
    """It runs in this process: what it logs is none of kfadmin's output."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
    service = MemoryService()
    with serving(service) as url:
        yield url, service
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def no_contexts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of the user who runs the tests."""
    monkeypatch.setenv("KF_CONTEXTS", str(tmp_path / "contexts.json"))
    monkeypatch.delenv("KF_CONTEXT", raising=False)


@pytest.fixture
def service(server: tuple[str, MemoryService]) -> MemoryService:
    server[1].reset()
    return server[1]


@pytest.fixture
def target(server: tuple[str, MemoryService], service: MemoryService, tmp_path: Path) -> list[str]:
    """Options that name the cluster. Its first controller is dead, so that every verb has to try the second."""
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    return ["--admin", f"http://127.0.0.1:{closed_port()}", "--admin", server[0], "--token-file", str(token)]


def closed_port() -> int:
    (port,) = free_ports(1)
    return port


def kfadmin(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def end(service: MemoryService, operation_id: str, state: OperationState, message: str) -> None:
    """What the leader does when an operation is over."""
    deadline = time.monotonic() + 10
    while operation_id not in service.known:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    operation = service.known[operation_id]
    service.known[operation_id] = msgspec.structs.replace(operation, state=state, message=message)


@contextlib.contextmanager
def ending(service: MemoryService, operation_id: str, state: OperationState, message: str) -> Iterator[None]:
    thread = threading.Thread(target=end, args=(service, operation_id, state, message))
    thread.start()
    yield
    thread.join()


# ---- looking


def test_status_says_what_is_wrong(target: list[str], service: MemoryService) -> None:
    nodes = list(service.cluster.nodes)
    nodes[1] = msgspec.structs.replace(nodes[1], state=NodeState.RED, evidence="link broken [reset]")
    p0 = service.cluster.pipelines[0]
    borrowed = msgspec.structs.replace(p0.stages[1], serving=(Member("n5", "bbbb"),), borrowed=True)
    stages = (p0.stages[0], borrowed, *p0.stages[2:])
    degraded = msgspec.structs.replace(p0, state=PipelineState.DEGRADED, stages=stages)
    service.cluster = msgspec.structs.replace(
        service.cluster, nodes=tuple(nodes), pipelines=(degraded, service.cluster.pipelines[1])
    )
    result = kfadmin("status", *target)
    assert result.exit_code == 0
    for part in ("available", "leader c1", "n5 (for n1)", "degraded", "7 of 8", "link broken [reset]"):
        assert part in result.stdout
    service.cluster = msgspec.structs.replace(service.cluster, available=False)
    assert "UNAVAILABLE" in kfadmin("status", *target).stdout


def test_json_is_the_whole_answer(target: list[str]) -> None:
    status = json.loads(kfadmin("status", "-o", "json", *target).stdout)
    assert (status["leader"], len(status["nodes"]), len(status["pipelines"])) == ("c1", 8, 2)
    nodes = json.loads(kfadmin("nodes", "-o", "json", *target).stdout)
    assert [node["node"] for node in nodes] == [f"n{k}" for k in range(8)]
    topology = json.loads(kfadmin("topology", "-o", "json", *target).stdout)
    assert topology["counter"] == 12
    assert topology["pipelines"][1]["stages"][2]["serving"] == [{"node": "n6", "incarnation": "aaaa"}]


def test_tables(target: list[str]) -> None:
    nodes = kfadmin("nodes", *target).stdout.splitlines()
    assert nodes[0].split()[:3] == ["NODE", "STATE", "STAGE"]
    assert nodes[1].split() == ["n0", "green", "0", "p0/0", "410", "390", "2048", "-", "4000"]
    assert len(nodes) == 9
    topology = kfadmin("topology", *target).stdout
    assert "n7@aaaa" in topology
    assert "epoch counter 12" in topology


def test_events(target: list[str], service: MemoryService) -> None:
    service.history = [
        Event(EventKind.DIED, f"n{k}", "gone", unix_s=1.7e9, details={"detect_s": 0.125}) for k in range(5)
    ]
    lines = kfadmin("events", "--limit", "2", *target).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ID", "4", "5"]
    assert "detect_s=0.125" in lines[2]
    rows = json.loads(kfadmin("events", "-o", "json", "--after", "3", *target).stdout)
    assert [(row["id"], row["event"]["subject"]) for row in rows] == [(4, "n3"), (5, "n4")]


# ---- changing


def test_a_drain_that_is_done(target: list[str], service: MemoryService) -> None:
    with ending(service, "op-1", OperationState.DONE, "n1 serves nothing"):
        result = kfadmin("drain", "n1", "--operation-id", "op-1", "--deadline", "30", *target)
    assert result.exit_code == 0
    assert "PRE-FLIGHT  epoch 12, leader c1" in result.stdout
    assert "ok    capacity  fine" in result.stdout
    assert "PLAN  cordon n1" in result.stdout
    assert "drain n1 done: n1 serves nothing" in result.stdout
    assert "n1 serves nothing" in result.stderr  # progress, as it was said
    assert "Nothing was changed" not in result.stdout


@pytest.mark.parametrize("state", [OperationState.FAILED, OperationState.CANCELLED])
def test_an_operation_that_did_not_succeed(
    target: list[str], service: MemoryService, state: OperationState
) -> None:
    with ending(service, "op-2", state, "no peer left"):
        result = kfadmin("replace", "n1", "--with", "n9", "--operation-id", "op-2", "-o", "json", *target)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["operation"]["state"] == state.value
    assert "no peer left" in result.stderr


def test_refused_by_preflight(target: list[str], service: MemoryService) -> None:
    result = kfadmin("drain", "n0", *target)
    assert result.exit_code == 3
    assert "fail  capacity  n0 has no peer" in result.stdout
    assert "Nothing was changed." in result.stdout
    assert not service.known
    result = kfadmin("drain", "n0", "-o", "json", *target)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["accepted"] is False


def test_a_dry_run_changes_nothing(target: list[str], service: MemoryService) -> None:
    result = kfadmin("undrain", "n1", "--dry-run", *target)
    assert result.exit_code == 0
    assert result.stdout.endswith("Nothing was changed.\n")
    assert not service.known
    assert kfadmin("drain", "n0", "--dry-run", *target).exit_code == 3


def test_the_wait_ends_and_the_operation_does_not(target: list[str], service: MemoryService) -> None:
    result = kfadmin("drain", "n1", "--timeout", "0.3", "--operation-id", "op-3", *target)
    assert result.exit_code == 4
    assert "kfadmin cancel op-3" in result.stderr
    assert service.known["op-3"].open


def test_detached(target: list[str], service: MemoryService) -> None:
    result = kfadmin("drain", "n1", "--detach", "-o", "json", *target)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["operation"]["state"] == "running"
    assert service.known[answer["operation"]["id"]].open


def test_ctrl_c_stops_watching_and_not_the_operation(target: list[str], service: MemoryService) -> None:
    command = [sys.executable, "-m", "controlplane.kfadmin.main", "drain", "n1", "--operation-id", "op-4"]
    # A background job of a shell ignores SIGINT, and so would the child.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*command, *target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    assert process.stderr is not None
    assert process.stderr.readline() == "operation op-4\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 4
    assert "drain n1 running" in out
    assert "stopped watching" in err
    assert service.known["op-4"].open


def test_cancel(target: list[str], service: MemoryService) -> None:
    kfadmin("drain", "n1", "--detach", "--operation-id", "op-5", *target)
    result = kfadmin("cancel", "op-5", *target)
    assert result.exit_code == 0
    assert "cancelled" in result.stdout
    assert not service.known["op-5"].open


@pytest.mark.parametrize(
    ("arguments", "kind", "node"),
    [
        (("pause",), OperationKind.PAUSE, ""),
        (("resume",), OperationKind.RESUME, ""),
        (("transfer-leader",), OperationKind.TRANSFER, ""),
        (("transfer-leader", "c2"), OperationKind.TRANSFER, "c2"),
        (("restart", "nodes"), OperationKind.RESTART, "nodes"),
        (("restart", "all"), OperationKind.RESTART, "all"),
        (("restart", "nodes", "--instance", "p1"), OperationKind.RESTART, "p1"),
        (("scale", "3"), OperationKind.SCALE, ""),
        (("cordon", "n1"), OperationKind.CORDON, "n1"),
        (("uncordon", "n1"), OperationKind.UNDRAIN, "n1"),
    ],
)
def test_every_verb_asks_for_its_operation(
    target: list[str], service: MemoryService, arguments: tuple[str, ...], kind: OperationKind, node: str
) -> None:
    assert kfadmin(*arguments, "--dry-run", *target).exit_code == 0
    assert service.known == {}
    with ending(service, "op-6", OperationState.DONE, "it is so"):
        result = kfadmin(*arguments, "--operation-id", "op-6", *target)
    assert result.exit_code == 0
    asked = service.known["op-6"]
    assert (asked.kind, asked.node) == (kind, node)
    assert asked.instances == (3 if kind is OperationKind.SCALE else 0)
    assert f"{kind.value} {node or asked.instances or ''}".strip() + " done: it is so" in result.stdout


def test_checks_have_exit_codes_and_change_nothing(target: list[str], service: MemoryService) -> None:
    fine = kfadmin("check", "drain", "n1", *target)
    assert fine.exit_code == 0
    assert "ok    capacity  fine" in fine.stdout
    assert kfadmin("check", "replace", "n1", "--with", "n9", *target).exit_code == 0
    assert kfadmin("check", "drain", "n0", *target).exit_code == 3
    assert kfadmin("check", "quorum", *target).exit_code == 0
    service.quorum_checks = [Check("fail", "etcd", "1 of 3 etcd members are healthy")]
    lost = kfadmin("check", "quorum", "-o", "json", *target)
    assert lost.exit_code == 3
    assert json.loads(lost.stdout)["checks"][0]["level"] == "fail"
    assert service.known == {}
    assert kfadmin("check", "weather", *target).exit_code == 2


def test_a_pause_is_the_first_thing_that_status_says(target: list[str], service: MemoryService) -> None:
    service.cluster = msgspec.structs.replace(service.cluster, paused=True)
    assert "automation is PAUSED" in kfadmin("status", *target).stdout.splitlines()[2]


def test_processes_of_this_machine_are_not_restarted_blindly(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.prepare()
    run_dir.write("cluster.json", ClusterConfig(str(tmp_path), "model", (f"127.0.0.1:{closed_port()}",)))
    result = kfadmin("restart", "launcher", "--run-dir", str(tmp_path))
    assert result.exit_code == 3
    assert "launcher does not run" in result.stderr
    result = kfadmin("restart", "etcd", "--run-dir", str(tmp_path))
    assert result.exit_code == 3
    assert "0 members" in result.stderr


# ---- what can be wrong


def test_usage(target: list[str]) -> None:
    assert kfadmin("drain").exit_code == 2
    assert kfadmin("no-such-verb").exit_code == 2
    assert kfadmin("status", "-o", "xml", *target).exit_code == 2
    assert kfadmin("status", "--admin", "localhost:1").exit_code == 2
    result = kfadmin("drain", "n1;rm", *target)
    assert result.exit_code == 2
    assert "letters, digits" in result.stderr


def test_unreachable(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    url = f"http://127.0.0.1:{closed_port()}"
    result = kfadmin("status", "--admin", url, "--token-file", str(token))
    assert result.exit_code == 5
    assert url in result.stderr
    assert result.stdout == ""
    result = kfadmin("nodes", "--run-dir", str(tmp_path / "nothing"))
    assert result.exit_code == 5
    assert "kfadmin up" in result.stderr


def test_the_database_is_away(target: list[str], service: MemoryService) -> None:
    service.history_away = True
    result = kfadmin("events", *target)
    assert result.exit_code == 5
    assert "history database is away" in result.stderr


def test_not_allowed(server: tuple[str, MemoryService], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not the token")
    assert kfadmin("status", "--admin", server[0], "--token-file", str(wrong)).exit_code == 6
    if os.geteuid() != 0:  # root reads everything
        wrong.chmod(0)
        assert kfadmin("status", "--admin", server[0], "--token-file", str(wrong)).exit_code == 6


# ---- clusters of this machine


def test_a_run_directory_names_the_cluster_and_holds_the_token(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    assert (run_dir.path.stat().st_mode & 0o777) == 0o700
    assert (run_dir.path / "api-keys").stat().st_mode & 0o077 == 0
    assert run_dir.admin_token() == derive(load_secret(run_dir.path / "secret"), "admin")
    first = run_dir.api_key()
    run_dir.prepare()
    assert run_dir.api_key() == first
    run_dir.write("endpoints.json", Endpoints((), (f"http://127.0.0.1:{closed_port()}",)))
    assert kfadmin("status", "--run-dir", str(run_dir.path)).exit_code == 5


def test_a_second_up_is_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path).owned():
        result = kfadmin("up", "--run-dir", str(tmp_path), "--gateway-port", "0", "--admin-port", "0")
    assert result.exit_code == 3
    assert f"pid {os.getpid()}" in result.stderr
    assert not (tmp_path / "cluster.json").exists()


def test_up_with_a_port_that_is_taken_or_no_model(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        result = kfadmin("up", "--run-dir", str(tmp_path), "--gateway-port", port, "--admin-port", "0")
    assert result.exit_code == 1
    assert f"port {port}" in result.stderr
    assert RunDir(tmp_path).owner() == 0
    result = kfadmin("up", "--run-dir", str(tmp_path), "--model", str(tmp_path))
    assert result.exit_code == 1
    assert "config.json" in result.stderr


def test_up_says_what_is_wrong_with_its_run_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    blocked = tmp_path / "blocked"
    (blocked / "logs").parent.mkdir()
    (blocked / "logs").touch()  # a file in the place of a directory
    for run_dir, why in (
        ("/proc/nope", "No such file"),
        (str(file), "File exists"),
        (str(file / "x"), "Not a directory"),
        (str(blocked), "File exists"),
    ):
        result = kfadmin("up", "--run-dir", run_dir, "--gateway-port", "0", "--admin-port", "0")
        assert result.exit_code == 2, run_dir
        assert f"cannot use the run directory {run_dir}" in result.stderr
        assert why in result.stderr
        assert "Traceback" not in result.stderr
    assert kfadmin("down", "--run-dir", str(file / "x")).exit_code in (0, 1)


def test_the_status_of_a_thousand_nodes_shows_what_is_wrong(
    target: list[str], service: MemoryService
) -> None:
    large = admin_service.healthy(instances=250)
    nodes = [msgspec.structs.replace(node, version="1+a", settings="") for node in large.nodes]
    for index in range(500, 560):
        nodes[index] = msgspec.structs.replace(nodes[index], state=NodeState.RED, evidence="silent")
    nodes[7] = msgspec.structs.replace(nodes[7], version="2+b")
    pipelines = list(large.pipelines)
    pipelines[130] = msgspec.structs.replace(pipelines[130], state=PipelineState.DOWN)
    service.cluster = msgspec.structs.replace(large, nodes=tuple(nodes), pipelines=tuple(pipelines))
    said = kfadmin("status", *target).stdout
    lines = said.splitlines()
    assert len(lines) < 60
    assert any(line.startswith("p130") and "down" in line for line in lines)
    assert "249 pipelines are not shown (249 are up)" in said
    assert "and 20 more: `kfadmin nodes` shows all" in said
    assert any("mixed versions: 1+a in n0, n1" in line and "and 923 more" in line for line in lines)
    assert len(kfadmin("topology", *target).stdout.splitlines()) > 250


def test_mixtures_are_shown(target: list[str], service: MemoryService) -> None:
    assert "mixed" not in kfadmin("status", *target).stdout
    nodes = [msgspec.structs.replace(node, version="1+a", settings="s") for node in service.cluster.nodes]
    nodes[2] = msgspec.structs.replace(nodes[2], version="2+b")
    service.cluster = msgspec.structs.replace(service.cluster, nodes=tuple(nodes))
    said = kfadmin("status", *target).stdout
    assert "mixed versions: 1+a in n0, n1, n3" in said
    assert "2+b in n2" in said
    assert "mixed settings" not in said


def test_numerics_are_shown_and_stages_whose_nodes_differ_are_told(
    target: list[str], service: MemoryService
) -> None:
    def having(*numerics: str) -> str:
        nodes = zip(service.cluster.nodes, numerics, strict=False)  # the first four
        changed = tuple(msgspec.structs.replace(n, numerics=w, stage=k % 2) for k, (n, w) in enumerate(nodes))
        service.cluster = msgspec.structs.replace(service.cluster, nodes=changed)
        return kfadmin("status", *target).stdout

    said = having("float32-cpu-aa", "float32-cpu-bb", "float32-cpu-aa", "float32-cpu-bb")
    assert "stage 0 computes as float32-cpu-aa in n0, n2" in said
    assert "stage 1 computes as float32-cpu-bb in n1, n3" in said
    assert "mixed" not in said
    said = having("float32-cpu-aa", "float32-cpu-bb", "float32-cpu-aa", "bfloat16-cpu-cc")
    assert "mixed numerics in stage 1: float32-cpu-bb in n1; bfloat16-cpu-cc in n3" in said
    assert "mixed numerics in stage 0" not in said
    assert "bfloat16-cpu-cc" in kfadmin("nodes", *target).stdout


def test_down_ends_what_a_killed_up_has_left(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.prepare()
    with subprocess.Popen(["sleep", "60"]) as left, subprocess.Popen(["sleep", "60"]) as other:
        reaper = threading.Thread(target=left.wait)  # stands for the init process
        reaper.start()
        run_dir.write("nodes/n0.json", ProcessFile(left.pid, 0.0, 0, start_ticks(left.pid) or 0))
        # A pid that the kernel has given to somebody else since.
        run_dir.write("pids/c1.json", ProcessFile(other.pid, 0.0, 0, (start_ticks(other.pid) or 0) - 1))
        result = kfadmin("down", "--run-dir", str(tmp_path))
        reaper.join(5)
        assert result.exit_code == 0
        assert "ended n0" in result.stderr
        assert left.returncode == -signal.SIGTERM
        assert other.poll() is None
        other.kill()
    assert "no cluster runs" in kfadmin("down", "--run-dir", str(tmp_path)).stdout


def test_the_demo_kills_only_nodes_of_its_own_cluster(
    service: MemoryService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.prepare()
    monkeypatch.setattr(admin_service, "TOKEN", run_dir.admin_token())
    with serving(service) as url:
        run_dir.write("endpoints.json", Endpoints(("http://127.0.0.1:1",), (url,)))
        result = kfadmin("demo", "--run-dir", str(tmp_path), "--node", "n1")
        assert result.exit_code == 1
        assert "nothing was killed" in result.stderr
        assert kfadmin("demo", "--run-dir", str(tmp_path), "--node", "n77").exit_code == 2


def test_settings_of_a_file_and_of_options(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('run_dir = "here"\nmodel = "there"\netcd = []\nstages = 2\n')
    assert settings_of(file, {"instances": 3}) == ClusterConfig("here", "there", (), instances=3, stages=2)
    assert settings_of(None, {}).model == str(demo_model())
