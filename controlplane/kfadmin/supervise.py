"""Child processes of `kfadmin up`: started, watched through pidfds, put back when they die, ended in order.

All of it happens in one thread that lives as long as the supervisor: the kernel ties a child to the
thread that started it (see shim.py), so children end when this process does, even by kill -9.

Nodes outlive the launcher that started them. Where the supervisor owns its process (`orphans`), they are given to it
then, as they are to process 1 of a container, and it reaps them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.logs import LOG_LOOK_S, bound_logs
from controlplane.kfadmin.rundir import ProcessFile, RunDir
from controlplane.process import start_ticks

T = TypeVar("T")

SHIM = Path(__file__).with_name("shim.py")
BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
QUICK_DEATH_S = 10.0
CALL_LIMIT_S = 15.0
REAP_EVERY_S = 0.5
PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """From now on orphaned descendants of this process become its children, as if it were process 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@dataclass(slots=True)
class Child:
    """One process and how it is doing. Touched by the supervisor's thread only, but for reads of plain values."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    fd: int = -1
    due: float | None = None  # monotonic time of the next start; None: running, held or ended
    started: float = 0.0
    starts: int = 0
    quick_deaths: int = 0
    held: bool = False
    ending: bool = False
    gone: threading.Event = field(default_factory=threading.Event)


class Supervisor:
    """Keeps children running. Methods may be called from any thread; each returns when it has been done."""

    def __init__(
        self,
        run_dir: RunDir,
        *,
        restart: bool = True,
        env: Mapping[str, str] | None = None,
        orphans: bool = False,
    ) -> None:
        """`orphans`: no other thread of this process starts processes, and what its children leave behind is its own.

        Raises OSError where the kernel does not give them to it."""
        self._run_dir = run_dir
        self._orphans = orphans
        if orphans:
            become_subreaper()
        self._restart = restart
        self._env = {**os.environ, **(env or {})}
        self._children: dict[str, Child] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake, self._wake_write = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    # ---- for callers

    def start(self, name: str, command: list[str]) -> None:
        """Start a child and keep it running. Raises OSError when it cannot be started at all."""

        def act() -> None:
            child = self._children[name] = Child(name, command)
            self._spawn(child)

        self._call(act)

    def kill(self, name: str, number: int) -> None:
        """Send a signal. Raises KeyError for an unknown child, ProcessLookupError when it is not running."""
        self._call(lambda: self._signal(self._children[name], number))

    def hold(self, name: str) -> None:
        """From now on leave the child dead when it dies."""

        def act() -> None:
            self._children[name].held = True
            self._children[name].due = None

        self._call(act)

    def release(self, name: str) -> None:
        """End of `hold`: start the child if it is dead."""

        def act() -> None:
            child = self._children[name]
            child.held = False
            if child.fd < 0:
                child.due = time.monotonic()

        self._call(act)

    def pids(self) -> dict[str, int]:
        """Of those that run now."""
        children = list(self._children.values())
        return {c.name: c.process.pid for c in children if c.fd >= 0 and c.process is not None}

    def starts(self, name: str) -> int:
        return self._children[name].starts

    def end(self, names: list[str], grace_s: float) -> None:
        """SIGTERM to all of these at once, SIGKILL to those left after `grace_s`; returns when all are gone."""
        known = [self._children[name] for name in names if name in self._children]
        for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 2.0)):
            for child in known:
                self._call(partial(self._end_one, child, number))
            deadline = time.monotonic() + limit_s
            for child in known:
                child.gone.wait(max(0.0, deadline - time.monotonic()))
        if stuck := [child.name for child in known if not child.gone.is_set()]:
            raise KevlarFlowError(f"did not die of SIGKILL: {', '.join(stuck)}")

    def join(self) -> None:
        """Wait until the thread has ended (`close`, or an error of its own)."""
        while self._thread.is_alive():
            self._thread.join(60.0)

    def close(self) -> None:
        """End the thread; children must have been ended before."""
        self._closing = True
        self._wake_write.send(b".")
        self._thread.join(CALL_LIMIT_S)
        if self._thread.is_alive():  # what it uses must not be closed under it
            raise KevlarFlowError("the supervisor's thread did not end")
        self._selector.close()
        self._wake.close()
        self._wake_write.close()

    # ---- the thread

    def _call(self, act: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def perform() -> None:
            try:
                future.set_result(act())
            except Exception as error:  # it belongs to the caller
                future.set_exception(error)

        self._calls.append(perform)
        self._wake_write.send(b".")
        return future.result(CALL_LIMIT_S)

    def _run(self) -> None:
        look_at = 0.0
        while not self._closing:
            now = time.monotonic()
            due = [child.due for child in self._children.values() if child.due is not None]
            due.append(now + (REAP_EVERY_S if self._orphans else LOG_LOOK_S))
            if now >= look_at:
                look_at = now + LOG_LOOK_S
                bound_logs(self._run_dir.log(name) for name in self._children)
            for key, _ in self._selector.select(max(0.0, min(due) - now)):
                if isinstance(key.data, Child):
                    self._died(key.data)
                else:
                    self._wake.recv(64)
            if self._orphans:
                self._reap_orphans()
            while self._calls:
                self._calls.popleft()()
            for child in self._children.values():
                if child.due is not None and child.due <= time.monotonic():
                    self._respawn(child)

    def _spawn(self, child: Child) -> None:
        command = [sys.executable, "-S", "-E", str(SHIM), str(os.getpid()), *child.command]
        with self._run_dir.log(child.name).open("ab", buffering=0) as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, process_group=0
            )
        child.process, child.fd, child.due = process, os.pidfd_open(process.pid), None
        child.started, child.starts = time.monotonic(), child.starts + 1
        child.gone.clear()
        self._selector.register(child.fd, selectors.EVENT_READ, child)
        file = ProcessFile(process.pid, time.time(), child.starts - 1, start_ticks(process.pid) or 0)
        self._run_dir.write(f"pids/{child.name}.json", file)

    def _respawn(self, child: Child) -> None:
        try:
            self._spawn(child)
        except OSError as error:  # no memory or disk just now
            if child.fd < 0:
                child.due = time.monotonic() + BACKOFF_MAX_S
            with contextlib.suppress(OSError), self._run_dir.log("kfadmin").open("a") as log:
                log.write(f"cannot start {child.name}: {error}\n")

    def _died(self, child: Child) -> None:
        self._selector.unregister(child.fd)
        os.close(child.fd)
        child.fd = -1
        assert child.process is not None
        child.process.wait()
        child.gone.set()
        quick = time.monotonic() - child.started < QUICK_DEATH_S
        child.quick_deaths = child.quick_deaths + 1 if quick else 0
        if self._restart and not child.held and not child.ending:
            delay_s = BACKOFF_S * 2.0 ** min(child.quick_deaths, 10) if child.quick_deaths > 1 else 0.0
            child.due = time.monotonic() + min(BACKOFF_MAX_S, delay_s)

    def _reap_orphans(self) -> None:
        ours = {child.process.pid for child in self._children.values() if child.process and child.fd >= 0}
        with contextlib.suppress(ChildProcessError):  # there is none
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in ours:
                    return  # its death is about to be seen; the others' turn comes after
                os.waitpid(found.si_pid, 0)

    def _signal(self, child: Child, number: int) -> None:
        if child.fd < 0:
            raise ProcessLookupError(f"{child.name} is not running")
        signal.pidfd_send_signal(child.fd, number)

    def _end_one(self, child: Child, number: int) -> None:
        child.ending, child.due = True, None
        if child.fd < 0:
            child.gone.set()
        else:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(child.fd, number)
