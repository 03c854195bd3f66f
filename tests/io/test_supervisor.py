"""The supervisor on real processes: what it says of one that cannot be started, has ended, or died unseen."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import msgspec
import pytest

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.hosting import WANTED_FILE, Wanted
from controlplane.kfadmin import local, supervise
from controlplane.kfadmin.local import LocalCluster, StartFailed
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.supervise import SupervisorThread
from controlplane.supervisor import ProcessFile, Supervisor, run_command
from dataplane.accelerators import PLACED_FILE, Places
from dataplane.hosted import write_wanted
from dataplane.launcher import Launcher

EXITS_7 = [sys.executable, "-S", "-c", "raise SystemExit(7)"]


class Said:
    """A log that is read."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})

    warning = error = info

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


@contextlib.contextmanager
def supervisor(run_dir: Path, said: Said) -> Iterator[Supervisor]:
    for folder in ("pids", "logs", "hold"):
        (run_dir / folder).mkdir(exist_ok=True)
    found = Supervisor(run_dir, said, pause_first_s=0.01, pause_max_s=0.02, restart=False)
    try:
        yield found
    finally:
        found.close()


def file_of(run_dir: Path, name: str = "a") -> ProcessFile:
    return msgspec.json.decode((run_dir / "pids" / f"{name}.json").read_bytes(), type=ProcessFile)


def no_room(_log: IO[bytes]) -> int:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    said = Said()
    with supervisor(tmp_path, said) as keeper:
        keeper.add("a", "pids", no_room)
        while len(said.of("cannot start")) < 3:
            keeper.turn()
        file = file_of(tmp_path)
        assert file == keeper.processes()["a"]
        assert (file.pid, file.restarts, file.alive) == (0, 2, False)
        assert file.said == "a cannot be started: [Errno 11] Resource temporarily unavailable"
    with supervisor(tmp_path, said) as keeper:  # the next one reads that
        keeper.add("a", "pids", run_command(EXITS_7))
        while not said.of("died"):
            keeper.turn()
    assert (file_of(tmp_path).ended, file_of(tmp_path).restarts) == (7, 3)


def write_process(run_dir: Path) -> Path:
    with supervisor(run_dir, Said()) as keeper:
        keeper.add("a", "pids", no_room)
        keeper.turn()
    return run_dir / "pids" / "a.json"


def write_hosted(run_dir: Path) -> Path:
    write_wanted(run_dir, Wanted(("n0",), ()))
    return run_dir / WANTED_FILE


def write_placed(run_dir: Path) -> Path:
    Places(run_dir, 1).add(["n0"])
    return run_dir / PLACED_FILE


@pytest.mark.parametrize("write", [write_process, write_hosted, write_placed])
def test_files_that_are_replaced_follow_no_link_and_share_no_name(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    (tmp_path / "first").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    planted = (
        tmp_path / "again" / write(tmp_path / "first").relative_to(tmp_path / "first").with_suffix(".new")
    )
    planted.parent.mkdir(parents=True)
    planted.symlink_to(outside)
    written = write(tmp_path / "again")
    assert outside.read_text() == "mine"
    assert not written.is_symlink()
    assert written.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in written.parent.glob("*.new")] == [planted.name]


def test_process_files_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_fd: int) -> None:
        raise AssertionError("the other children wait")

    monkeypatch.setattr(os, "fsync", slow)
    assert write_process(tmp_path).exists()
    assert write_hosted(tmp_path).exists()


def test_a_pid_that_was_given_back_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    with supervisor(tmp_path, said) as keeper:
        keeper.add("a", "pids", run_command(EXITS_7))
        keeper.turn()
        # From now on a process that has nothing to do with it runs under its pid.
        monkeypatch.setattr("controlplane.supervisor.start_ticks", lambda _pid: 77)
        while not said.of("died"):
            keeper.turn()
        assert file_of(tmp_path).start_ticks == 0
        assert not file_of(tmp_path).alive


def test_who_died_while_this_process_was_executed_anew_is_reaped_and_told(tmp_path: Path) -> None:
    said = Said()
    with supervisor(tmp_path, said) as before:
        before.add("a", "pids", run_command(EXITS_7))
        before.turn()
        pid = before.pids()["a"]
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with supervisor(tmp_path, said) as after:
        after.add("a", "pids", run_command(EXITS_7))
        after.turn()
        assert [(line["child_pid"], line["status"]) for line in said.of("died")] == [(pid, 7)]
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        after.end(["a"], 5.0)


# ---- in kfadmin up


def cluster(folder: Path, said: list[str] | None = None) -> LocalCluster:
    (folder / "config.json").write_text("{}")
    config = ClusterConfig(str(folder / "run"), str(folder), (), instances=1, stages=1)
    return LocalCluster(config, progress=[].append if said is None else said.append)


def test_up_says_what_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "run_command", lambda _command, _env: no_room)
    up = cluster(tmp_path)
    with pytest.raises(StartFailed, match=r"^(etcd0|c1|c2|launcher|g1) cannot be started: \[Errno 11\]"):
        up.start()


