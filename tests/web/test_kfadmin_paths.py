"""kfadmin for users without a home, and paths that a shell would take apart."""

from __future__ import annotations

import pwd
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controlplane.kfadmin.contexts import contexts_file
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import HOST_RUN_DIR, RunDir, RunDirBusy, default_run_dir


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user is a number: no HOME, and no line in /etc/passwd."""
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "KF_RUN_DIR", "KF_CONTEXTS"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_home_has_the_hosts_place() -> None:
    assert default_run_dir() == HOST_RUN_DIR / ".local" / "state" / "kevlarflow" / "kevlarflow"
    assert contexts_file() == HOST_RUN_DIR / ".config" / "kevlarflow" / "contexts.json"


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["status"], "no cluster was started"),
        (["context", "list"], ""),
        (["up", "--model", "/nonexistent"], "not a Hugging Face checkpoint"),
        (["up", "--model", "~nobody-of-this-name/m"], "~nobody-of-this-name/m: "),
    ],
)
def test_verbs_of_a_user_without_a_home(command: list[str], told: str) -> None:
    found = CliRunner().invoke(app, command)
    assert found.exception is None or isinstance(found.exception, SystemExit)
    assert told in found.output


def test_a_command_that_is_told_can_be_copied(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run dir; ü")
    with run_dir.owned(), pytest.raises(RunDirBusy) as caught, run_dir.owned():
        pass
    command = shlex.split(str(caught.value).split("`")[1])
    assert command == ["kfadmin", "down", "--run-dir", str(run_dir.path)]
