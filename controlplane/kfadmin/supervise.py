"""Child processes of `kfadmin up`: a supervisor in a thread of its own, for callers in any thread.

All of it happens in one thread that lives as long as the supervisor: the kernel ties a child to the
thread that started it (see shim.py), so children end when this process does, even by kill -9.

Nodes outlive the launcher that started them. Where the supervisor owns its process (`orphans`), they are given to it
then, as they are to process 1 of a container, and it reaps them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.logs import bound_logs
from controlplane.kfadmin.rundir import RunDir
from controlplane.supervisor import Begin, ProcessFile, Supervisor, run_command

T = TypeVar("T")

SHIM = Path(__file__).with_name("shim.py")
PAUSE_FIRST_S = 0.2
PAUSE_MAX_S = 5.0
CALL_LIMIT_S = 15.0


def tied(command: Sequence[str], env: Mapping[str, str]) -> Begin:
    """How a child begins that is a program of its own, and ends when this process does."""
    return run_command([sys.executable, "-S", "-E", str(SHIM), str(os.getpid()), *command], env)


Program = Callable[[Sequence[str], Mapping[str, str]], Begin]  # a command and its environment


class SupervisorThread:
    """Keeps children running. Methods may be called from any thread; each returns when it has been done."""

    def __init__(
        self,
        run_dir: RunDir,
        *,
        restart: bool = True,
        env: Mapping[str, str] | None = None,
        orphans: bool = False,
        program: Program = tied,
    ) -> None:
        """`orphans`: see Supervisor. `program`: how a child begins. Raises OSError where the kernel gives it no
        orphans."""
        self._program = program
        self._env = {**os.environ, **(env or {})}
        self._supervisor = Supervisor(
            run_dir.path,
            _LogFile(run_dir.log("kfadmin")),
            pause_first_s=PAUSE_FIRST_S,
            pause_max_s=PAUSE_MAX_S,
            restart=restart,
            orphans=orphans,
        )
        self._calls: deque[Callable[[], None]] = deque()
        self._closing = False
        self._ended = threading.Event()  # Ctrl-C in `Thread.join` makes Python 3.11 take a thread for ended
        threading.Thread(target=self._run, name="supervisor", daemon=True).start()

    def start(self, name: str, command: list[str]) -> None:
        """From now on keep this child running. What keeps it from starting is in `processes`, and in `kfadmin.log`."""
        begin = self._program(command, self._env)
        self._call(lambda: self._supervisor.add(name, "pids", begin))

    def pids(self) -> dict[str, int]:
        """Of those that run now."""
        return self._supervisor.pids()

    def processes(self) -> dict[str, ProcessFile]:
        """Of those that were started, or could not be."""
        return self._supervisor.processes()

    def end(self, names: list[str], grace_s: float) -> None:
        """SIGTERM to all of these at once, SIGKILL to those left after `grace_s`; returns when all are gone.

        Raises KevlarFlowError."""
        self._call(lambda: self._supervisor.end(names, grace_s))

    def join(self, limit_s: float) -> bool:
        """Whether the thread has ended (`close`, or an error of its own) within so many seconds."""
        return self._ended.wait(limit_s)

    def close(self) -> None:
        """End the thread; children must have been ended before."""
        self._closing = True
        self._supervisor.wake()
        if not self.join(CALL_LIMIT_S):  # what it uses must not be closed under it
            raise KevlarFlowError("the supervisor's thread did not end")
        self._supervisor.close()

    def _call(self, act: Callable[[], T]) -> T:
        if self._ended.is_set():
            raise KevlarFlowError("the supervisor's thread has ended")
        future: Future[T] = Future()

        def perform() -> None:
            try:
                future.set_result(act())
            except Exception as error:  # it belongs to the caller
                future.set_exception(error)

        self._calls.append(perform)
        self._supervisor.wake()
        return future.result(CALL_LIMIT_S)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._supervisor.turn()
                while self._calls:
                    self._calls.popleft()()
        finally:
            self._ended.set()


class _LogFile:
    """What is said of the children: one JSON object a line, as standard error belongs to the person who looks at it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def info(self, event: str, **fields: Any) -> None:
        line = {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        with contextlib.suppress(OSError), self._path.open("ab") as log:  # a full disk costs only the line
            log.write(msgspec.json.encode(line) + b"\n")
        bound_logs([self._path])

    warning = error = info
