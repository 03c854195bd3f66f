"""Run directories: whose they are, and files in them that a full disk, a power failure or a stranger has left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controlplane.contract.api_keys import changing
from controlplane.contract.auth import create_secret, load_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.files import replace_file
from controlplane.history.schema import make_engine
from controlplane.kfadmin import contexts
from controlplane.kfadmin.local import LocalCluster
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import FOLDERS, RunDir, RunDirBusy, RunDirUnusable, create_api_key
from controlplane.kfadmin.up import demo_model
from controlplane.process import start_ticks
from controlplane.supervisor import ProcessFile

UP = ["up", "--gateway-port", "0", "--admin-port", "0", "--run-dir"]


def told(*words: str) -> tuple[int, str]:
    """Exit code and output of a verb, which ended with words, not with a trace."""
    done = CliRunner().invoke(app, list(words))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Rights and content of everything in a folder, itself included."""
    paths = (folder, *folder.rglob("*"))
    return {
        str(p.relative_to(folder)): (p.stat().st_mode, p.read_bytes() if p.is_file() else b"") for p in paths
    }


# ---- whose it is


def strange(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("somebody's")
    folder.chmod(0o1777)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        ("notes.txt",),
        ("etcd/member/snap/db",),  # as /var/lib/etcd is, seen from /var/lib
        ("etcd/member/snap/db", "pids/postgres.json", "hold/mail", "logs/syslog", "apt/lists"),
        ("lock", "work.odt"),
        ("cluster.json", "src/main.c"),
        ("lost+found/x", "home/me/thesis.tex"),
    ],
)
def test_a_directory_of_somebody_else_is_refused_and_stays_as_it_is(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    folder = strange(tmp_path / "dir", *files)
    before = tree(folder)
    code, said = told(*UP, str(folder))
    assert code == 2
    assert "is no run directory" in " ".join(said.split())
    for use in (RunDir(folder).prepare, RunDir(folder).make_folders, RunDir(folder).claim):
        with pytest.raises(RunDirUnusable):
            use()
    assert tree(folder) == before
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777


def first_start(run_dir: RunDir) -> None:
    """All that a start makes before it has settings."""
    run_dir.prepare()


def whole(run_dir: RunDir) -> None:
    """One that has served, and that somebody has put notes into and freed of logs."""
    run_dir.prepare()
    run_dir.write("cluster.json", ClusterConfig(str(run_dir.path), "model", ("127.0.0.1:1",)))
    (run_dir.path / "etcd" / "etcd0").mkdir()
    (run_dir.path / "logs").rmdir()
    (run_dir.path / "notes.txt").touch()


def cut_short(run_dir: RunDir) -> None:
    """A start that a full disk has ended early."""
    (run_dir.path / "pids").mkdir(parents=True)
    (run_dir.path / "lock").touch()
    (run_dir.path / "secret").touch()


def volumes(run_dir: RunDir) -> None:
    """Blank volumes: of the whole, and of etcd's data and the weights."""
    for folder in ("lost+found", "etcd/lost+found", "weights/lost+found"):
        (run_dir.path / folder).mkdir(parents=True)


def joining(run_dir: RunDir) -> None:
    """What a host has of its bundle before anything else."""
    (run_dir.path / "certs").mkdir(parents=True)
    for file in ("secret", "api-keys", "keys.json", "certs/ca.pem", ".host.json.7.new"):
        (run_dir.path / file).write_text("x" * 40)
        (run_dir.path / file).chmod(0o600)


@pytest.mark.parametrize("made", [first_start, whole, cut_short, volumes, joining])
def test_a_directory_of_ours_is_used_again_whatever_became_of_it(
    tmp_path: Path, made: Callable[[RunDir], None]
) -> None:
    run_dir = RunDir(tmp_path / "run")
    made(run_dir)
    with run_dir.owned():
        run_dir.prepare()
    assert all((run_dir.path / folder).is_dir() for folder in FOLDERS)
    assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700


# ---- files that are not whole


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process gets longer than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def change_keys(path: Path) -> None:
    with changing(path):
        pass


def save_contexts(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KF_CONTEXTS", str(path))
        contexts.save(contexts.Contexts("a", {"a": contexts.Context(run_dir="/somewhere")}))


def write_settings(path: Path) -> None:
    RunDir(path.parent).write(path.name, ClusterConfig(str(path.parent), "model", ()))


@pytest.mark.parametrize("write", [create_secret, create_api_key, change_keys, save_contexts, write_settings])
def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, write: Callable[[Path], object]) -> None:
    path = tmp_path / "file.json"
    with full_disk(), pytest.raises(OSError, match="too large"):
        write(path)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    write(path)  # there is room again
    whole_file = path.read_bytes()
    assert len(whole_file) > 4
    path.chmod(0o600)
    with full_disk(), contextlib.suppress(OSError):
        write(path)
    assert path.read_bytes() == whole_file


def test_a_token_that_could_not_be_written_is_not_in_the_way(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    file = tmp_path / "token"
    create = (
        "token", "create", "me", "--role", "viewer", "--file", str(file), "--run-dir", str(run_dir.path)
    )  # fmt: skip
    with full_disk():
        assert CliRunner().invoke(app, list(create)).exit_code == 1
    assert not file.exists()
    code, words = told(*create)
    assert code == 0
    assert "the audit has no line of it" in words, "no cluster runs there"
    assert CliRunner().invoke(app, list(create)).exit_code == 1, "it replaces nothing"


@pytest.mark.parametrize("left", [b"", b"\n", bytes(65)])
def test_what_a_full_disk_left_of_secret_and_key_is_made_anew(tmp_path: Path, left: bytes) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    for file in ("secret", "api-keys"):
        (run_dir.path / file).write_bytes(left)
        (run_dir.path / file).chmod(0o600)
    with pytest.raises(ConfigError, match="shorter than 32"):
        load_secret(run_dir.path / "secret")
    run_dir.prepare()
    assert len(load_secret(run_dir.path / "secret")) == 64
    assert run_dir.api_key().startswith("kf-")
    for file in ("secret", "api-keys"):
        assert stat.S_IMODE((run_dir.path / file).stat().st_mode) == 0o600


def test_contexts_that_a_power_failure_has_emptied_are_none(tmp_path: Path) -> None:
    for left in (b"", bytes(20)):
        (tmp_path / "contexts.json").write_bytes(left)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KF_CONTEXTS", str(tmp_path / "contexts.json"))
            assert contexts.load() == contexts.Contexts()


def test_keys_in_the_clear_stay_away_where_there_are_keys_with_limits(tmp_path: Path) -> None:
    (tmp_path / "api-keys").touch()
    change_keys(tmp_path / "keys.json")
    create_api_key(tmp_path / "api-keys")
    assert (tmp_path / "api-keys").read_bytes() == b""


def test_a_file_is_replaced_with_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o666)
    replace_file(path, b"new", owner=tmp_path.stat())
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o600)


