"""Ranks in processes of their own that end, stop and come back, against one stage of no ranks.

    python -m tests.parity.rank_processes SCENARIO KV_HEADS DTYPE

In a process without threads, as a node is when it forks them."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from dataplane._fast.blocktable import StepArrays
from dataplane.kvcache import KVCache
from dataplane.ranks import stage as ranked
from dataplane.ranks.stage import RankedStage
from kernels.base import DTYPES
from tests.parity.rank_group import BLOCK, BLOCKS, HEAD_DIM, HIDDEN, Requests, random_spec

LIMIT_S = 120.0
ROWS_MAX = 64


class Tried:
    """A stage of ranks and one of fixed-point sums without, over the same rows."""

    def __init__(self, ranks: int, kv_heads: int, dtype: str, middle: bool = False) -> None:
        """`middle`: of the model, so that it takes activations and returns some."""
        spec = random_spec(kv_heads, DTYPES[dtype])
        if middle:
            spec = replace(spec, embed=None, head=None)
        self.middle, self.random = middle, torch.Generator().manual_seed(3)
        kv = KVCache(BLOCKS, len(spec.layers), kv_heads, BLOCK, HEAD_DIM, dtype, shared=True)  # type: ignore[arg-type]
        self.kv = kv
        self.stage = RankedStage(spec, kv, ranks, threads=1, rows_max=ROWS_MAX, context_max=BLOCKS * BLOCK)
        self.requests = Requests(spec, kv_heads, dtype, 5)  # after it: this one has a thread
        self.rows = self.requests.rows
        self.kept: list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = []
        self.seen: set[int] = set()  # numbers of ranks that have computed a step

    def step(self, counts: dict[int, int]) -> None:
        requests = self.requests
        tokens, rows, starts, new = requests.step(counts)
        picked = np.arange(len(tokens), dtype=np.int32)
        step = requests.table.fill(rows, starts, new, StepArrays())
        source: Buffer = self.hidden(len(tokens)) if self.middle else tokens
        want = requests.alone.forward(source, step, picked).copy()
        got = self.stage.forward(source, step, picked)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes(), self.stage.ranks
        if self.middle:
            self.kept.append((got, want))  # activations are the caller's own
        self.seen.add(len(self.stage.ranks))

    def hidden(self, tokens: int) -> Buffer:
        """Random activations, as the stage before sends them."""
        dtype = DTYPES[self.requests.dtype]
        made = torch.randn(tokens, HIDDEN, generator=self.random).to(dtype)
        return made.view(torch.uint8).numpy().reshape(-1)

    def decode(self) -> None:
        self.step(dict.fromkeys(self.rows, 1))

    def until_all(self) -> None:
        """Decodes until all ranks compute again; rows end before they are too long."""
        deadline = time.monotonic() + LIMIT_S
        while len(self.stage.ranks) < self.stage.wanted:
            assert time.monotonic() < deadline, self.stage.ranks
            self.again()
            time.sleep(0.002)

    def finish(self) -> None:
        """All come back, and all end."""
        self.until_all()
        self.decode()
        self.stage.close()

    def again(self) -> None:
        """The same position again: a step that is repeated writes what it wrote."""
        lengths = dict(self.requests.lengths)
        self.decode()
        self.requests.lengths.update(lengths)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.stage.pid(rank), number)

    def end_within(self, ranks: list[int]) -> None:
        """These ranks end while a step waits for them."""
        for rank in ranks:
            self.send(rank, signal.SIGSTOP)
        pids = [self.stage.pid(rank) for rank in ranks]

        def end() -> None:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(0.05, end)
        timer.start()
        self.decode()
        timer.join()


def chain(kv_heads: int, dtype: str) -> None:
    """8 -> 7 -> 6 -> 5 -> 8 in service, some between steps, some within one."""
    tried = Tried(8, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 9))
    assert len(tried.stage.ranks) == 8
    for number, rank in enumerate((3, 6, 0)):
        if number % 2:
            tried.end_within([rank])
        else:
            tried.send(rank, signal.SIGKILL)
            tried.decode()
        assert tried.stage.lost == number + 1
    assert tried.seen >= {8, 7}, tried.seen
    one, two, *_ = tried.rows
    tried.step({one: 11, two: 1})
    tried.until_all()
    tried.decode()
    assert tried.stage.ranks == tuple(range(8))
    tried.stage.close()


def two_at_once(kv_heads: int, dtype: str) -> None:
    tried = Tried(4, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    tried.end_within([1, 2])
    assert tried.stage.lost == 2
    tried.finish()


def all_at_once(kv_heads: int, dtype: str) -> None:
    """KV is the node's: it goes on with fresh ranks."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    for rank in range(3):
        tried.send(rank, signal.SIGKILL)
    tried.decode()
    tried.decode()
    assert tried.stage.lost == 3
    tried.until_all()
    tried.stage.close()


