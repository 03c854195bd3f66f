"""The seeds that `make test` plays, in pieces, beside tests that leave a core idle and judge nothing by the clock."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from concurrent.futures import Future

from tests.sim.soaking import started

PIECE = 250


class Pieces:
    """One piece after the other, in a process group that is stopped while it may not run."""

    def __init__(self) -> None:
        # By the first seed: exit status, and what was said.
        self.ended: dict[int, Future[tuple[int, str]]] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._may = threading.Event()
        self._over = False

    def begin(self, firsts: list[int]) -> None:
        self.ended = {first: Future() for first in firsts}
        threading.Thread(target=self._play, name="seeds", daemon=True).start()

    def may_run(self, may: bool) -> None:
        with self._lock:
            if may is self._may.is_set():
                return
            (self._may.set if may else self._may.clear)()
            self._signal(signal.SIGCONT if may else signal.SIGSTOP)

    def close(self) -> None:
        """The session may have been cut short."""
        with self._lock:
            self._over = True
            self._may.set()
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _play(self) -> None:
        for first, ended in self.ended.items():
            process = self._start(first)
            if process is None:
                return
            said, _ = process.communicate()
            with self._lock:
                self._process = None
            ended.set_result((process.returncode, said))

    def _start(self, first: int) -> subprocess.Popen[str] | None:
        while True:
            self._may.wait()
            with self._lock:
                if self._over:
                    return None
                if self._may.is_set():
                    self._process = started("soak", str(PIECE), "--first", str(first))
                    return self._process


PIECES = Pieces()
