"""Block table and rows in plain Python: what blocktable.pyx must equal. Slow, obvious, used by tests only."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import KvGap, TableFull


@dataclass(frozen=True, slots=True)
class OracleArrays:
    """See blocktable.StepArrays."""

    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    cu_q: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    tables: npt.NDArray[np.int32]


class OracleRows:
    """See blocktable.Rows."""

    def __init__(self, data: bytes) -> None:
        rids, starts, counts, samples = np.frombuffer(data, "<i8").reshape(4, -1)
        if np.any((samples < 0) | (samples > np.maximum(counts, 1))):
            raise ValueError
        self.rids, self.starts, self.counts = rids, starts.astype(np.int32), counts.astype(np.int32)
        self.drafts = np.maximum(samples - 1, 0).astype(np.int32)
        self.sample_rids = np.repeat(rids, samples)
        depths = [depth for some in samples.tolist() for depth in range(some)]
        self.depths = np.array(depths, np.int32)
        firsts = np.repeat(np.cumsum(counts) - samples, samples)
        self.sample_rows = (firsts + self.depths).astype(np.int32)


class OracleBlockTable:
    """See blocktable.BlockTable."""

    def __init__(self, max_rows: int, max_blocks_per_row: int, block_size: int) -> None:
        if min(max_rows, max_blocks_per_row, block_size) <= 0:
            raise ValueError
        self.max_blocks_per_row = max_blocks_per_row
        self.block_size = block_size
        self._rows: dict[int, list[int]] = {}
        self._valid: dict[int, int] = {}
        self._written: dict[int, int] = {}  # drafts included
        self._free = list(range(max_rows - 1, -1, -1))

    def _row(self, row: int) -> list[int]:
        if row not in self._rows:
            raise IndexError(row)
        return self._rows[row]

    def new_row(self) -> int:
        if not self._free:
            raise TableFull
        row = self._free.pop()
        self._rows[row] = []
        self._valid[row] = self._written[row] = 0
        return row

    def free_row(self, row: int) -> list[int]:
        held = self._row(row)
        del self._rows[row]
        self._free.append(row)
        return held

    def extend(self, row: int, blocks: Iterable[int]) -> None:
        new = list(blocks)
        if len(self._row(row)) + len(new) > self.max_blocks_per_row:
            raise TableFull
        if any(not 0 <= b < 2**31 for b in new):
            raise ValueError
        self._row(row).extend(new)

    def set_block(self, row: int, index: int, block: int) -> None:
        if not 0 <= index < len(self._row(row)):
            raise IndexError(index)
        if not 0 <= block < 2**31:
            raise ValueError
        self._row(row)[index] = block

    def truncate(self, row: int, num_blocks: int) -> list[int]:
        blocks = self._row(row)
        if not 0 <= num_blocks <= len(blocks):
            raise ValueError
        cut = blocks[num_blocks:]
        del blocks[num_blocks:]
        return cut

    def blocks(self, row: int) -> list[int]:
        return list(self._row(row))

    def block(self, row: int, index: int) -> int:
        if not 0 <= index < len(self._row(row)):
            raise IndexError(index)
        return self._rows[row][index]

    def num_blocks(self, row: int) -> int:
        return len(self._row(row))

    def valid(self, row: int) -> int:
        self._row(row)
        return self._valid[row]

    def set_valid(self, row: int, tokens: int) -> None:
        if not 0 <= tokens <= len(self._row(row)) * self.block_size:
            raise ValueError
        self._valid[row] = self._written[row] = tokens

    def valid_of(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.array([self.valid(row) for row in rows.tolist()], np.int32)

    def grow(
        self,
        rows: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        free: list[int],
    ) -> int:
        if not len(rows) == len(starts) == len(counts):
            raise ValueError
        steps = list(zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True))
        missing = 0
        for row, start, count in steps:
            held = len(self._row(row))
            if count < 1 or start < 0:
                raise ValueError
            if self._written[row] < start:
                raise KvGap
            need = -(-(start + count) // self.block_size)
            if need > self.max_blocks_per_row:
                raise TableFull
            missing += max(0, need - held)
        if missing > len(free):
            return missing - len(free)
        for row, start, count in steps:
            while len(self._rows[row]) * self.block_size < start + count:
                self._rows[row].append(free.pop())
            self._valid[row] = min(self._valid[row], start)
            self._written[row] = start
        return 0

    def commit(
        self,
        rows: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        drafts: npt.NDArray[np.int32] | None = None,
    ) -> list[int]:
        self.fill(rows, starts, counts)
        uncertain = np.zeros(len(rows), int) if drafts is None else drafts
        if len(uncertain) != len(rows) or np.any((uncertain < 0) | (uncertain >= counts)):
            raise ValueError
        filled = []
        for index, row in enumerate(rows.tolist()):
            before, written = self._valid[row], int(starts[index]) + int(counts[index])
            end = written - int(uncertain[index])
            self._valid[row], self._written[row] = end, written
            if before // self.block_size != end // self.block_size:
                filled.append(index)
        return filled

    def fill(
        self, rows: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]
    ) -> OracleArrays:
        if not len(rows) == len(starts) == len(counts):
            raise ValueError
        size = self.block_size
        positions: list[int] = []
        slots: list[int] = []
        cu_q, lens, used = [0], [], []
        for row, start, count in zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True):
            blocks = self._row(row)
            if count < 1 or start < 0:
                raise ValueError
            for position in range(start, start + count):
                positions.append(position)
                slots.append(blocks[position // size] * size + position % size)
            cu_q.append(len(positions))
            lens.append(start + count)
            used.append(blocks[: -(-(start + count) // size)])
        width = max((len(u) for u in used), default=0)
        tables = np.zeros((len(used), width), np.int32)
        for i, u in enumerate(used):
            tables[i, : len(u)] = u
        return OracleArrays(
            np.array(positions, np.int64),
            np.array(slots, np.int64),
            np.array(cu_q, np.int32),
            np.array(lens, np.int32),
            tables,
        )