def one_by_one(kv_heads: int, dtype: str) -> None:
    """All end, each as soon as the others go on without the one before; the last one goes on with fresh ranks."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    agree = tried.stage._agree

    def agree_without_the_first(numbers: Iterable[int]) -> object:
        left = list(numbers)
        if left and len(left) < 3:
            tried.send(left[0], signal.SIGKILL)
        return agree(left)

    tried.stage._agree = agree_without_the_first  # type: ignore[method-assign, assignment]
    tried.send(1, signal.SIGKILL)
    tried.decode()
    assert tried.stage.lost >= 2, tried.stage.lost
    tried.stage._agree = agree  # type: ignore[method-assign]
    tried.until_all()
    for rank in tried.stage.ranks[1:]:
        tried.send(rank, signal.SIGKILL)
    tried.stage._agree = agree_without_the_first  # type: ignore[method-assign, assignment]
    tried.decode()
    tried.decode()
    tried.stage._agree = agree  # type: ignore[method-assign]
    tried.finish()


def no_room(kv_heads: int, dtype: str) -> None:
    """There is no memory for sums with the rank that comes back: it is tried again later, and the others serve."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    tried.send(1, signal.SIGKILL)
    tried.decode()
    make, refused = ranked.make_memory, 0

    def refuse(ranks: int, numbers_max: int) -> int:
        nonlocal refused
        if refused == 2:
            return make(ranks, numbers_max)
        refused += 1
        raise OSError(errno.ENOMEM, "no memory")

    ranked.make_memory = refuse
    tried.until_all()
    assert refused == 2
    assert tried.stage.lost == 3  # each refusal costs the fresh process
    tried.decode()
    tried.stage.close()


def stopped(kv_heads: int, dtype: str) -> None:
    """A rank that is stopped is ended; it never wakes to write anything."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    pid = tried.stage.pid(1)
    tried.send(1, signal.SIGSTOP)
    tried.decode()
    assert tried.stage.lost == 1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        pass
    else:
        raise AssertionError("a rank that was stopped is still there")
    tried.until_all()
    tried.stage.close()


def middle(kv_heads: int, dtype: str) -> None:
    """A stage between others."""
    tried = Tried(3, kv_heads, dtype, middle=True)
    tried.step(dict.fromkeys(tried.rows, 7))
    tried.end_within([0])
    tried.decode()
    tried.until_all()
    tried.decode()
    assert all(got.tobytes() == want.tobytes() for got, want in tried.kept)
    tried.stage.close()


def unfit(kv_heads: int, dtype: str) -> None:
    """A step that does not fit costs nobody."""
    tried = Tried(2, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    requests = tried.requests
    step = requests.table.fill(
        np.array(tried.rows[:1], np.int32), np.array([7], np.int32), np.array([1], np.int32), StepArrays()
    )
    for tokens, picked, kind in (
        (np.array([10**6]), np.zeros(1, np.int32), IndexError),
        (np.zeros(1, np.int64), np.full(1, 5, np.int32), IndexError),
    ):
        try:
            tried.stage.forward(tokens, step, picked)
        except kind:
            pass
        else:
            raise AssertionError("a step that does not fit was computed")
    tried.decode()
    assert tried.stage.lost == 0
    tried.stage.close()


SCENARIOS: dict[str, Callable[[int, str], None]] = {
    run.__name__: run
    for run in (chain, two_at_once, all_at_once, one_by_one, no_room, stopped, middle, unfit)
}


def main() -> None:
    torch.set_num_threads(1)
    SCENARIOS[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    assert not children.split(), f"processes are left: {children}"
    print("equal to the bit")


if __name__ == "__main__":
    main()
