"""How the relay of a host knows at once, and for certain, that the process of a node has ended.

A node holds a mutex in a file that the relay waits for (`_fast/lifeline.pyx`). A process that is stopped, hung or cut
off holds it as well: only the end of a process gives it back. Nothing depends on it: without it the end of a node's
report stream and of its links tell, as from another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from controlplane.contract.ids import Member
from dataplane._fast import lifeline

log = structlog.get_logger()

FOLDER = "alive"
LOOK_S = 0.5  # a thread that waits looks so often whether it still has to


def hold(run_dir: Path, member: Member) -> None:
    """By the main thread of a node. Files of its earlier processes, which have ended, go."""
    folder = run_dir / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for old in folder.glob(f"{member.node}@*"):
            old.unlink(missing_ok=True)
        part = folder / f".{member}"
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, lifeline.BYTES)  # on a full disk an error now, not a signal later
            lifeline.hold(fd)
        finally:
            os.close(fd)
        part.rename(folder / str(member))  # whoever finds it finds it held
    except OSError as error:
        log.warning(
            "its relay will not see at once that this process has ended", error=str(error), path=str(folder)
        )


class Lifelines:
    """Of the nodes that report to one relay: a thread for each, which sleeps."""

    def __init__(self, run_dir: Path, on_end: Callable[[Member], None]) -> None:
        """`on_end`: called on the loop that `follow` was called on."""
        self._folder = run_dir / FOLDER
        self._on_end = on_end
        self._followed: set[Member] = set()

    def follow(self, member: Member) -> None:
        """Call `on_end` when its process ends. Of one that holds nothing here nothing is told."""
        if member in self._followed:
            return
        try:
            fd = os.open(self._folder / str(member), os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError):  # the latter for a name that no file can have
            return  # it said so itself
        if os.fstat(fd).st_size < lifeline.BYTES:  # to read behind the end of a file is a signal
            os.close(fd)
            return
        self._followed.add(member)
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._wait, args=(member, fd, loop), name=f"lifeline-{member.node}", daemon=True
        ).start()

    def close(self) -> None:
        self._followed.clear()

    def _wait(self, member: Member, fd: int, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while not lifeline.ended(fd, LOOK_S):
                if member not in self._followed:
                    return
        except OSError as error:
            log.warning("the end of a process will not be seen at once", member=str(member), error=str(error))
            return
        finally:
            os.close(fd)
        with contextlib.suppress(OSError):
            (self._folder / str(member)).unlink()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(self._ended, member)

    def _ended(self, member: Member) -> None:
        if member in self._followed:
            self._followed.discard(member)
            self._on_end(member)
