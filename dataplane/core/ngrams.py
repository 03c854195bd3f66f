"""Drafts from a request's own tokens: what followed the last time that it ended as it does now (prompt lookup).

Text that is summarised, quoted or edited repeats what stands in the prompt; code and JSON repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SIZES = (4, 2)  # tokens that have to be the same, the longer first
INDEX_BYTES = 24  # of a token there is room for: itself, and two places of a table for each size
ENTERED_MAX = 1 << 15  # of a longer log the beginning is not found again: entering it would hold up a step
FEW = 12  # tokens that are entered one by one, which is faster
_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_MASK = 0xFFFFFFFF


class NgramIndex:
    """Where each n-gram of a token log was last followed by something. It grows with the log.

    A table has one place for each hash, and the newest entry keeps it: what is looked up is compared with the log, so
    that another one's entry is a miss and no wrong answer."""

    def __init__(self) -> None:
        self._ids = np.empty(0, np.int64)
        self._length = 0
        self._tables = {size: np.empty(0, np.int32) for size in SIZES}

    def __len__(self) -> int:
        return self._length

    @property
    def bytes_kept(self) -> int:
        return self._ids.nbytes + sum(table.nbytes for table in self._tables.values())

    def extend(self, ids: Sequence[int]) -> None:
        """The log is `ids` now, of which this index has the first tokens already."""
        before, self._length = self._length, len(ids)
        if len(ids) > len(self._ids):
            room = max(64, 1 << (len(ids) - 1).bit_length())
            grown = np.empty(room, np.int64)
            grown[:before] = self._ids[:before]
            self._ids = grown
            self._tables = {size: np.full(2 * room, -1, np.int32) for size in SIZES}
            grown[before : len(ids)] = ids[before:]
            self._enter(1, len(ids))
            return
        self._ids[before : len(ids)] = ids[before:]
        if len(ids) - before > FEW:
            self._enter(before, len(ids))
            return
        for end in range(max(before, 1), len(ids)):  # the last token is followed by nothing yet
            for size, table in self._tables.items():
                if end >= size:
                    table[self._place(size, end, len(table))] = end

    def after(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next; none if the end of the log is not in it a second time."""
        length = self._length
        for size, table in self._tables.items():
            if length <= size:
                continue
            found = int(table[self._place(size, length, len(table))])
            if found < size or not self._same(found, length, size):
                continue
            # Where the two overlap what repeats is shorter than what is asked for: it goes on in a circle.
            period = length - found
            return [int(self._ids[found + i % period]) for i in range(count)]
        return []

    def _place(self, size: int, end: int, places: int) -> int:
        """Of the n-gram that ends before position `end`."""
        total = 0
        for odd, token in zip(_ODD, self._ids[end - size : end].tolist(), strict=False):
            total += odd * token
        return _mixed(total & _MASK) & (places - 1)

    def _same(self, end: int, other: int, size: int) -> bool:
        """Whether the n-grams that end before two positions are the same."""
        return bool(self._ids[end - size : end].tolist() == self._ids[other - size : other].tolist())

    def _enter(self, first: int, stop: int) -> None:
        """All n-grams that end before one of these positions; of those with one place the last one stays."""
        for size, table in self._tables.items():
            begin = max(first, size, stop - ENTERED_MAX)
            if begin >= stop:
                continue
            total = np.zeros(stop - begin, np.uint64)
            for i in range(size):
                start = begin - size + i
                total += np.uint64(_ODD[i]) * self._ids[start : start + stop - begin].astype(np.uint64)
            ends: npt.NDArray[np.int32] = np.arange(begin, stop, dtype=np.int32)
            total &= np.uint64(_MASK)
            total ^= total >> np.uint64(15)
            table[(total & np.uint64(len(table) - 1)).astype(np.intp)] = ends


def _mixed(value: int) -> int:
    return value ^ (value >> 15)
