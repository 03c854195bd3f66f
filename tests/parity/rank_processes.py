"""Ranks in processes of their own that end, stop and come back, against one stage of no ranks.

    python -m tests.parity.rank_processes KV_HEADS DTYPE [SCENARIO ...]

Each scenario in a fork of a process without threads, as a node is when it forks its ranks."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typing_extensions import Buffer

from dataplane._fast.blocktable import StepArrays
from dataplane.kvcache import KVCache
from dataplane.ranks import process as rank_process
from dataplane.ranks import stage as ranked
from dataplane.ranks.messages import Answer, Step
from dataplane.ranks.stage import RankedStage, RanksGone
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
        self.tokens: dict[int, list[int]] = {row: [] for row in self.rows}  # of all positions so far
        self.kept: list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = []
        self.seen: set[int] = set()  # numbers of ranks that have computed a step

    def step(self, counts: dict[int, int]) -> None:
        requests = self.requests
        tokens, rows, starts, new = requests.step(counts)
        for row, start, some in zip(counts, starts, np.split(tokens, np.cumsum(new)[:-1]), strict=True):
            self.tokens[row][start:] = some.tolist()
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

    def end_within(self, ranks: list[int], counts: dict[int, int] | None = None) -> None:
        """These ranks end while a step waits for them: one of so many tokens of each row, or one that decodes."""
        for rank in ranks:
            self.send(rank, signal.SIGSTOP)
        pids = [self.stage.pid(rank) for rank in ranks]

        def end() -> None:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(0.05, end)
        timer.start()
        self.step(counts or dict.fromkeys(self.rows, 1))
        timer.join()

    def until_whole(self, lost: int) -> None:
        """So many more are lost, and all ranks are there again, without a step."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert time.monotonic() < deadline, (self.stage.lost, self.stage.ranks)
            with self.stage._lock:  # not in between
                if self.stage.lost >= lost and len(self.stage.ranks) == self.stage.wanted:
                    break
            time.sleep(0.002)
        assert self.stage.lost == lost
        assert self.stage.troubles() == ()

    def compute_again(self) -> None:
        """All KV, row by row, by the ranks only."""
        for row, tokens in self.tokens.items():
            for start in range(0, len(tokens), 7):
                some = np.array(tokens[start : start + 7], np.int64)
                one, at, new = (np.array([value], np.int32) for value in (row, start, len(some)))
                step = self.requests.table.fill(one, at, new, StepArrays())
                self.stage.forward(some, step, np.zeros(1, np.int32))


def has_ended(process: int) -> bool:
    return bool(select.select([process], [], [], 0)[0])


def chain(kv_heads: int, dtype: str) -> None:
    """8 -> 7 -> 6 -> 5 -> 8 in service: between steps, and within one that decodes or has prompts."""
    tried = Tried(8, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 9))
    assert len(tried.stage.ranks) == 8
    one, two, *_ = tried.rows
    tried.send(3, signal.SIGKILL)
    tried.decode()
    tried.end_within([6])
    tried.end_within([0], {one: 13, two: 1})
    assert tried.stage.lost == 3
    assert tried.seen >= {8, 7}, tried.seen
    tried.step({one: 11, two: 1})
    tried.until_all()
    tried.decode()
    assert tried.stage.ranks == tuple(range(8))
    tried.stage.close()


