"""All-reduce in shared memory: threads and processes as ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kernels.ranks.exchange import Exchange, ExchangeAborted, ExchangeOver, RankMissing, make_memory

ROOT = Path(__file__).parents[2]
SIZES = (1, 7, 2048, 2049, 5000, 100_003)  # on both sides of where the way of summing changes
LIMIT_S = 30.0


def contribution(rank: int, call: int, numbers: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((rank, call)).integers(-(2**58), 2**58, numbers)


def play(exchange: Exchange, calls: int, drift: bool) -> list[bool]:
    """Whether each sum was right. With `drift` ranks are early and late in turn."""
    right = []
    for call in range(calls):
        numbers = SIZES[call % len(SIZES)]
        if drift and (call + exchange.rank) % 3 == 0:
            time.sleep(0.001)
        exchange.place(numbers)[:] = contribution(exchange.rank, call, numbers)
        total = exchange.reduce(numbers, LIMIT_S)
        expected = sum(contribution(rank, call, numbers) for rank in range(exchange.ranks))
        right.append(np.array_equal(total, expected))
    return right


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_has_the_sum_of_all_in_every_call(ranks: int) -> None:
    fd = make_memory(ranks, max(SIZES))
    exchanges = [Exchange(fd, ranks, rank, max(SIZES)) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        outcomes = list(pool.map(lambda e: play(e, 24, drift=True), exchanges))
    os.close(fd)
    assert outcomes == [[True] * 24] * ranks


def test_a_rank_that_does_not_come_is_named_and_ends_it_for_all() -> None:
    fd = make_memory(3, 64)
    first, second, _ = exchanges = [Exchange(fd, 3, rank, 64) for rank in range(3)]
    os.close(fd)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(second.reduce, 64, LIMIT_S)
        with pytest.raises(RankMissing, match=r"rank 2 was not there within 0\.2 s") as missing:
            first.reduce(64, 0.2)
        with pytest.raises(ExchangeAborted):
            waits.result(LIMIT_S)
    assert missing.value.rank == 2
    for exchange in exchanges:
        assert exchange.aborted
        with pytest.raises(ExchangeAborted):
            exchange.reduce(64, LIMIT_S)


def test_who_waits_learns_of_an_abort_at_once() -> None:
    fd = make_memory(2, 64)
    one, other = (Exchange(fd, 2, rank, 64) for rank in range(2))
    os.close(fd)
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            one.reduce(64, LIMIT_S)
        except ExchangeOver as over:
            outcome.append(over)

    thread = threading.Thread(target=wait)
    thread.start()
    other.abort()
    thread.join(LIMIT_S / 2)
    assert not thread.is_alive()
    assert isinstance(outcome[0], ExchangeAborted)


RANK = """
import sys
from kernels.ranks.exchange import Exchange, ExchangeOver
fd, ranks, rank = map(int, sys.argv[1:])
exchange = Exchange(fd, ranks, rank, 4096)
call = 0
while True:
    exchange.place(4096)[:] = rank + call
    try:
        total = exchange.reduce(4096, 20.0)
    except ExchangeOver as over:
        print(type(over).__name__, flush=True)
        break
    assert (total == sum(range(ranks)) + ranks * call).all()
    call += 1
    if call == 50:
        print("under way", flush=True)
"""


def test_processes_share_it_and_outlive_one_that_is_killed() -> None:
    ranks = 3
    fd = make_memory(ranks, 4096)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(fd), str(ranks), str(rank)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, pass_fds=[fd],
        )
        for rank in range(ranks)
    ]  # fmt: skip
    watcher = Exchange(fd, ranks, 0, 4096)  # as the control side of rank 0: it only ends things
    os.close(fd)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "under way\n"
        processes[1].send_signal(signal.SIGKILL)
        processes[1].wait(LIMIT_S)
        watcher.abort()
        for process in (processes[0], processes[2]):
            said, _ = process.communicate(timeout=LIMIT_S)
            assert said == "ExchangeAborted\n"
    finally:
        for process in processes:
            process.kill()
            process.wait(LIMIT_S)


def test_memory_of_another_exchange_is_refused() -> None:
    fd = make_memory(2, 64)
    Exchange(fd, 2, 0, 64)
    with pytest.raises(ValueError, match="the memory has"):
        Exchange(fd, 3, 0, 64)
    with pytest.raises(ValueError, match="another size"):
        Exchange(fd, 2, 1, 63)  # the same number of bytes
    os.close(fd)
    for ranks, rank, numbers in ((0, 0, 64), (2, 2, 64), (2, 0, 0), (65, 0, 64)):
        with pytest.raises(ValueError, match=f"rank {rank} of {ranks} with {numbers} numbers"):
            Exchange(0, ranks, rank, numbers)


def test_too_many_numbers_are_refused() -> None:
    fd = make_memory(1, 64)
    exchange = Exchange(fd, 1, 0, 64)
    os.close(fd)
    for numbers in (0, 65, -1):
        with pytest.raises(ValueError, match="can be reduced"):
            exchange.place(numbers)
        with pytest.raises(ValueError, match="can be reduced"):
            exchange.reduce(numbers, 1.0)
