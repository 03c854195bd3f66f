"""How a relay sees that the process of a node has ended: real processes, killed, stopped and gone before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from controlplane.contract.ids import Member
from dataplane.lifeline import FOLDER, Lifelines, hold

ME = Member("n0", "a")
HOLDS = """
import mmap, sys, time
from pathlib import Path
from controlplane.contract.ids import Member
from dataplane.lifeline import hold
hold(Path(sys.argv[1]), Member("n0", sys.argv[2]))
kept = mmap.mmap(-1, int(sys.argv[3]))
for at in range(0, len(kept), 4096):
    kept[at] = 1
print("held", flush=True)
time.sleep(float(sys.argv[4]))
"""


@contextmanager
def holding(
    run_dir: Path, incarnation: str = "a", memory: int = 4096, for_s: float = 300.0
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", HOLDS, str(run_dir), incarnation, str(memory), str(for_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


async def until(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  (processes tell nobody)
            await asyncio.sleep(0.002)


def test_the_end_of_a_process_is_told_once(tmp_path: Path) -> None:
    async def scene() -> None:
        ended: list[Member] = []
        lifelines = Lifelines(tmp_path, ended.append)
        with holding(tmp_path) as process:
            lifelines.follow(ME)
            lifelines.follow(ME)  # it reports on another stream now
            await asyncio.sleep(0.05)
            assert ended == []
            process.kill()
            await until(lambda: ended)
            assert ended == [ME]
            assert not (tmp_path / FOLDER / str(ME)).exists()

    asyncio.run(scene())


def test_before_its_memory_is_taken_apart(tmp_path: Path) -> None:
    """Its connections break, and it can be waited for, only after that."""

    async def scene() -> None:
        alive: list[bool] = []
        with holding(tmp_path, memory=1 << 30) as process:
            lifelines = Lifelines(tmp_path, lambda _: alive.append(process.poll() is None))
            lifelines.follow(ME)
            await asyncio.sleep(0.05)
            process.kill()
            await until(lambda: alive)
        assert alive == [True]

    asyncio.run(scene())


def test_who_is_stopped_has_not_ended(tmp_path: Path) -> None:
    async def scene() -> None:
        ended: list[Member] = []
        lifelines = Lifelines(tmp_path, ended.append)
        with holding(tmp_path) as process:
            lifelines.follow(ME)
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1.2)  # the length of the fault: longer than a look
            assert ended == []
            process.send_signal(signal.SIGCONT)
            process.terminate()
            await until(lambda: ended)

    asyncio.run(scene())


def test_a_relay_that_comes_later_hears_of_it_too(tmp_path: Path) -> None:
    """Of a process that ended before, and of one whose relay has been replaced."""

    async def scene() -> None:
        first: list[Member] = []
        second: list[Member] = []
        with holding(tmp_path) as process:
            before = Lifelines(tmp_path, first.append)
            before.follow(ME)
            before.close()
            Lifelines(tmp_path, second.append).follow(ME)
            process.kill()
            process.wait()
            await until(lambda: second)
        assert first == []
        with holding(tmp_path, for_s=0.0) as process:
            process.wait()
            Lifelines(tmp_path, first.append).follow(ME)
            await until(lambda: first)

    asyncio.run(scene())


def test_files_of_earlier_processes_go(tmp_path: Path) -> None:
    with holding(tmp_path, "a"):
        pass
    other = tmp_path / FOLDER / "n01@a"
    other.touch()
    with holding(tmp_path, "b"):
        assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["n01@a", "n0@b"]


def test_what_holds_nothing_is_not_waited_for(tmp_path: Path) -> None:
    """No file; one that is empty, too short, or full of something else: nothing is told of it, and nothing breaks."""

    async def scene() -> None:
        ended: list[Member] = []
        lifelines = Lifelines(tmp_path, ended.append)
        lifelines.follow(ME)
        (tmp_path / FOLDER).mkdir()
        for content in (b"", b"\0" * 3, os.urandom(4096)):
            (tmp_path / FOLDER / str(ME)).write_bytes(content)
            lifelines = Lifelines(tmp_path, ended.append)
            lifelines.follow(ME)
            await asyncio.sleep(0.05)
        assert ended == []

    asyncio.run(scene())


def test_without_room_for_the_file_a_node_goes_on(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    hold(tmp_path, ME)