def idle(kv_heads: int, dtype: str) -> None:
    """While nothing is computed: ranks that end, or are stopped, are replaced without a step."""
    tried = Tried(4, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    lost = 0
    for number, ranks in (
        (signal.SIGSTOP, (0,)),
        (signal.SIGKILL, (2,)),
        (signal.SIGKILL, (1, 3)),
        (signal.SIGKILL, (0, 1, 2, 3)),
    ):
        processes = [os.pidfd_open(tried.stage.pid(rank)) for rank in ranks]
        for rank in ranks:
            tried.send(rank, number)
        lost += len(ranks)
        if number == signal.SIGKILL:
            ranked.IDLE_STOPPED_S = 2 * LIMIT_S  # nothing waits for the next look
        tried.until_whole(lost)
        for process in processes:
            assert has_ended(process), "it could still write"
            os.close(process)
        tried.decode()
    tried.stage.close()


def none_left(kv_heads: int, dtype: str) -> None:
    """While nothing is computed all ranks end, and what they are forked from: the node ends, without a step."""
    pid = os.fork()
    if pid == 0:
        os.kill(Tried(2, kv_heads, dtype).stage._parent, signal.SIGKILL)
        time.sleep(LIMIT_S)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def lost_while_taken_in(kv_heads: int, dtype: str) -> None:
    """One that serves and one that is new end, or the new one is stopped, before there is a layout with both."""
    tried = Tried(4, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    prepare, waiting = tried.stage._prepare, [((1, 2), signal.SIGKILL), ((2,), signal.SIGSTOP)]

    def prepare_and_end(numbers: Iterable[int]) -> object:
        shared = prepare(numbers)
        if waiting and len(shared.layout.ranks) == 4:
            ranks, number = waiting.pop(0)
            for rank in ranks:
                tried.send(rank, number)
        return shared

    tried.stage._prepare = prepare_and_end  # type: ignore[method-assign, assignment]
    tried.send(2, signal.SIGKILL)
    tried.until_whole(4)  # 2, then 1 and the second 2, then the third
    assert not waiting
    tried.decode()
    tried.stage.close()


def with_its_kv(kv_heads: int, dtype: str) -> None:
    """A rank ends and all KV is lost with it: computed again by the others, it has the same bits."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 9))
    tried.send(1, signal.SIGKILL)
    tried.kv.array.view(np.uint8)[:] = 0xFF
    tried.compute_again()
    tried.decode()
    tried.stage.close()


def woken(kv_heads: int, dtype: str) -> None:
    """A rank that is stopped goes on at about the time at which it is given up: it counts, or it has ended."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    for wait_s in (0.02, ranked.STOPPED_S - 0.002, ranked.STOPPED_S + ranked.LOOK_S):
        process = os.pidfd_open(tried.stage.pid(1))

        def wake(process: int = process) -> None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGCONT)

        tried.send(1, signal.SIGSTOP)
        timer = threading.Timer(wait_s, wake)
        timer.start()
        tried.decode()
        timer.join()
        os.close(process)
        tried.until_all()
    tried.finish()


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


def no_fork(kv_heads: int, dtype: str) -> None:
    """A process or its pidfd is refused, as by a limit: the others serve, and it is tried again."""
    fork, watch, refusals = os.fork, os.pidfd_open, mmap.mmap(-1, 2)  # shared with who forks the ranks

    def refuse(at: int, number: int) -> None:
        if refusals[at]:
            refusals[at] -= 1
            raise OSError(number, os.strerror(number))

    def fork_or_refuse() -> int:
        refuse(0, errno.EAGAIN)
        return fork()

    def watch_or_refuse(pid: int, flags: int = 0) -> int:
        refuse(1, errno.EMFILE)
        return watch(pid, flags)

    os.fork, os.pidfd_open = fork_or_refuse, watch_or_refuse
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    healthy = [tried.stage.pid(rank) for rank in (0, 2)]
    for at in (0, 1):
        refusals[at] = 2
        tried.send(1, signal.SIGKILL)
        tried.until_whole(at + 1)
        assert not refusals[at]
    assert [tried.stage.pid(rank) for rank in (0, 2)] == healthy
    tried.decode()
    refusals[0] = 4  # all three, then one
    for rank in range(3):
        tried.send(rank, signal.SIGKILL)
    tried.decode()
    tried.until_whole(5)
    assert not refusals[0]
    tried.decode()
    tried.stage.close()


class Refusals:
    """How often each rank is yet to fail at a layout, and how; whichever process it is in."""

    def __init__(self, ranks: int) -> None:
        self.left = mmap.mmap(-1, ranks)  # shared with the ranks, which are forked from now on
        self.ranks = ranks
        self.how = mmap.mmap(-1, 1)
        make = rank_process.CpuRank

        def refuse(spec: object, layout: object, rank: int, *more: object, **options: object) -> object:
            if self.left[rank]:
                self.left[rank] -= 1
                self.fail()
            return make(spec, layout, rank, *more, **options)  # type: ignore[arg-type]

        rank_process.CpuRank = refuse  # type: ignore[misc, assignment]

    def fail(self) -> None:
        match self.how[0]:
            case 0:
                raise MemoryError("cannot map 64 bytes")
            case 1:
                raise OSError(errno.ENOMEM, "no memory")
            case 2:
                raise RuntimeError("can't allocate memory")  # as torch says it
            case _:
                os._exit(1)

    def ask(self, *counts: int) -> None:
        for rank, count in enumerate(counts):
            self.left[rank] = count

    def over(self) -> bool:
        return not any(self.left[rank] for rank in range(self.ranks))


def cannot_prepare(kv_heads: int, dtype: str) -> None:
    """A rank that has no memory for a layout, or fails at it in another way, is lost: the others serve without it."""
    refusals = Refusals(3)
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    for how in range(3):
        refusals.how[0] = how
        refusals.ask(0, 0, 1)
        tried.send(1, signal.SIGKILL)
        tried.decode()
        assert refusals.over()
        tried.until_whole(2 * how + 2)
    refusals.ask(1, 0, 1)  # both that are left, so that fresh ones serve
    tried.send(1, signal.SIGKILL)
    tried.decode()
    assert refusals.over()
    tried.until_whole(9)
    tried.decode()
    tried.stage.close()


def none_can_prepare(kv_heads: int, dtype: str) -> None:
    """All ranks fail at a layout, and so do all that are started in their place: that is said, and soon forgotten."""
    refusals = Refusals(3)
    for how, said in ((2, "the last one said: RuntimeError: can't allocate memory"), (3, "have ended")):
        refusals.how[0] = how
        refusals.ask(*[ranked.FRESH_MAX] * 3)
        gone(lambda: Tried(3, kv_heads, dtype), said)
        assert refusals.over()
        refusals.ask(1, 1, 1)
        tried = Tried(3, kv_heads, dtype)
        tried.step(dict.fromkeys(tried.rows, 7))
        tried.until_all()
        refusals.ask(ranked.FRESH_MAX + 1, ranked.FRESH_MAX, ranked.FRESH_MAX + 1)
        with tried.stage._lock:  # as a step has it: whoever looks after the ranks would end the process
            gone(partial(tried.stage._go_on_without, {1}), said)
            assert refusals.over()
        tried.decode()
        tried.until_all()
        tried.stage.close()


def gone(what: Callable[[], object], said: str) -> None:
    with pytest.raises(RanksGone, match=said):
        what()


def no_room_for_sums(kv_heads: int, dtype: str) -> None:
    """There is no memory for the sums of those that are left: fewer go on."""
    tried = Tried(4, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    make, rooms = ranked.make_memory, [0, 1, 2]  # of three, of two, and of one

    def refuse(ranks: int, numbers_max: int) -> int:
        if rooms.pop() if rooms else 0:
            raise OSError(errno.ENOMEM, "no memory")
        return make(ranks, numbers_max)

    ranked.make_memory = refuse
    tried.send(1, signal.SIGKILL)
    tried.until_whole(3)
    assert not rooms
    tried.decode()
    tried.stage.close()


def deadly(kv_heads: int, dtype: str) -> None:
    """A step that ends whoever computes it is given up; the next one is computed by fresh ranks."""
    ends, step = mmap.mmap(-1, 1), rank_process.RankProcess._step

    def step_or_end(self: rank_process.RankProcess, order: Step) -> Answer:
        if ends[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, order)

    rank_process.RankProcess._step = step_or_end  # type: ignore[method-assign]
    tried = Tried(2, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    ends[0] = 1
    lengths = dict(tried.requests.lengths)
    gone(tried.decode, "all ranks of the stage ended in one step, 3 times")
    tried.requests.lengths.update(lengths)  # nothing of it was computed
    ends[0] = 0
    tried.decode()
    tried.finish()


def late(kv_heads: int, dtype: str) -> None:
    """A rank hangs when all sums are made, so that no other one waits for it: it is given up."""
    hangs, step = mmap.mmap(-1, 3), rank_process.RankProcess._step

    def step_and_hang(self: rank_process.RankProcess, order: Step) -> Answer:
        answer = step(self, order)
        if hangs[self._rank]:
            hangs[self._rank] = 0
            time.sleep(2 * LIMIT_S)
        return answer

    rank_process.RankProcess._step = step_and_hang  # type: ignore[method-assign]
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    hangs[1] = 1
    tried.decode()
    assert tried.stage.lost == 1
    tried.finish()


def stopped(kv_heads: int, dtype: str) -> None:
    """A rank that is stopped is ended; it never wakes to write anything."""
    tried = Tried(3, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    process = os.pidfd_open(tried.stage.pid(1))
    tried.send(1, signal.SIGSTOP)
    tried.decode()
    assert tried.stage.lost == 1
    assert has_ended(process), "a rank that was stopped is still there"
    os.close(process)
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
    """A step that does not fit costs nobody; one that comes while a rank is taken in does not end that for ever."""
    tried = Tried(2, kv_heads, dtype)
    tried.step(dict.fromkeys(tried.rows, 7))
    refused(tried)
    tried.decode()
    assert tried.stage.lost == 0
    ranked.IDLE_STOPPED_S = 2 * LIMIT_S
    prepare, fresh = tried.stage._prepare, []

    def prepare_slowly(numbers: Iterable[int]) -> object:
        shared = prepare(numbers)
        if len(shared.layout.ranks) == 2 and not fresh:
            fresh.append(tried.stage.pid(1))
            tried.send(1, signal.SIGSTOP)
        return shared

    tried.stage._prepare = prepare_slowly  # type: ignore[method-assign, assignment]
    tried.send(1, signal.SIGKILL)
    while not fresh:
        time.sleep(0.002)
    refused(tried)
    os.kill(fresh[0], signal.SIGCONT)
    tried.until_all()
    assert tried.stage.lost == 1
    tried.finish()


def refused(tried: Tried) -> None:
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


SCENARIOS: dict[str, Callable[[int, str], None]] = {
    run.__name__: run
    for run in (
        chain,
        idle,
        none_left,
        lost_while_taken_in,
        with_its_kv,
        woken,
        two_at_once,
        all_at_once,
        one_by_one,
        no_room,
        no_fork,
        cannot_prepare,
        none_can_prepare,
        no_room_for_sums,
        deadly,
        late,
        stopped,
        middle,
        unfit,
    )
}


def run(scenario: str, kv_heads: int, dtype: str) -> None:
    """In a process of its own, which has to leave none behind."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"{scenario} failed"
        return
    try:
        signal.alarm(int(LIMIT_S))
        SCENARIOS[scenario](kv_heads, dtype)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        assert not children.split(), f"processes are left: {children}"
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    kv_heads, dtype, *scenarios = sys.argv[1:]
    for scenario in scenarios or SCENARIOS:
        run(scenario, int(kv_heads), dtype)
    print("equal to the bit")


if __name__ == "__main__":
    main()
