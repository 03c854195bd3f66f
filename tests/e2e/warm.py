"""Quick first starts for clusters of tests: a controller, gateway or launcher begins as a fork of a process that has
imported its code, as nodes begin as forks of their launcher.

What is shared is the import, half of what a cluster's start costs in processor time. The fork has the arguments,
environment, descriptors, process group and parent that the program would have, and runs the same `main`. Only first
starts, which no test is about, are forks: what is started again, after a kill or by a rolling restart, is the program
itself, with the code that is then installed.

    python -m tests.e2e.warm MODULE SOCKET
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

import msgspec

from controlplane.contract.version import code_version
from controlplane.kfadmin.shim import PR_SET_PDEATHSIG
from controlplane.kfadmin.supervise import tied
from controlplane.supervisor import PR_SET_CHILD_SUBREAPER, Begin

LAUNCHER = "dataplane.launcher"
# What each begins with, and imports besides before it serves.
MODULES = {
    "controlplane.main": (
        "controlplane.history.migrate",
        "pydantic.v1",
        "sqlalchemy.dialects.sqlite.aiosqlite",
    ),
    "web.gateway.main": (),
    LAUNCHER: (),
}
OF_EACH_TEST = "PYTEST_CURRENT_TEST"  # the one variable in which one test's processes differ from another's
REQUEST_BYTES_MAX = 64 * 1024
ANSWER_S = 60.0
LOCK = threading.Lock()


def _of_python(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("PYTHON")}


OF_PYTHON = _of_python(os.environ)  # whoever sets another one wants another program


class Warm:
    """A process that has imported one module, and becomes its program in forks. Ends with this process."""

    def __init__(self, module: str, env: Mapping[str, str]) -> None:
        self.env = env
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(ANSWER_S)
        with theirs:
            command = [sys.executable, "-m", "tests.e2e.warm", module, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=env, pass_fds=[theirs.fileno()], process_group=0
            )
        self._answer()  # all has been imported

    def fork(self, command: Sequence[str], log: IO[bytes]) -> int:
        """The pid of a new child of this process. Raises OSError."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # the fork's parent ends at once, and leaves it to us
        try:
            socket.send_fds(self._socket, [msgspec.json.encode(command)], [log.fileno()])
            return int(self._answer())
        finally:
            _prctl(PR_SET_CHILD_SUBREAPER, 0)

    def _answer(self) -> bytes:
        if not (answer := self._socket.recv(64)):
            raise OSError("the process that forks has ended")
        return answer

    def close(self) -> None:
        self._socket.close()
        self._process.wait(ANSWER_S)


_warm: dict[str, Warm] = {}


@atexit.register
def _close() -> None:
    for process in _warm.values():
        process.close()


def quick(command: Sequence[str], env: Mapping[str, str]) -> Begin:
    """How a child begins that is a program of its own, from its second start on."""
    program = tied(command, env)
    module = command[2] if list(command[:2]) == [sys.executable, "-m"] else ""
    if module not in MODULES or _of_python(env) != OF_PYTHON:
        return program
    common = {name: value for name, value in env.items() if name != OF_EACH_TEST}
    with LOCK:
        if module in _warm and _warm[module].env != common:
            _warm.pop(module).close()
        if module not in _warm:
            _warm[module] = Warm(module, common)
        warm = _warm[module]
    starts = 0

    def begin(log: IO[bytes]) -> int:
        nonlocal starts
        starts += 1
        if starts > 1:
            return program(log)
        with LOCK:
            return warm.fork(command, log)

    return begin


# ---- in the process that forks


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _import(module: str) -> None:
    given = dict(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's would be started at import
    for name in (module, *MODULES[module]):
        importlib.import_module(name)
    code_version()  # while the files are the ones that are imported: forks register what they run
    if module == LAUNCHER:
        launcher = importlib.import_module(LAUNCHER)
        launcher.preload(launcher.RELAY_TARGET)
        launcher.preload(launcher.TARGET)
    os.environ.clear()
    os.environ.update(given)
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, every page that the forks share
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"importing {module} has started {len(threads) - 1} threads"


def _fork(requests: socket.socket) -> list[str]:
    """Answers requests, each with a fork's pid, until there are no more. In each fork: the command that it is to be."""
    supervisor = os.getppid()
    requests.send(b"ready")
    while True:
        request, logs, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 1)
        if not request:
            return []
        pid_read, pid_write = os.pipe()
        left_read, left_write = os.pipe()
        between = os.fork()
        if between == 0:
            if pid := os.fork():
                os.write(pid_write, str(pid).encode())
                os._exit(0)
            os.close(left_write)
            os.read(left_read, 1)  # nothing comes: it is closed when the parent is the supervisor
            for descriptor in (pid_read, pid_write, left_read):
                os.close(descriptor)
            _become(supervisor, logs[0])
            return msgspec.json.decode(request, type=list[str])
        os.waitpid(between, 0)
        for descriptor in (pid_write, left_read, left_write, *logs):
            os.close(descriptor)
        requests.send(os.read(pid_read, 64))
        os.close(pid_read)


def _become(supervisor: int, log: int) -> None:
    """What `run_command` and the shim do before the program begins."""
    os.setpgid(0, 0)
    for to in (1, 2):
        os.dup2(log, to)
    os.close(log)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        sys.exit("the supervisor is gone")


def main() -> None:
    module, descriptor = sys.argv[1:]
    _import(module)
    with socket.socket(fileno=int(descriptor)) as requests:
        command = _fork(requests)
    if command:
        sys.orig_argv[:] = command  # with which a launcher becomes a fresh one
        sys.argv[:] = command[2:]
        importlib.import_module(module).main()


if __name__ == "__main__":
    main()
