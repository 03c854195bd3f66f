"""Seeds from within pytest: in a process of their own, because hashes of names must be the same each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}


def command(*arguments: str) -> list[str]:
    """`python -m tests.sim` with these arguments. Other tests and their clusters beside it go first."""
    return ["nice", sys.executable, "-m", "tests.sim", *arguments]


def simulator(*arguments: str, limit_s: float = 170.0) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
