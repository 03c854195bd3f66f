"""Starts what units say, in this host's namespaces: ExecStart and Environment of everything that a target wants.

Nothing of the project is imported: this stands for the machine's own program.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

UNITS = Path("/etc/systemd/system")


def read(name: str) -> dict[str, dict[str, list[str]]]:
    """Sections of a unit; keys may stand in it several times."""
    sections: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
        elif line:
            key, _, value = line.partition("=")
            current.setdefault(key, []).append(value)
    return sections


def start(target: str) -> None:
    for name in read(target)["Unit"]["Wants"][0].split():
        service = read(name)["Service"]
        env = dict(
            word.partition("=")[::2] for text in service.get("Environment", []) for word in shlex.split(text)
        )
        with Path("/var/lib", f"{name}.log").open("ab") as log:
            subprocess.Popen(
                shlex.split(service["ExecStart"][0].replace("%%", "%").replace("$$", "$")),
                env={**os.environ, **env},
                cwd=service["WorkingDirectory"][0],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


def power_off() -> None:
    """Every process of this host's network ends at once, this one last."""
    mine = os.readlink("/proc/self/ns/net")
    others = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and os.readlink(entry / "ns/net") == mine
                and int(entry.name) != os.getpid()
            ):
                others.append(int(entry.name))
        except OSError:  # it has ended
            continue
    for number in (signal.SIGSTOP, signal.SIGKILL):  # at once: nobody sees the others go
        for pid in others:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
    os.kill(os.getpid(), signal.SIGKILL)


match sys.argv[1:]:
    case ["daemon-reload"]:
        pass
    case ["enable", "--now", target] | ["start", target]:
        start(target)
    case ["poweroff", "--force", "--force"]:
        power_off()
    case other:
        sys.exit(f"systemctl of the tests has no {other}")
