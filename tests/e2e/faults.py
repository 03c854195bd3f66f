"""Real faults for real processes, without a hook in them: throttled processors, frozen threads, corrupted memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # waitpid(2) __WALL: threads are waited for, too


@contextlib.contextmanager
def throttled(pid: int, share: float, period_s: float = 0.1) -> Iterator[None]:
    """The process runs for `share` of the time only, as under a CPU quota: that many times slower in everything."""
    over = threading.Event()

    def beat() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(period_s * (1.0 - share))
                os.kill(pid, signal.SIGCONT)
                time.sleep(period_s * share)

    thread = threading.Thread(target=beat, name=f"throttle-{pid}")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def frozen_thread(pid: int, tid: int) -> Iterator[None]:
    """One thread of a process stands still, the others run on."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

    def trace(request: int) -> None:
        if libc.ptrace(request, tid, None, None) == -1:
            raise OSError(ctypes.get_errno(), f"ptrace {request:#x} of thread {tid} of {pid}")

    def freeze() -> None:
        trace(PTRACE_SEIZE)
        trace(PTRACE_INTERRUPT)
        os.waitpid(tid, WALL)

    def thaw() -> None:
        with contextlib.suppress(OSError):  # the process has gone
            trace(PTRACE_DETACH)

    with ThreadPoolExecutor(1) as tracer:  # a tracee belongs to the thread that traces it
        tracer.submit(freeze).result()
        try:
            yield
        finally:
            tracer.submit(thaw).result()


def thread_state(pid: int, tid: int) -> str:
    """One letter as in proc(5), "t" while it is frozen; "" if there is no such thread any more."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def thread_times(pid: int) -> dict[int, float]:
    """Processor seconds that each thread of a process has used; of Python's own threads only."""
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("python"):
            times[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return times


def threads_named(pid: int, name: str) -> list[int]:
    """Ids of the threads of a process that have this name."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(task.name) for task in tasks if (task / "comm").read_text().strip() == name)


def overwrite(pid: int, needle: bytes, new: bytes) -> float:
    """Replace every copy of `needle` in the memory that a process may write, as a failing DIMM would; when (unix
    seconds) that began. Raises ValueError if there is none."""
    assert len(needle) == len(new)
    began = 0.0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if match is None:
                continue
            start, end = (int(x, 16) for x in match.groups())
            memory.seek(start)
            try:
                data = memory.read(end - start)
            except OSError:  # [vvar] and the like
                continue
            at = data.find(needle)
            while at >= 0:
                memory.seek(start + at)
                began = began or time.time()
                memory.write(new)
                at = data.find(needle, at + 1)
    if not began:
        raise ValueError(f"process {pid} has no such bytes")
    return began
