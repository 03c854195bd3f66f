"""Seeds from within pytest: in a process of their own, because hashes of names must be the same each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def simulator(*arguments: str, limit_s: float = 170.0) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.sim` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
