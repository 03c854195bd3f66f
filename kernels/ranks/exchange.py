"""All-reduce between the ranks of one stage on one host, in memory that they share (exchange.h)."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from kernels.ranks import _native

ABORTED, LATE = -1, -2


class ExchangeOver(Exception):
    """The ranks of this exchange are not in step any more; those that are left begin another one."""


class ExchangeAborted(ExchangeOver):
    """Somebody has ended it, for instance since a rank is gone or the epoch is over."""


class RankMissing(ExchangeOver):
    """A rank was not there before the deadline."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        super().__init__(f"rank {rank} was not there within {timeout_s:g} s")
        self.rank = rank


def make_memory(ranks: int, numbers_max: int) -> int:
    """A descriptor of fresh memory for an exchange, for all its ranks to inherit or to be sent. It belongs to one
    set of ranks: after an abort a new one is made. Raises OSError if there is no memory."""
    fd = os.memfd_create("kf-exchange", os.MFD_CLOEXEC)
    try:
        # All of it now: memory that is lacking would end a step with SIGBUS.
        os.posix_fallocate(fd, 0, _native.memory_bytes(ranks, numbers_max))
    except OSError:
        os.close(fd)
        raise
    return fd


class Exchange:
    """One rank's end. `reduce` is called by one thread, `abort` by any."""

    def __init__(self, fd: int, ranks: int, rank: int, numbers_max: int) -> None:
        """`numbers_max`: of one call. Raises ValueError if the memory is another exchange's."""
        self._native = _native.Exchange(fd, ranks, rank, numbers_max)
        self.ranks, self.rank, self.numbers_max = ranks, rank, numbers_max

    def place(self, numbers: int) -> npt.NDArray[np.int64]:
        """Where this rank's next contribution [numbers] is to be written; it has old contents."""
        return self._native.place(numbers)

    def reduce(self, numbers: int, timeout_s: float) -> npt.NDArray[np.int64]:
        """The sum [numbers] of all ranks' contributions, which every rank has asked for with the same `numbers`. It
        holds until the next call has returned. Raises ExchangeAborted, and RankMissing after `timeout_s`."""
        outcome, total, _ = self._native.reduce(numbers, int(timeout_s * 1e9))
        self.check(outcome, timeout_s)
        assert total is not None
        return total

    def check(self, outcome: int, timeout_s: float) -> None:
        """Raises, as reduce() does, for what a kernel's own reduction ended with."""
        if outcome == LATE:
            raise RankMissing(self._native.missing, timeout_s)
        if outcome == ABORTED:
            raise ExchangeAborted("the exchange has been ended")

    @property
    def address(self) -> int:
        """Of this rank's end, for kernels that reduce within a step. Valid as long as this object."""
        return self._native.address

    def abort(self) -> None:
        """Ends it for all ranks, also for those that wait now."""
        self._native.abort()

    @property
    def aborted(self) -> bool:
        return self._native.aborted
