"""One rank of `bench allreduce`: python -m bench.allreduce_rank FD RANKS RANK STORE ROUNDS."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from bench.allreduce import SIZES
from kernels.ranks.exchange import Exchange

CALL_BYTES = 16 << 20  # about so many are reduced in a round, in at most CALLS_MAX calls
CALLS_MAX = 200
LIMIT_S = 60.0


def block(call: Callable[[], None], calls: int) -> float:
    """Seconds of one call, of so many in a row."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def main() -> None:
    fd, ranks, rank = map(int, sys.argv[1:4])
    store, rounds = sys.argv[4], int(sys.argv[5])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT_S)
    )
    exchange = Exchange(fd, ranks, rank, max(SIZES.values()) // 8)
    times: dict[str, dict[str, list[float]]] = {"ours": {}, "gloo": {}}
    for label, size in SIZES.items():
        numbers = size // 8
        given = np.random.default_rng(rank).integers(-(2**40), 2**40, numbers)
        source, tensor, out = (
            torch.from_numpy(given),
            torch.empty(numbers, dtype=torch.int64),
            np.empty_like(given),
        )

        def ours(numbers: int = numbers, given=given, out=out) -> None:  # type: ignore[no-untyped-def]
            exchange.place(numbers)[:] = given
            out[:] = exchange.reduce(numbers, LIMIT_S)

        def gloo(source: torch.Tensor = source, tensor: torch.Tensor = tensor) -> None:
            tensor.copy_(source)
            dist.all_reduce(tensor)

        ours()
        gloo()
        if not np.array_equal(out, tensor.numpy()):
            raise SystemExit(f"the sums of {label} differ")
        calls = max(4, min(CALLS_MAX, CALL_BYTES // size))
        for _ in range(rounds):
            times["ours"].setdefault(label, []).append(block(ours, calls))
            times["gloo"].setdefault(label, []).append(block(gloo, calls))
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        sys.stdout.buffer.write(msgspec.json.encode(times))


if __name__ == "__main__":
    main()