def test_etcd_is_asked_for_its_version_before_anybody_reaps_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "etcd"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("KF_ETCD_BIN", str(fake))
    begun: list[object] = []
    monkeypatch.setattr(local, "SupervisorThread", begun.append)
    with pytest.raises(ConfigError, match="--version"):
        cluster(tmp_path).start()
    assert not begun


class Keeper:
    """A supervisor's thread that lives for a few looks, and whose children may be hard to end."""

    def __init__(self, looks: int = 0, files: dict[str, ProcessFile] | None = None, stuck: str = "") -> None:
        self.looks = looks
        self.files = files or {}
        self.stuck = stuck
        self.ended: list[str] = []

    def join(self, _limit_s: float) -> bool:
        self.looks -= 1
        return self.looks < 0

    def processes(self) -> dict[str, ProcessFile]:
        return self.files

    def end(self, names: Sequence[str], _grace_s: float) -> None:
        self.ended += names
        if self.stuck in names:
            raise KevlarFlowError(f"did not die of SIGKILL: {self.stuck}")

    def close(self) -> None:
        self.ended.append("the thread")


def test_up_tells_why_processes_fail_and_the_relay_too(tmp_path: Path) -> None:
    said: list[str] = []
    up = cluster(tmp_path, said)
    me = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    alive = ProcessFile(os.getpid(), 0.0, 1, int(me), 3, "c1: controllers/c1 is taken by another process")
    assert alive.alive, "it waits for its name again"
    keeper: Any = Keeper(3, {"c1": alive, "g1": ProcessFile(1, 0.0, 0, 0, -9)})
    up._supervisor = keeper
    for folder, name, text in (
        ("relay", "relay", "relay: another relay runs"),
        ("nodes", "n0", "KeyError: 'x'"),
    ):
        (up.run_dir.path / folder).mkdir(parents=True)
        up.run_dir.write(f"{folder}/{name}.json", ProcessFile(1, 0.0, 1, 0, 1, text))
    with pytest.raises(KevlarFlowError, match="the supervisor's thread has ended"):
        up.wait()
    again = "It is tried again, ever more rarely"
    assert sorted(said) == [
        f"c1: controllers/c1 is taken by another process. {again}",
        f"n0 failed: KeyError: 'x'. {again}",
        f"relay: another relay runs. {again}",
    ]


def test_stopping_goes_on_after_one_that_does_not_end(tmp_path: Path) -> None:
    up = cluster(tmp_path)
    keeper: Any = Keeper(stuck="c1")
    up._supervisor = keeper
    with pytest.raises(KevlarFlowError, match="did not die of SIGKILL: c1"):
        up.stop()
    assert keeper.ended == ["g1", "c1", "c2", "launcher", "etcd0", "the thread"]


class Interrupted(BaseException):
    """What Ctrl-C raises, without ending the test run."""


def test_ctrl_c_while_the_thread_is_watched_does_not_end_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.prepare()
    keeper = SupervisorThread(run_dir)
    sleeper = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    keeper.start("a", sleeper)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            keeper.join(60.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not keeper.join(0.0)
    keeper.end(["a"], 10.0)
    assert not keeper.pids()
    keeper.close()
    assert keeper.join(0.0)
    with pytest.raises(KevlarFlowError, match="the supervisor's thread has ended"):
        keeper.start("b", sleeper)


# ---- in the launcher


def launcher(run_dir: Path) -> Launcher:
    path = run_dir / "cluster.json"
    config = ClusterConfig(str(run_dir), "no-model", (), instances=1, stages=1)
    path.write_bytes(msgspec.json.encode(config))
    return Launcher(config, path, ["n0"], "tests.io.test_launcher:serve")


def test_a_node_that_cannot_be_ended_does_not_keep_the_relay(tmp_path: Path) -> None:
    keeper: Any = Keeper(stuck="n0")
    one = launcher(tmp_path)
    one._children.close()
    one._children = keeper
    with pytest.raises(KevlarFlowError, match="did not die of SIGKILL: n0"):
        one._end()
    assert keeper.ended == ["n0", "relay"]


def test_no_pause_before_a_restart_is_longer_than_10_s(tmp_path: Path) -> None:
    children = launcher(tmp_path)._children
    children.add("n0", "nodes", no_room)
    pauses = [children._children["n0"].backoff.next_s() for _ in range(30)]
    assert 0.1 <= pauses[0] <= 0.2
    assert all(5.0 <= pause_s <= 10.0 for pause_s in pauses[-20:])
    children.close()


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from tests.io.test_supervisor import launcher
one = launcher(Path(sys.argv[1]))
one._children.catch([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def changed():
    os.kill(os.getpid(), signal.SIGTERM)  # comes, and is noted, before signals are held back
    return "code"
one._installed.changed = changed
def execv(path, arguments):
    print(signal.sigpending() == {signal.SIGTERM}, flush=True)
    raise OSError("no such interpreter any more")
os.execv = execv
try:
    one._renew()
except OSError:
    print(one._children.signals[0] == signal.SIGTERM, signal.sigpending(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_signal_outlives_the_renewal_of_the_launcher(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.splitlines()[1:] == ["True", "True set() set()"], done.stderr
