"""Which bytes the blocks of served requests should have, and which of them nobody has looked at yet.

A copy is checked when it arrives. When it is promoted nothing is read: its checksums come along, and its blocks are
`unverified` until somebody has read them: the first step that needs them does, while it computes, and before anything
that it has computed leaves the node. What idle time there is before is used as well. Promoting a gigabyte takes
as long as promoting a block, and a bit that turned in a copy's memory is still no wrong token.

Blocks that are copied out get a checksum at that moment; it stays with them, so that to demote a request means reading
nothing either. A step ends the checksums of the blocks that it writes to: it goes on in a part-filled one, or computes
positions again, with the same bits unless a stage before it has other numerics now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import BlockTable


@dataclass(frozen=True, slots=True)
class Check:
    """Block `index` of a row of the block table ought to have this CRC-32."""

    row: int
    index: int
    block: int
    checksum: int


class Checksums:
    """Of rows of served requests: their first blocks, as many as are known. Single-threaded: no bytes are read here."""

    def __init__(self, table: BlockTable) -> None:
        self.failures = 0
        self.unverified: dict[
            int, tuple[int, int]
        ] = {}  # row -> blocks [first, stop) that nobody has looked at
        self._table = table
        self._of: dict[int, list[int]] = {}
        self._covered: dict[int, int] = {}  # positions of a row that its checksums are of

    def of(self, row: int) -> tuple[list[int], int]:
        """Checksums of the row's first blocks, and of how many positions they are."""
        return self._of.get(row, []), self._covered.get(row, 0)

    def promoted(self, row: int, checksums: list[int]) -> None:
        """The row was a copy, with these checksums."""
        if checksums:
            self._of[row] = checksums
            self._covered[row] = self._table.valid(row)
            self.unverified[row] = (0, len(checksums))

    def forget(self, row: int) -> None:
        """The row is given back, or is a copy from now on."""
        self._of.pop(row, None)
        self._covered.pop(row, None)
        self.unverified.pop(row, None)

    def copied(self, row: int, index: int, tokens: int, checksum: int) -> bool:
        """Block `index` was read while so many positions of the row were valid up to its end. False: it is not as it
        was when it was read before, and no longer valid."""
        known = self._of.setdefault(row, [])
        if index < len(known) and known[index] != checksum:
            self._damaged(row, index)
            return False
        if index == len(known):
            known.append(checksum)
            self._covered[row] = tokens
        return True

    def written(
        self, rows: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]
    ) -> None:
        """A step is about to write these positions of these rows, of which nothing later is valid."""
        size = self._table.block_size
        for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
            if start // size * size < self._covered.get(row, 0):
                self._cut(row, start // size)
            self._narrow(row, stop=start // size)

    # ------------------------------------------------------------------ what to look at

    def straddled(self, rows: Iterable[int], starts: Iterable[int]) -> list[Check]:
        """What is to be looked at before a step that begins there may write: blocks whose beginning it keeps."""
        size = self._table.block_size
        found = []
        for row, start in zip(rows, starts, strict=True):
            first, stop = self.unverified.get(row, (0, 0))
            if start % size and first <= start // size < stop:
                found.append(self._check(row, start // size))
        return found

    def below(self, rows: Iterable[int]) -> list[Check]:
        """All of these rows that nobody has looked at."""
        return [self._check(row, i) for row in rows for i in range(*self.unverified.get(row, (0, 0)))]

    def next(self, blocks: int) -> list[Check]:
        """Up to so many checks, of whichever row."""
        found: list[Check] = []
        for row, (first, stop) in self.unverified.items():
            found += [self._check(row, i) for i in range(first, min(stop, first + blocks - len(found)))]
            if len(found) >= blocks:
                break
        return found

    def looked_at(self, checks: Sequence[Check], sums: npt.NDArray[np.uint32]) -> set[int]:
        """What the blocks of `checks` have, in their order. Returns rows of which one is not as it ought to be: from it
        on, their positions are no longer valid."""
        damaged: set[int] = set()
        for check, found in zip(checks, sums.tolist(), strict=True):
            if check.row in damaged:
                continue
            if found != check.checksum:
                self._damaged(check.row, check.index)
                damaged.add(check.row)
            elif self.unverified.get(check.row, (-1, -1))[0] == check.index:
                self._narrow(check.row, first=check.index + 1)
        return damaged

    def verified(self, row: int, tokens: int) -> int:
        """How many of so many positions may be copied to others."""
        first, _ = self.unverified.get(row, (None, 0))
        return tokens if first is None else min(tokens, first * self._table.block_size)

    # ------------------------------------------------------------------

    def _check(self, row: int, index: int) -> Check:
        return Check(row, index, self._table.block(row, index), self._of[row][index])

    def _damaged(self, row: int, index: int) -> None:
        self.failures += 1
        self._table.set_valid(row, min(self._table.valid(row), index * self._table.block_size))
        self._cut(row, index)

    def _cut(self, row: int, blocks: int) -> None:
        del self._of[row][blocks:]
        self._covered[row] = min(self._covered[row], blocks * self._table.block_size)
        self._narrow(row, stop=blocks)

    def _narrow(self, row: int, *, first: int = 0, stop: int | None = None) -> None:
        if row in self.unverified:
            was_first, was_stop = self.unverified[row]
            first, stop = max(first, was_first), was_stop if stop is None else min(stop, was_stop)
            if first < stop:
                self.unverified[row] = (first, stop)
            else:
                del self.unverified[row]
