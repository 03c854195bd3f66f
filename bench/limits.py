"""What this machine can do at most: reading memory, multiplying matrices. Engines are judged by their share of it.

A limit is the best of several passes; what disturbs one is no property of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from kernels.base import Linear
from kernels.cpu import _native, ops
from kernels.cpu.pack import pack
from kernels.memory import Arena

PASSES = 9
ROWS, INPUTS, OUTPUTS = 512, 768, 2048  # a prefill chunk through one of S's products


def read_bandwidth(threads: int, size_bytes: int, device: str = "cpu") -> float:
    """Bytes a second when `threads` threads add up a buffer of this size again and again (int64, the least
    arithmetic). A buffer that fits a cache is read from there, as the weights of a small model are."""
    data = torch.ones(max(size_bytes // 8, 1), dtype=torch.int64, device=device)
    return data.nbytes / min(passes_s(data.sum, threads, device))


def matrix_rate(threads: int, dtype: str, device: str = "cpu") -> float:
    """FLOP/s of torch.matmul (oneDNN on a CPU) on [512, 768] x [768, 2048]; on a GPU on 4096 squares."""
    kind = getattr(torch, dtype)
    m, k, n = (ROWS, INPUTS, OUTPUTS) if device == "cpu" else (4096, 4096, 4096)
    x, w = torch.randn(m, k).to(device, kind), torch.randn(n, k).to(device, kind)
    return 2 * m * k * n / min(passes_s(lambda: torch.nn.functional.linear(x, w), threads, device))


def our_matrix_rate(threads: int, dtype: str) -> float:
    """FLOP/s of our CPU kernel on the same product."""
    kind = getattr(torch, dtype)
    x, out = torch.randn(ROWS, INPUTS).to(kind), torch.empty(ROWS, OUTPUTS, dtype=kind)
    weight = pack(Linear(torch.randn(OUTPUTS, INPUTS).to(kind)), Arena())
    team = _native.Team(threads)
    product = partial(ops.linear, team, x, weight, out, ops.STORE)
    return 2 * ROWS * INPUTS * OUTPUTS / min(passes_s(product, threads, "cpu"))


def passes_s(work: Callable[[], object], threads: int, device: str = "cpu") -> list[float]:
    """Seconds of each of several passes of a piece of work that has run before, with that many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work()
        passes = []
        for _ in range(PASSES):
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            passes.append(time.perf_counter() - started)
        return passes
    finally:
        torch.set_num_threads(before)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
