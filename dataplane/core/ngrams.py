"""Drafts from a request's own tokens: what followed the last time that it ended as it does now (prompt lookup).

Text that is summarised, quoted or edited repeats what stands in the prompt; code and JSON repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SIZES = (4, 2)  # tokens that have to be the same, the longer first
INDEX_BYTES = 24  # of a token there is room for: itself, and two places of a table for each size
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
            self._enter_all(len(ids) - 1)
            return
        self._ids[before : len(ids)] = ids[before:]
        if len(ids) - before > 8:
            self._enter_all(len(ids) - 1)
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
            if found < size or not np.array_equal(
                self._ids[found - size : found], self._ids[length - size : length]
            ):
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

    def _enter_all(self, end: int) -> None:
        """All n-grams that end before a position up to `end`; of those with one place the last one stays."""
        for size, table in self._tables.items():
            if end < size:
                continue
            count = end - size + 1
            total = np.zeros(count, np.uint64)
            for i in range(size):
                total += np.uint64(_ODD[i]) * self._ids[i : i + count].astype(np.uint64)
            ends: npt.NDArray[np.int32] = np.arange(size, end + 1, dtype=np.int32)
            total &= np.uint64(_MASK)
            total ^= total >> np.uint64(15)
            table[(total & np.uint64(len(table) - 1)).astype(np.intp)] = ends


def _mixed(value: int) -> int:
    return value ^ (value >> 15)
