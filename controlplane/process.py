"""Which process of which machine this is, and whether another one of the same machine has died.

It imports nothing of ours.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

SEPARATOR = " "
PARTS = 5  # host name, boot id, pid namespace, pid, start time


def identity() -> str:
    """A name for this process that no other one of any machine has: "host boot pid-namespace pid start"."""
    pid = os.getpid()
    return SEPARATOR.join((os.uname().nodename, *_machine(), str(pid), str(start_ticks(pid) or 0)))


def is_dead(other: str) -> bool:
    """Whether a process has certainly ended; False when that cannot be told from here (of another machine)."""
    parts = other.split(SEPARATOR)
    if len(parts) != PARTS or tuple(parts[1:3]) != _machine() or not parts[3].isdigit():
        return False
    return str(start_ticks(int(parts[3])) or "") != parts[4]


def describe(other: str) -> str:
    """ "pid 123 on host a", or "" for what is no identity."""
    parts = other.split(SEPARATOR)
    return f"pid {parts[3]} on {parts[0]}" if len(parts) == PARTS else ""


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parent_of(pid: int) -> int:
    """0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@cache
def _machine() -> tuple[str, str]:
    """The boot of this machine, and the namespace in which our pids mean something: both survive a fork."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink("/proc/self/ns/pid")
