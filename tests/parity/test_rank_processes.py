"""A stage of rank processes keeps its bits whoever of them ends, stops or comes back, at any point of a step."""

import subprocess
import sys

import pytest

from tests.parity.rank_processes import LIMIT_S, SCENARIOS


@pytest.mark.parametrize(
    ("kv_heads", "dtype"), [(2, "float32"), (4, "bfloat16"), (6, "bfloat16"), (8, "float32")]
)
def test_ranks_end_and_come_back(kv_heads: int, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.rank_processes", str(kv_heads), dtype],
        capture_output=True,
        text=True,
        timeout=len(SCENARIOS) * LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("equal to the bit\n")
