"""Keeps the processes of one host running: starts them, sees their deaths, starts them again, ends them in order.

The launcher keeps nodes with it and `kfadmin up` everything else. All happens in `turn`, in one thread, and nothing
here starts another one, since the launcher forks. Deaths are seen through pidfds. The first death is mended at once;
the pause before the next start grows while deaths come quickly, or while another process has the name in the cluster.

Files in the run directory:
    FOLDER/NAME.json  ProcessFile: who runs now, and how the one before ended. A supervisor that was killed and started
                      again adopts whom it finds there, and they never notice
    hold/NAME         while this empty file exists NAME is not started again
    logs/NAME.log     stdout and stderr, appended; NAME.log.1 is what was there before it grew too large
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any, Protocol

import msgspec

from controlplane.backoff import Backoff
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.files import replace_file
from controlplane.contract.lifetime import EXIT_NAME_TAKEN
from controlplane.contract.logs import LOG_LOOK_S, bound_logs
from controlplane.process import parent_of, start_ticks
from controlplane.unreadable import UNREADABLE

QUICK_DEATH_S = 10.0  # a process that dies younger than this is one that "keeps dying"
QUICK_EXIT_S = 1.0  # a retired process served before it left; one that exits 0 faster than this is broken
HOLD_POLL_S = 0.05
KILL_LIMIT_S = 2.0
REAP_EVERY_S = 0.5
SAID_BYTES = 4096
SAID_CHARACTERS_MAX = 500
PR_SET_CHILD_SUBREAPER = 36

Begin = Callable[[IO[bytes]], int]  # starts a process that writes to this log; its pid. Raises OSError


class Log(Protocol):
    """What a supervisor says of its children: a structlog logger, or what looks like one."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class ProcessFile(msgspec.Struct, frozen=True):
    """FOLDER/NAME.json: one process for certain. A pid may be used again, a pid with its start time may not."""

    # 0: it could not be started, and `said` has why.
    pid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    started: float  # unix seconds
    restarts: int
    start_ticks: int  # field 22 of /proc/PID/stat; 0: it has ended
    ended: int | None = None  # exit code of the last one that ended (negative: its signal); None: not known
    said: str = ""  # the last line of its log, if it failed; what kept it from starting

    @property
    def alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks

    @property
    def taken(self) -> bool:
        """Whether the last one ended because another process has its name; `said` has who."""
        return self.ended == EXIT_NAME_TAKEN


@dataclass(slots=True)
class Child:
    """One process: running when `fd` is open, else to be started at `due` (monotonic seconds; None: never)."""

    name: str
    begin: Begin
    file: Path
    backoff: Backoff
    pause_s: float = 0.0  # before each restart, besides
    due: float | None = 0.0
    pid: int = 0
    fd: int = -1  # pidfd
    ours: bool = True  # false: adopted from another parent, who gets its exit status
    since: float = 0.0  # monotonic: when it was started
    starts: int = 0
    quick_deaths: int = 0
    leaving: bool = False
    ended: int | None = None
    said: str = ""
    last: ProcessFile | None = None  # what its file says, or would if it could be written

    @property
    def running(self) -> bool:
        return self.fd >= 0


