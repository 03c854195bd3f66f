# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Block tables: which KV blocks hold each sequence, and the arrays a step needs from them.

All checks are made before anything is written, so a raised error leaves the table as it was."""

from libc.stdint cimport int32_t, int64_t, uint8_t

import numpy as np


class TableFull(MemoryError):
    """No free row, or more blocks than one row may have."""


class KvGap(ValueError):
    """A step begins behind the positions that are valid."""


cdef class Rows:
    """The rows of a step: counts[i] tokens of request rids[i] from position starts[i] on, of which the last drafts[i]
    are drafts. Some ask for the tokens after their last ones: sample_rids[k] does for the one after token
    sample_rows[k] of the step, which is the depths[k]-th draft of its row (0: the last token that is none).

    Made from int64 [4, B], little endian: rid, start, count, samples; the last `samples` tokens of a row sample, and
    all of these but the first are drafts. Raises ValueError for other bytes."""

    def __init__(self, const uint8_t[::1] data):
        cdef Py_ssize_t n = data.shape[0] // 32, i, sampling = 0, asked = 0
        if data.shape[0] != 32 * n:
            raise ValueError(f"{data.shape[0]} bytes are no rows of a step")
        cdef const int64_t *columns = <const int64_t *>&data[0] if n else NULL
        cdef int64_t tokens = 0, samples, j
        for i in range(n):
            samples = columns[3 * n + i]
            if samples < 0 or samples > max(columns[2 * n + i], 1):
                raise ValueError(f"a row of {columns[2 * n + i]} tokens cannot sample {samples} times")
            sampling += samples
        self.rids, self.starts, self.counts = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32)
        self.drafts, self.depths = np.zeros(n, np.int32), np.empty(sampling, np.int32)
        self.sample_rids, self.sample_rows = np.empty(sampling, np.int64), np.empty(sampling, np.int32)
        cdef int64_t[::1] rids = self.rids, sample_rids = self.sample_rids
        cdef int32_t[::1] starts = self.starts, counts = self.counts, sample_rows = self.sample_rows
        cdef int32_t[::1] drafts = self.drafts, depths = self.depths
        for i in range(n):
            rids[i] = columns[i]
            starts[i] = <int32_t>columns[n + i]
            counts[i] = <int32_t>columns[2 * n + i]
            tokens += counts[i]
            samples = columns[3 * n + i]
            drafts[i] = <int32_t>max(0, samples - 1)
            for j in range(samples):
                sample_rids[asked] = columns[i]
                sample_rows[asked] = <int32_t>(tokens - samples + j)
                depths[asked] = <int32_t>j
                asked += 1


def lookup(dict held, const int64_t[::1] keys):
    """held[key] of each key as int32, and how many keys are not there (-1)."""
    cdef Py_ssize_t i, n = keys.shape[0], unknown = 0
    found = np.empty(n, np.int32)
    cdef int32_t[::1] out = found
    for i in range(n):
        value = held.get(keys[i])
        out[i] = -1 if value is None else <int32_t>value
        unknown += value is None
    return found, unknown


cdef class StepArrays:
    """The arrays of one step of B rows and T tokens. They are views of buffers that the next fill() into the
    same object overwrites: a step that outlives that (several in flight) needs its own StepArrays."""

    def __init__(self):
        self.allocate_tokens(16)
        self.allocate_rows(4)
        self.allocate_tables(64)
        self.publish(0, 0, 0)

    cdef void allocate_tokens(self, Py_ssize_t n) except *:
        self.positions_full = np.empty(n, np.int64)
        self.slots_full = np.empty(n, np.int64)
        self.positions_c = self.positions_full
        self.slots_c = self.slots_full

    cdef void allocate_rows(self, Py_ssize_t n) except *:
        self.cu_q_full = np.zeros(n + 1, np.int32)
        self.context_lens_full = np.empty(n, np.int32)
        self.cu_q_c = self.cu_q_full
        self.context_lens_c = self.context_lens_full

    cdef void allocate_tables(self, Py_ssize_t n) except *:
        self.tables_full = np.empty(n, np.int32)
        self.tables_c = self.tables_full

    cdef void reserve(self, Py_ssize_t tokens, Py_ssize_t rows, Py_ssize_t entries) except *:
        if tokens > self.positions_c.shape[0]:
            self.allocate_tokens(max(tokens, 2 * self.positions_c.shape[0]))
        if rows > self.context_lens_c.shape[0]:
            self.allocate_rows(max(rows, 2 * self.context_lens_c.shape[0]))
        if entries > self.tables_c.shape[0]:
            self.allocate_tables(max(entries, 2 * self.tables_c.shape[0]))

    cdef void publish(self, Py_ssize_t tokens, Py_ssize_t rows, Py_ssize_t width) except *:
        self.num_tokens = tokens
        self.num_rows = rows
        self.positions = self.positions_full[:tokens]
        self.slots = self.slots_full[:tokens]
        self.cu_q = self.cu_q_full[: rows + 1]
        self.context_lens = self.context_lens_full[:rows]
        self.tables = self.tables_full[: rows * width].reshape(rows, width)


cdef class BlockTable:
    """Rows of block numbers, one row a sequence. Rows and their lengths are bounded at construction."""

    def __init__(self, Py_ssize_t max_rows, Py_ssize_t max_blocks_per_row, Py_ssize_t block_size):
        if max_rows <= 0 or max_blocks_per_row <= 0 or block_size <= 0:
            raise ValueError("max_rows, max_blocks_per_row and block_size must be positive")
        self.max_rows = max_rows
        self.max_blocks_per_row = max_blocks_per_row
        self.block_size = block_size
        self.entries = np.zeros((max_rows, max_blocks_per_row), np.int32)
        self.lengths = np.full(max_rows, -1, np.int32)
        self.valid_c = np.zeros(max_rows, np.int32)
        self.written_c = np.zeros(max_rows, np.int32)
        self.free = list(range(max_rows - 1, -1, -1))
        self.own = StepArrays()

    cdef Py_ssize_t row_length(self, Py_ssize_t row) except -1:
        if row < 0 or row >= self.max_rows or self.lengths[row] < 0:
            raise IndexError(f"row {row} is not in use")
        return self.lengths[row]

    def new_row(self):
        """A row with no blocks. Raises TableFull."""
        if not self.free:
            raise TableFull(f"all {self.max_rows} rows are in use")
        cdef Py_ssize_t row = self.free.pop()
        self.lengths[row] = self.valid_c[row] = self.written_c[row] = 0
        return row

    def free_row(self, Py_ssize_t row):
        """Gives the row back and returns the blocks it held."""
        held = self.truncate(row, 0)
        self.lengths[row] = -1
        self.free.append(row)
        return held

    def extend(self, Py_ssize_t row, blocks):
        """Appends blocks. Raises TableFull if the row would get too long, ValueError for a negative block."""
        cdef Py_ssize_t n = self.row_length(row), i, count
        cdef int32_t block
        fast = [int(b) for b in blocks]
        count = len(fast)
        if n + count > self.max_blocks_per_row:
            raise TableFull(f"row {row} would have {n + count} blocks, at most {self.max_blocks_per_row} fit")
        for b in fast:
            if not 0 <= b < 2**31:
                raise ValueError(f"{b} is no block number")
        for i in range(count):
            block = fast[i]
            self.entries[row, n + i] = block
        self.lengths[row] = n + count

    def set_block(self, Py_ssize_t row, Py_ssize_t index, block):
        """Replaces one block of a row."""
        if not 0 <= index < self.row_length(row):
            raise IndexError(f"row {row} has no block at {index}")
        if not 0 <= block < 2**31:
            raise ValueError(f"{block} is no block number")
        self.entries[row, index] = block

    def truncate(self, Py_ssize_t row, Py_ssize_t num_blocks):
        """Keeps the first num_blocks blocks and returns the others."""
        cdef Py_ssize_t n = self.row_length(row)
        if not 0 <= num_blocks <= n:
            raise ValueError(f"row {row} has {n} blocks, it cannot keep {num_blocks}")
        cut = [self.entries[row, i] for i in range(num_blocks, n)]
        self.lengths[row] = num_blocks
        return cut

    def blocks(self, Py_ssize_t row):
        """The blocks of a row, first position first."""
        cdef Py_ssize_t i
        return [self.entries[row, i] for i in range(self.row_length(row))]

    def block(self, Py_ssize_t row, Py_ssize_t index):
        """One block of a row."""
        if not 0 <= index < self.row_length(row):
            raise IndexError(f"row {row} has no block at {index}")
        return self.entries[row, index]

    def num_blocks(self, Py_ssize_t row):
        """How many blocks a row has."""
        return self.row_length(row)

    def valid(self, Py_ssize_t row):
        """How many positions of a row, from 0 on, hold what they should."""
        self.row_length(row)
        return self.valid_c[row]

    def set_valid(self, Py_ssize_t row, Py_ssize_t tokens):
        """See valid."""
        if not 0 <= tokens <= self.row_length(row) * self.block_size:
            raise ValueError(f"row {row} has no room for {tokens} tokens")
        self.valid_c[row] = self.written_c[row] = <int32_t>tokens

    def valid_of(self, const int32_t[:] rows):
        """valid() of each of these rows, int32 [B]."""
        cdef Py_ssize_t i
        found = np.empty(rows.shape[0], np.int32)
        cdef int32_t[::1] out = found
        for i in range(rows.shape[0]):
            self.row_length(rows[i])
            out[i] = self.valid_c[rows[i]]
        return found

    @property
    def rows_in_use(self):
        return self.max_rows - len(self.free)

    def grow(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts, list free):
        """Blocks for a step that computes positions starts[i] .. starts[i] + counts[i] - 1 of rows[i], from the end
        of `free`. What the rows hold from there on is no longer valid. Drafts that were committed before starts[i] were
        the right tokens: whoever sends the step knows. They are valid with the next commit.

        Returns how many blocks `free` lacks; unless 0, nothing was done. Raises KvGap, IndexError for a row not in
        use, TableFull for a row that would get too long, ValueError as fill() does."""
        cdef Py_ssize_t n = rows.shape[0], i, need, missing = 0
        if starts.shape[0] != n or counts.shape[0] != n:
            raise ValueError("rows, starts and counts have different lengths")
        for i in range(n):
            self.row_length(rows[i])
            if counts[i] < 1 or starts[i] < 0:
                raise ValueError(f"start {starts[i]}, count {counts[i]} of row {rows[i]} is no range of positions")
            if self.written_c[rows[i]] < starts[i]:
                written = self.written_c[rows[i]]
                raise KvGap(f"row {rows[i]} has {written} positions, the step begins at {starts[i]}")
            need = self.blocks_of(<int64_t>starts[i] + counts[i])
            if need > self.max_blocks_per_row:
                raise TableFull(f"row {rows[i]} would have {need} blocks, at most {self.max_blocks_per_row} fit")
            missing += max(0, need - self.lengths[rows[i]])
        missing -= len(free)
        if missing > 0:
            return missing
        for i in range(n):
            need = self.blocks_of(<int64_t>starts[i] + counts[i])
            while self.lengths[rows[i]] < need:
                self.entries[rows[i], self.lengths[rows[i]]] = free.pop()
                self.lengths[rows[i]] += 1
            self.valid_c[rows[i]] = min(self.valid_c[rows[i]], starts[i])
            self.written_c[rows[i]] = starts[i]
        return 0

    def commit(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts,
               const int32_t[:] drafts=None):
        """What grow() made room for has been computed and is valid, but for the last drafts[i] positions of a row:
        those are written, and nobody may count on them before a step says so by beginning behind them. Returns the
        indices i of rows that have filled a block with what has become valid. Raises IndexError, ValueError as fill()
        does."""
        cdef Py_ssize_t n = rows.shape[0], i
        cdef int64_t end, before
        self.check_step(rows, starts, counts)
        if drafts is not None:
            if drafts.shape[0] != n:
                raise ValueError("rows and drafts have different lengths")
            for i in range(n):
                if not 0 <= drafts[i] < counts[i]:
                    raise ValueError(f"a row of {counts[i]} tokens cannot have {drafts[i]} drafts")
        filled = []
        for i in range(n):
            before = self.valid_c[rows[i]]
            end = <int64_t>starts[i] + counts[i]
            self.written_c[rows[i]] = <int32_t>end
            if drafts is not None:
                end -= drafts[i]
            self.valid_c[rows[i]] = <int32_t>end
            if before // self.block_size != end // self.block_size:
                filled.append(i)
        return filled

    cdef Py_ssize_t blocks_of(self, int64_t tokens) noexcept nogil:
        return (tokens + self.block_size - 1) // self.block_size

    cdef int check_step(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts) except -1:
        """Rows that are in use, and positions that their blocks hold."""
        cdef Py_ssize_t n = rows.shape[0], i, need
        if starts.shape[0] != n or counts.shape[0] != n:
            raise ValueError("rows, starts and counts have different lengths")
        for i in range(n):
            self.row_length(rows[i])
            if counts[i] < 1 or starts[i] < 0:
                raise ValueError(f"start {starts[i]}, count {counts[i]} of row {rows[i]} is no range of positions")
            need = self.blocks_of(<int64_t>starts[i] + counts[i])
            if need > self.lengths[rows[i]]:
                raise IndexError(f"row {rows[i]} has {self.lengths[rows[i]]} blocks, the step needs {need}")
        return 0

    def fill(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts, StepArrays out=None):
        """The arrays of a step that computes positions starts[i] .. starts[i] + counts[i] - 1 of rows[i].

        Raises IndexError for a row not in use or positions its blocks do not hold, ValueError for a count
        below 1 or inputs of different lengths. Without `out` the table's own arrays are used (see StepArrays)."""
        cdef Py_ssize_t n = rows.shape[0], i, tokens = 0, width = 0
        self.check_step(rows, starts, counts)
        for i in range(n):
            tokens += counts[i]
            width = max(width, self.blocks_of(<int64_t>starts[i] + counts[i]))
        if tokens > 2**31 - 1:
            raise ValueError("too many tokens for one step")
        if out is None:
            out = self.own
        out.reserve(tokens, n, n * width)
        if n:
            self.write(rows, starts, counts, out, width)
        out.publish(tokens, n, width)
        return out

    cdef void write(self, const int32_t[:] rows, const int32_t[:] starts, const int32_t[:] counts,
                    StepArrays out, Py_ssize_t width) noexcept nogil:
        cdef Py_ssize_t i, j, t = 0, end, need, in_block
        cdef int64_t pos
        cdef const int32_t *entry
        cdef int32_t *table
        for i in range(rows.shape[0]):
            entry = &self.entries[rows[i], 0]
            end = <Py_ssize_t>starts[i] + counts[i]
            out.context_lens_c[i] = <int32_t>end
            pos = starts[i]
            in_block = pos % self.block_size
            while pos < end:
                out.positions_c[t] = pos
                out.slots_c[t] = <int64_t>entry[pos // self.block_size] * self.block_size + in_block
                t += 1
                pos += 1
                in_block += 1
                if in_block == self.block_size:
                    in_block = 0
            out.cu_q_c[i + 1] = <int32_t>t
            need = self.blocks_of(end)
            if need:
                table = &out.tables_c[i * width]
                for j in range(need):
                    table[j] = entry[j]
                for j in range(need, width):
                    table[j] = 0
