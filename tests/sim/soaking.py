"""Seeds from within pytest: in a process of their own, because hashes of names must be the same each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def simulator(*arguments: str, limit_s: float = 170.0) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.sim` with these arguments. Real clusters beside it (tests/e2e/outage.py) go first."""
    return subprocess.run(
        ["nice", sys.executable, "-m", "tests.sim", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
