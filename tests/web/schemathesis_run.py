"""Runs schemathesis against a server: it asks whatever an OpenAPI document allows, and things that it forbids."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


async def check_by_document(
    url: str,
    key: str,
    examples: int,
    operations: int,
    folder: Path,
    *options: str,
    hooks: str = "",
    limit_s: float = 400,
) -> None:
    """Fails unless all `operations` of the document at `url` answer as it says. `hooks`: a module of schemathesis'."""
    # One worker: Python 3.11 cannot parse in several threads at a time (a SystemError of theirs).
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {key}", "--max-examples", str(examples), "--seed", "1"]
    command += ["--no-color", "--phases", "examples,coverage,fuzzing", "--generation-database", "none"]
    environment = os.environ | ({"SCHEMATHESIS_HOOKS": hooks, "PYTHONPATH": str(ROOT)} if hooks else {})
    run = await asyncio.create_subprocess_exec(
        *command, *options, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(limit_s):
            out, _ = await run.communicate()
    finally:
        if run.returncode is None:
            run.kill()
    assert run.returncode == 0, out.decode()[-6000:]
    assert f"Tested: {operations}" in out.decode()
