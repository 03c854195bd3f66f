"""`kfadmin up` as a user runs it: one cluster a directory, dead processes put back, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controlplane.kfadmin.rundir import RunDir

pytestmark = pytest.mark.usefixtures("etcd_binary")
COMMAND = [sys.executable, "-m", "controlplane.kfadmin.main"]
SMALL = ["--instances", "1", "--stages", "1", "--gateway-port", "0", "--admin-port", "0"]


def wait_for(condition: Callable[[], object], what: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def running(run_dir: RunDir) -> dict[str, int]:
    files = {**run_dir.processes("pids"), **run_dir.processes("nodes")}
    return {name: file.pid for name, file in files.items() if file.alive}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], RunDir, str]]:
    """A running `kfadmin up`, its directory, and what it said when it was ready."""
    run_dir = RunDir(tmp_path / "run")
    command = [*COMMAND, "up", "--run-dir", str(run_dir.path), *SMALL]
    with (
        (tmp_path / "stderr").open("w") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, process_group=0) as process,
    ):
        assert process.stdout is not None
        said = ""
        for line in process.stdout:  # ends when it is ready, or when it has failed
            said += line
            if "Ctrl-C" in line:
                break
        assert "Ctrl-C" in said, (tmp_path / "stderr").read_text()
        yield process, run_dir, said
        process.kill()
    run_dir.end_leftovers()


def test_up_mends_what_dies_and_leaves_nothing(up: tuple[subprocess.Popen[str], RunDir, str]) -> None:
    process, run_dir, said = up
    for part in (
        f"{run_dir.endpoints().gateways[0]}/v1",
        run_dir.api_key(),
        run_dir.admin_token(),
        "curl -N",
    ):
        assert part in said
    second = subprocess.run(
        [*COMMAND, "up", "--run-dir", str(run_dir.path), *SMALL], capture_output=True, timeout=60, check=False
    )
    assert second.returncode == 3
    before = running(run_dir)
    assert set(before) == {"etcd0", "c1", "c2", "g1", "launcher", "n0"}
    killed = ("launcher", "c1", "g1")
    for name in killed:
        os.kill(before[name], signal.SIGKILL)

    def all_back() -> bool:
        now = running(run_dir)
        return set(now) == set(before) and all(now[name] != before[name] for name in killed)

    wait_for(all_back, "all of them are back", 30)
    after = running(run_dir)
    assert after["n0"] == before["n0"]  # its launcher died and it never noticed
    # The new launcher looks after the node that it found.
    wait_for(lambda: "adopted" in run_dir.tail("launcher"), "the launcher has adopted n0", 30)
    os.kill(after["n0"], signal.SIGKILL)
    # The launcher may still import torch.
    wait_for(lambda: running(run_dir).get("n0", after["n0"]) != after["n0"], "n0 is back", 30)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert time.monotonic() - started < 12
    assert running(run_dir) == {}
    assert run_dir.owner() == 0


def test_nothing_outlives_a_killed_up(up: tuple[subprocess.Popen[str], RunDir, str]) -> None:
    process, run_dir, _ = up
    assert len(running(run_dir)) == 6
    process.kill()
    process.wait(5)
    wait_for(lambda: not running(run_dir), "everything has ended", 15)


def children(pid: int) -> dict[int, tuple[str, str]]:
    """State and command of each child of a process, as /proc of this machine has them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            name, fields = path.read_text().rsplit(")", 1)
            if int(fields.split()[1]) == pid:
                command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(path.parent.name)] = (fields.split()[0], command or name)
    return found


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_process_1_of_a_container_leaves_no_zombies(tmp_path: Path) -> None:
    """Nodes outlive their launcher, and then belong to process 1; when they die, somebody has to reap them."""
    run_dir = RunDir(tmp_path / "run")
    sizes = ["--instances", "2", "--stages", "2", "--gateway-port", "0", "--admin-port", "0"]
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *COMMAND, "up"]
    with (
        (tmp_path / "stderr").open("w") as err,
        subprocess.Popen(
            [*command, "--run-dir", str(run_dir.path), *sizes], stdout=subprocess.PIPE, stderr=err, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert any("Ctrl-C" in line for line in process.stdout), (tmp_path / "stderr").read_text()
            (first,) = children(process.pid)
            for rounds in (1, 2):
                launcher = next(p for p, (_, cmd) in children(first).items() if "dataplane.launcher" in cmd)
                forked = list(children(launcher))
                assert len(forked) == FORKED
                os.kill(launcher, signal.SIGKILL)
                wait_for(lambda n=rounds: log_has(run_dir, "adopted", 4 * n), "all are adopted", 30)  # type: ignore[misc]
                for child in forked:
                    with contextlib.suppress(ProcessLookupError):  # the new launcher has replaced the relay
                        os.kill(child, signal.SIGKILL)
                wait_for(lambda gone=forked: not any(Path(f"/proc/{p}").exists() for p in gone), "reaped", 10)  # type: ignore[misc]
                wait_for(
                    lambda: not any(state == "Z" for state, _ in children(first).values()), "no zombie", 10
                )
                wait_for(
                    lambda old=launcher: len(children(launcher_of(first, old))) == FORKED, "fresh ones", 30
                )  # type: ignore[misc]
        finally:
            process.kill()


FORKED = 4 + 1  # nodes, and the relay of their host


def launcher_of(first: int, old: int) -> int:
    return next((p for p, (_, cmd) in children(first).items() if "dataplane.launcher" in cmd and p != old), 0)


def log_has(run_dir: RunDir, text: str, times: int) -> bool:
    return run_dir.log("launcher").read_text().count(f'"{text}"') >= times
