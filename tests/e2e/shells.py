"""Hosts to play a guide on: each has a network namespace, its own /var/lib and units of systemd, and a root shell."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.matrix.namespaces import Network

# Directories of the machine that each host has its own of.
OWN = {"lib": "/var/lib", "units": "/etc/systemd/system"}
END = "--- played:"


def why_not() -> str:
    """What keeps hosts from having directories of their own; "": nothing."""
    if missing := [tool for tool in ("unshare", "mount", "curl") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    if missing := [path for path in OWN.values() if not Path(path).is_dir()]:
        return f"there is no {missing[0]} here to put another one over (package systemd)"
    probe = "mount --bind /var/lib /var/lib"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"mount namespaces are not permitted here: {done.stderr.strip()}"


class Shell:
    """A root shell on a host, in its home directory. Use as a context manager."""

    def __init__(self, network: Network, host: str, folder: Path) -> None:
        self.host, self.home = host, folder / host / "home"
        for name in ("home", *OWN):
            (folder / host / name).mkdir(parents=True)
        mounts = [
            f"mount --bind {shlex.quote(str(folder / host / name))} {path}" for name, path in OWN.items()
        ]
        tools = Path(__file__).parent / "tools"
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("KF_RUN")},
            "HOME": str(self.home),
            "HOSTS": str(folder),
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        script = " && ".join([*mounts, f"cd {shlex.quote(str(self.home))}", "exec sh"])
        command = [*network.command(host), "unshare", "--mount", "sh", "-c", script]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate("", timeout=10.0)

    def play(self, command: str) -> str:
        """What it printed. Raises AssertionError when it failed; a host that was switched off has no answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\nstatus=$?; echo; echo '{END}' $status\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(END):
                code = line.removeprefix(END).strip()
                assert code == "0", f"{self.host}# {command}\nexit code {code}\n{''.join(lines)}"
                return "".join(lines)
            lines.append(line)
        return "".join(lines)

    def logs(self, lines: int = 12) -> str:
        """The end of every log, of units and of nodes."""
        files = sorted((self.home.parent / "lib").rglob("*.log"))
        return "\n".join(
            f"--- {self.host}: {path.name}\n"
            + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in files
        )


def until_gone(network: Network, host: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while subprocess.run(
        ["ip", "netns", "pids", network.namespace(host)], capture_output=True, check=True
    ).stdout:
        assert time.monotonic() < deadline, f"processes on {host} live on"
        time.sleep(0.02)