@pytest.mark.parametrize("left", [b"", b'{"pid": 4', bytes(40), b"\xff\xfe", b'{"pid": "x"}'])
def test_what_a_power_failure_left_of_a_process_file_is_passed_over(tmp_path: Path, left: bytes) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    (run_dir.path / "pids" / "c1.json").write_bytes(left)
    me = ProcessFile(os.getpid(), 0.0, 0, start_ticks(os.getpid()) or 0)
    run_dir.write("pids/c2.json", me)
    assert run_dir.processes("pids") == {"c2": me}
    (run_dir.path / "pids" / "c2.json").unlink()
    assert told("down", "--run-dir", str(run_dir.path)) == (0, f"no cluster runs in {run_dir.path}\n")


# ---- who has it


@pytest.mark.parametrize("junk", [b"junk", b"-1", b"1 2", b"\xff", b"99999999", b"1" * 100, "١".encode()])
def test_a_lock_of_nobody_we_know_is_told_of_and_nothing_is_sent_to_it(tmp_path: Path, junk: bytes) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    (run_dir.path / "lock").write_bytes(junk)
    with (run_dir.path / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunDirBusy, match="no pid"):  # before `down`, which would send a signal to a "-1"
            run_dir.owner()
        code, said = told("down", "--run-dir", str(run_dir.path))
        assert (code, "no pid" in " ".join(said.split())) == (3, True)
        with pytest.raises(RunDirBusy, match=r"pid \?"), run_dir.owned():
            pass
    assert run_dir.owner() == 0


# ---- paths


def test_a_path_that_settings_cannot_have_is_refused_before_it_is_made(tmp_path: Path) -> None:
    for path, why in (
        (os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "UTF-8"),
        (f"{tmp_path}/{{process}}", "{process}"),
    ):
        code, said = told(*UP, path)
        assert code == 2
        assert why in said
        assert not os.path.exists(path)
        with pytest.raises(RunDirUnusable):
            RunDir(Path(path)).claim()
        assert not os.path.exists(path)
    assert told("down", "--run-dir", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))[0] == 2


def test_other_paths_that_settings_cannot_have_are_told(tmp_path: Path) -> None:
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/model\xff"))
    model.symlink_to(demo_model())
    with pytest.raises(ConfigError, match="not UTF-8"):
        LocalCluster(ClusterConfig(str(tmp_path / "run"), str(model), ()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["who?", "a%20b", "50%", "what?timeout=1", "ü #&;+ x", "plain"])
def test_the_history_is_in_its_run_directory_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    config = ClusterConfig(str(tmp_path / name), "model", ())
    url = make_engine(config.database).url
    assert (url.database, dict(url.query)) == (str(tmp_path / name / "history.db"), {})
