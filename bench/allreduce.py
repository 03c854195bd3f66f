"""All-reduce between two ranks on one host: the time of a call, against torch.distributed's gloo on the same ranks.

Both add the same 64-bit integers, in turns, in the same two processes. A call is timed on rank 0; before each block of
calls the ranks meet. Each rank's contribution is written by the caller: into the exchange's own memory with ours, into
a tensor with gloo, which reduces in place; both copies are within the time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from bench.contract import Result, progress
from kernels.ranks.exchange import make_memory

RANKS = 2
SIZES = {"1k": 1 << 10, "64k": 64 << 10, "4m": 4 << 20}  # bytes of a contribution
ROOT = Path(__file__).parents[1]
LIMIT_S = 240.0


def run(quick: bool) -> Result:
    rounds = 9 if quick else 31
    result = Result("allreduce", {"ranks": RANKS, "rounds": rounds, "sizes": SIZES, "quick": quick})
    progress(f"allreduce: {RANKS} ranks, {rounds} rounds of both")
    fd = make_memory(RANKS, max(SIZES.values()) // 8)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(RANKS):
                command = [sys.executable, "-m", "bench.allreduce_rank", str(fd), str(RANKS), str(rank)]
                processes.append(
                    subprocess.Popen(
                        [*command, str(Path(folder) / "store"), str(rounds)],
                        cwd=ROOT,
                        stdout=subprocess.PIPE,
                        pass_fds=[fd],
                    )
                )
            said, _ = processes[0].communicate(timeout=LIMIT_S)
            for process in processes:
                if process.wait(LIMIT_S) != 0:
                    raise RuntimeError(f"a rank has ended with {process.returncode}")
    finally:
        os.close(fd)
        for process in processes:
            process.kill()
            process.wait()
    times = msgspec.json.decode(said, type=dict[str, dict[str, list[float]]])
    for label in SIZES:
        result.measure(f"latency_{label}_s", times["ours"][label])
        result.measure(f"gloo_{label}_s", times["gloo"][label], into="baseline")
        # Of each round, as both were measured right after one another in it.
        pairs = zip(times["ours"][label], times["gloo"][label], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        result.ratios[f"vs_gloo_{label}"] = statistics.median(ratios)
        result.spread[f"ratios.vs_gloo_{label}"] = (min(ratios), max(ratios))
    return result
