"""Harm to real processes, and its ways back: asked for, and when nobody is left to ask."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controlplane.contract.errors import KevlarFlowError
from controlplane.kfadmin.chaos import perform
from controlplane.kfadmin.chaos.gameday import Begin, Undo
from controlplane.kfadmin.chaos.perform import Performer
from controlplane.kfadmin.chaos.plan import FaultKind
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.rundir import RunDir
from controlplane.process import start_ticks
from controlplane.supervisor import ProcessFile


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """n0 of a run directory."""
    for folder in ("pids", "nodes", "relay", "hold"):
        (tmp_path / folder).mkdir()
    with subprocess.Popen(["sleep", "100"]) as child:
        RunDir(tmp_path).write("nodes/n0.json", ProcessFile(child.pid, 0.0, 0, start_ticks(child.pid)))
        yield child
        child.kill()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def performer(path: Path) -> Performer:
    return Performer(RunDir(path), AdminClient(["http://127.0.0.1:1"], "token"))


def test_a_stop_is_undone(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    async def play() -> None:
        one = performer(tmp_path)
        await one.begin(Begin(1, FaultKind.STOP, "n0", 5.0))
        await until(lambda: state(process.pid) == "T", "it stands still")
        await one.undo(Undo(1, FaultKind.STOP, "n0"))
        await until(lambda: state(process.pid) != "T", "it goes on")
        await one.close()

    asyncio.run(play())


def test_a_stop_ends_also_when_nobody_undoes_it(
    process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perform, "LATER_S", 1.0)

    async def play() -> None:
        await performer(tmp_path).begin(Begin(1, FaultKind.STOP, "n0", 0.0))
        await until(lambda: state(process.pid) == "T", "it stands still")
        await until(lambda: state(process.pid) != "T", "it goes on")

    asyncio.run(play())


def test_away_is_held_until_it_is_undone(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    async def play() -> None:
        one = performer(tmp_path)
        await one.begin(Begin(1, FaultKind.AWAY, "n0", 5.0))
        assert process.wait(10) == -9
        assert (tmp_path / "hold" / "n0").exists()
        await one.undo(Undo(1, FaultKind.AWAY, "n0"))
        assert not (tmp_path / "hold" / "n0").exists()
        with pytest.raises(KevlarFlowError, match="n0 does not run"):
            await one.begin(Begin(2, FaultKind.KILL, "n0", 0.0))

    asyncio.run(play())


def test_an_operation_that_cannot_be_asked_for_is_told(
    process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async def play() -> None:
        with pytest.raises(KevlarFlowError, match="no controller answered"):
            await performer(tmp_path).begin(Begin(1, FaultKind.DRAIN, "n0", 1.0))

    asyncio.run(play())