class Supervisor:
    """Single-threaded: only `wake` may be called from other threads."""

    def __init__(
        self,
        run_dir: Path,
        log: Log,
        *,
        pause_first_s: float,
        pause_max_s: float,
        restart: bool = True,
        orphans: bool = False,
    ) -> None:
        """`pause_first_s` to `pause_max_s`: before starts of what keeps dying.
        `orphans`: no other thread of this process starts processes, and what its children leave behind is its own, as
        it is process 1's. Raises OSError where the kernel does not give them to it."""
        self._run_dir = run_dir
        self._log = log
        self._pause_first_s = min(pause_first_s, pause_max_s)
        self._pause_max_s = pause_max_s
        self._restart = restart
        self._orphans = orphans
        if orphans:
            become_subreaper()
        self._children: dict[str, Child] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._wake_write = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._caught: Sequence[int] = ()
        self._look_at = 0.0  # at the logs' sizes
        self.signals: list[int] = []  # that came, of those that `catch` was told of

    # ---- for its owner

    def add(self, name: str, folder: str, begin: Begin, pause_s: float = 0.0) -> None:
        """From now on keep this child running. It is adopted if it runs already, else the next `turn` starts it.

        `pause_s`: before each restart, also the first."""
        file = self._run_dir / folder / f"{name}.json"
        child = Child(name, begin, file, Backoff(self._pause_first_s, self._pause_max_s), pause_s)
        self._children[name] = child
        self._adopt(child)

    def pids(self) -> dict[str, int]:
        """Of those that run now."""
        return {child.name: child.pid for child in list(self._children.values()) if child.running}

    def processes(self) -> dict[str, ProcessFile]:
        """Of those that were started, or could not be: what the files say, or would if they could be written."""
        return {child.name: child.last for child in list(self._children.values()) if child.last}

    def turn(self, limit_s: float = LOG_LOOK_S) -> None:
        """Wait until something happens, `limit_s` at most, and do what is due."""
        now = time.monotonic()
        due = (
            [] if self.signals else [child.due for child in self._children.values() if child.due is not None]
        )
        until = min([now + limit_s, self._look_at, *due])
        if self._orphans:
            until = min(until, now + REAP_EVERY_S)
        for key, _ in self._selector.select(max(0.0, until - now)):
            if isinstance(key.data, Child):
                self._died(key.data)
            else:
                self._wake.recv(64)
        if self._orphans:
            self._reap_orphans()
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOG_LOOK_S
            bound_logs(self._log_of(name) for name in self._children)
        self._start_due()

    def wake(self) -> None:
        """Let `turn` return. From any thread."""
        with contextlib.suppress(BlockingIOError):  # it is full: it returns anyway
            self._wake_write.send(b".")

    def catch(self, numbers: Sequence[int]) -> None:
        """From now on these signals are noted in `signals` and wake `turn`. For the main thread."""

        def note(number: int, _frame: FrameType | None) -> None:
            self.signals.append(number)

        self._caught = numbers
        for number in numbers:
            signal.signal(number, note)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # in case they were blocked across an exec

    def send(self, name: str, number: int) -> None:
        """A signal to this child, if it runs."""
        child = self._children[name]
        if child.running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(child.fd, number)

    def end(self, names: Iterable[str], grace_s: float) -> None:
        """SIGTERM to all of these at once, SIGKILL to those left after `grace_s`; returns when all are gone.

        The others are kept running meanwhile. Raises KevlarFlowError."""
        ending = [self._children[name] for name in names if name in self._children]
        for child in ending:
            child.leaving, child.due = True, None
        for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_LIMIT_S)):
            for child in ending:
                self.send(child.name, number)
            deadline = time.monotonic() + limit_s
            while any(child.running for child in ending) and (left := deadline - time.monotonic()) > 0:
                self.turn(left)
        if stuck := [child.name for child in ending if child.running]:  # stuck in the kernel
            raise KevlarFlowError(f"did not die of SIGKILL: {', '.join(stuck)}")

    def remove(self, name: str) -> None:
        """A child that was ended, and is not to come back: nothing is left to say of it."""
        child = self._children.pop(name)
        child.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of everything; children run on."""
        self._selector.close()
        for child in self._children.values():
            if child.running:
                os.close(child.fd)
                child.fd = -1
        self._wake.close()
        self._wake_write.close()

    def left_by_fork(self) -> None:
        """In a forked child: nothing of this supervisor is its own, neither signals nor descriptors."""
        signal.set_wakeup_fd(-1)
        for number in (*self._caught, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.close()

    # ---- starting

    def _adopt(self, child: Child) -> None:
        try:
            file = msgspec.json.decode(child.file.read_bytes(), type=ProcessFile)
        except FileNotFoundError:
            return
        except UNREADABLE as error:
            self._log.warning("a process file is not readable", file=str(child.file), error=str(error))
            return
        child.starts = file.restarts + 1
        if not file.pid:
            return
        try:
            fd = os.pidfd_open(file.pid)
        except ProcessLookupError:
            return
        # Compared after the pidfd has pinned the process. One that died while this process was executed anew is still
        # its zombie: its death is seen, and reaped, in the next turn.
        if not file.alive and not _is_our_zombie(fd):
            os.close(fd)
            return
        child.pid, child.fd, child.due, child.last = file.pid, fd, None, file
        child.since = time.monotonic() - max(0.0, time.time() - file.started)
        child.ours = parent_of(file.pid) == os.getpid()  # where this process supervised it before, as well
        self._selector.register(fd, selectors.EVENT_READ, child)
        self._log.info("adopted", child=child.name, child_pid=file.pid)

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if child.due is None or child.due > now or self.signals:
                continue
            if self._held(child):
                child.due = now + HOLD_POLL_S
            else:
                self._start(child)

    def _start(self, child: Child) -> None:
        before = time.monotonic()
        try:
            with self._log_of(child.name).open("ab", buffering=0) as log:
                pid = child.begin(log)
            fd = _watched(pid)
        except OSError as error:  # no memory, no disk, too many processes: the others go on
            child.pid, child.since, child.starts = 0, before, child.starts + 1
            child.ended, child.said = None, f"{child.name} cannot be started: {error}"
            child.due = before + child.backoff.next_s()
            self._record(child)
            self._log.error("cannot start", child=child.name, error=str(error))
            return
        child.pid, child.fd, child.ours, child.due = pid, fd, True, None
        child.since, child.starts = time.monotonic(), child.starts + 1
        self._selector.register(fd, selectors.EVENT_READ, child)
        self._record(child)
        took_s = round(time.monotonic() - before, 4)
        self._log.info("started", child=child.name, child_pid=pid, restarts=child.starts - 1, took_s=took_s)

    def _record(self, child: Child) -> None:
        started = time.time() - (time.monotonic() - child.since)
        # Once it is reaped its pid may be another process's, which nobody may take for it.
        ticks = (start_ticks(child.pid) or 0) if child.running else 0
        child.last = ProcessFile(child.pid, started, child.starts - 1, ticks, child.ended, child.said)
        try:  # no process outlives a power failure, and the others do not wait for the disk
            replace_file(child.file, msgspec.json.encode(child.last), durable=False)
        except OSError as error:  # the child can still serve, but a next supervisor will not find it
            self._log.error("cannot write the process file", child=child.name, error=str(error))

    # ---- ending

    def _died(self, child: Child) -> None:
        status, age_s = self._reap(child), time.monotonic() - child.since
        child.ended, child.said = status, ""
        if status is not None and status > 0:
            child.said = last_line(self._log_of(child.name))
        taken = status == EXIT_NAME_TAKEN  # its age says only how long it waited for its name
        retired = status == 0 and age_s >= QUICK_EXIT_S
        if not taken and (retired or age_s >= QUICK_DEATH_S):
            child.quick_deaths = 0
            child.backoff.succeeded()
        else:
            child.quick_deaths += 1
        pause_s = child.backoff.next_s() if taken or child.quick_deaths > 1 else 0.0
        pause_s = 0.0 if self._held(child) else round(pause_s + child.pause_s, 3)
        restarts = self._restart and not child.leaving
        child.due = time.monotonic() + pause_s if restarts else None
        self._record(child)
        why = {"said": child.said} if child.said else {}
        self._log.info(
            "retired" if retired else "died", child=child.name, child_pid=child.pid, status=status,
            age_s=round(age_s, 3), restart_in_s=pause_s if restarts else None, **why,
        )  # fmt: skip

    def _reap(self, child: Child) -> int | None:
        """Exit code as Python gives it (negative: the signal); None for somebody else's child."""
        self._selector.unregister(child.fd)
        os.close(child.fd)
        child.fd = -1
        return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) if child.ours else None

    def _reap_orphans(self) -> None:
        ours = {child.pid for child in self._children.values() if child.running}
        with contextlib.suppress(ChildProcessError):  # there is none
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in ours:
                    return  # its death is about to be seen; the others' turn comes after
                os.waitpid(found.si_pid, 0)

    def _held(self, child: Child) -> bool:
        return (self._run_dir / "hold" / child.name).exists()

    def _log_of(self, name: str) -> Path:
        return self._run_dir / "logs" / f"{name}.log"


def run_command(command: Sequence[str], env: Mapping[str, str] | None = None) -> Begin:
    """How a child begins that is a program of its own."""

    def begin(log: IO[bytes]) -> int:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, process_group=0
        )
        process.returncode = 0  # reaped through its pid; tells Popen that there is nothing to wait for
        return process.pid

    return begin


def become_subreaper() -> None:
    """From now on orphaned descendants of this process become its children, as if it were process 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def last_line(log: Path) -> str:
    """The last thing that a log says, for people; of a line of JSON its event. "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - SAID_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    line = next((line for line in reversed(lines) if line.strip()), b"")
    with contextlib.suppress(*UNREADABLE):
        line = msgspec.json.decode(line, type=_LogLine).event.encode()
    return line.decode(errors="replace").strip()[:SAID_CHARACTERS_MAX]


class _LogLine(msgspec.Struct):
    event: str


def _is_our_zombie(fd: int) -> bool:
    try:
        return os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # somebody else's
        return False


def _watched(pid: int) -> int:
    """A pidfd of a child. One that cannot be watched does not live on unseen. Raises OSError."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
