"""The Cython block table equals its plain Python oracle, and refuses what does not fit."""

import sys
from subprocess import run

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane._fast._oracle import OracleBlockTable, OracleRows
from dataplane._fast.blocktable import BlockTable, KvGap, Rows, StepArrays, TableFull, lookup
from dataplane.core.messages import pack_rows

ROWS, WIDTH, SIZE = 4, 6, 3
ARRAYS = ("positions", "slots", "cu_q", "context_lens", "tables")

row = st.integers(-1, ROWS)
steps = st.lists(st.tuples(row, st.integers(-1, SIZE * WIDTH), st.integers(0, SIZE * WIDTH)), max_size=4)
operation = st.one_of(
    st.tuples(st.just("new_row")),
    st.tuples(st.just("free_row"), row),
    st.tuples(st.just("extend"), row, st.lists(st.integers(-1, 2**31 - 1), max_size=WIDTH + 1)),
    st.tuples(st.just("set_block"), row, st.integers(-1, WIDTH), st.integers(-1, 2**31)),
    st.tuples(st.just("truncate"), row, st.integers(-1, WIDTH)),
    st.tuples(st.just("blocks"), row),
    st.tuples(st.just("num_blocks"), row),
    st.tuples(st.just("block"), row, st.integers(-1, WIDTH)),
    st.tuples(st.just("valid"), row),
    st.tuples(st.just("set_valid"), row, st.integers(-1, SIZE * WIDTH)),
    st.tuples(st.just("fill"), steps),
    st.tuples(st.just("commit"), steps),
    st.tuples(st.just("grow"), steps, st.lists(st.integers(0, 2**31 - 1), max_size=2 * WIDTH)),
)


def outcome(table: BlockTable | OracleBlockTable, op: tuple) -> object:
    """What an operation returns, or the type of what it raises."""
    name, *args = op
    try:
        if name not in ("fill", "commit", "grow"):
            return getattr(table, name)(*args)
        columns = np.array(args[0], np.int32).reshape(-1, 3).T
        if name == "grow":
            free = list(args[1])
            return table.grow(*columns, free), free
        if name == "commit":
            return table.commit(*columns)
        out = table.fill(*columns)
        arrays = [getattr(out, a) for a in ARRAYS]
        return [(a.dtype.name, a.shape, a.tolist()) for a in arrays]
    except (IndexError, ValueError, TableFull) as error:
        return type(error)


@settings(max_examples=400, deadline=None)
@given(st.lists(operation, max_size=40))
def test_equals_oracle(operations: list[tuple]) -> None:
    table, oracle = BlockTable(ROWS, WIDTH, SIZE), OracleBlockTable(ROWS, WIDTH, SIZE)
    for op in operations:
        assert outcome(table, op) == outcome(oracle, op), op


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_growing_rows_equal_oracle(data: st.DataObject) -> None:
    """Steps as a stage has them: several rows at once, each going on where it is valid, until no block is left."""
    table, oracle = BlockTable(ROWS, WIDTH, SIZE), OracleBlockTable(ROWS, WIDTH, SIZE)
    mine, theirs = list(range(ROWS * WIDTH - 3)), list(range(ROWS * WIDTH - 3))
    rows = [table.new_row() for _ in range(ROWS)]
    assert rows == [oracle.new_row() for _ in range(ROWS)]
    written = dict.fromkeys(rows, 0)
    for _ in range(8):
        chosen = data.draw(st.lists(st.sampled_from(rows), unique=True, max_size=ROWS))
        starts = [data.draw(st.integers(0, min(written[r], SIZE * WIDTH - 1))) for r in chosen]
        counts = [data.draw(st.integers(1, SIZE * WIDTH - start)) for start in starts]
        drafts = np.array([data.draw(st.integers(0, count - 1)) for count in counts], np.int32)
        step = [np.array(column, np.int32) for column in (chosen, starts, counts)]
        before = {r: table.valid(r) for r in chosen}
        missing = table.grow(*step, mine)
        assert missing == oracle.grow(*step, theirs)
        assert mine == theirs
        if missing == 0:
            assert [table.valid(r) for r in chosen] == [
                min(before[r], start) for r, start in zip(chosen, starts, strict=True)
            ]
            assert table.commit(*step, drafts) == oracle.commit(*step, drafts)
            for r, start, count, some in zip(chosen, starts, counts, drafts.tolist(), strict=True):
                written[r] = start + count
                assert table.valid(r) == start + count - some
        for r in rows:
            assert (table.blocks(r), table.valid(r)) == (oracle.blocks(r), oracle.valid(r))
        assert table.valid_of(np.array(rows, np.int32)).tolist() == [table.valid(r) for r in rows]


def test_a_step_behind_what_is_valid_is_a_gap() -> None:
    table = BlockTable(1, 4, 4)
    one = [np.array([x], np.int32) for x in (table.new_row(), 0, 5)]
    assert table.grow(*one, [3, 2, 1]) == 0
    with pytest.raises(KvGap, match="0 positions, the step begins at 5"):
        table.grow(one[0], one[2], one[2], [0])
    assert table.commit(*one) == [0]
    assert table.grow(one[0], one[2], one[2], [0]) == 0


def test_drafts_are_valid_once_a_step_begins_behind_them() -> None:
    table = BlockTable(1, 4, 4)
    row = np.array([table.new_row()], np.int32)

    def at(*values: int) -> list[np.ndarray]:
        return [row, *(np.array([value], np.int32) for value in values)]

    assert table.grow(*at(0, 6), [3, 2, 1, 0]) == 0
    assert table.commit(*at(0, 6, 3)) == []
    assert table.valid(0) == 3
    with pytest.raises(KvGap):
        table.grow(*at(7, 1), [9])
    assert table.grow(*at(5, 2), [9]) == 0  # two of three were right
    assert table.valid(0) == 3
    with pytest.raises(ValueError, match="cannot have 2 drafts"):
        table.commit(*at(5, 2, 2))
    assert table.commit(*at(5, 2, 1)) == [0]
    assert table.valid(0) == 6
    table.set_valid(0, 6)
    with pytest.raises(KvGap):
        table.grow(*at(7, 1), [9])  # what was written behind is void


@given(
    st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 9))
)
def test_lookup_finds_what_is_there(held: dict[int, int], others: list[int]) -> None:
    keys = [*held, *others]
    found, unknown = lookup(held, np.array(keys, np.int64))
    assert found.dtype == np.int32
    assert found.tolist() == [held.get(key, -1) for key in keys]
    assert unknown == sum(key not in held for key in keys)


@given(
    st.lists(
        st.tuples(st.integers(1, 2**63 - 1), st.integers(0, 2**20), st.integers(1, 2**12), st.integers(0, 3)),
        max_size=20,
    )
)
def test_rows_equal_oracle(rows: list[tuple[int, int, int, int]]) -> None:
    rows = [(rid, start, count, min(samples, count)) for rid, start, count, samples in rows]
    data = pack_rows(rows)
    got, want = Rows(data), OracleRows(data)
    for name in ("rids", "starts", "counts", "sample_rids", "sample_rows", "drafts", "depths"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist(), name
    with pytest.raises(ValueError, match="no rows of a step"):
        Rows(data + b"x")
    with pytest.raises(ValueError, match="cannot sample 3 times"):
        Rows(pack_rows([*rows, (1, 0, 2, 3)]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_valid_steps_equal_oracle(data: st.DataObject) -> None:
    """Steps that fit, so that arrays and not errors are compared; the same arrays are filled again and again."""
    size = data.draw(st.sampled_from([1, 3, 16]))
    table, oracle, out = BlockTable(8, 12, size), OracleBlockTable(8, 12, size), StepArrays()
    rows = [table.new_row() for _ in range(8)]
    assert rows == [oracle.new_row() for _ in range(8)]
    for r in rows:
        blocks = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
        table.extend(r, blocks)
        oracle.extend(r, blocks)
    for _ in range(3):
        work = []
        for r in data.draw(st.lists(st.sampled_from(rows), max_size=8)):
            start = data.draw(st.integers(0, table.num_blocks(r) * size - 1))
            work.append((r, start, data.draw(st.integers(1, table.num_blocks(r) * size - start))))
        columns = np.array(work, np.int32).reshape(-1, 3).T
        want = oracle.fill(*columns)
        got = table.fill(*columns, out=out)
        assert got is out
        for name in ARRAYS:
            a, b = getattr(got, name), getattr(want, name)
            assert a.dtype == b.dtype
            assert a.flags.c_contiguous
            assert np.array_equal(a, b), name
        assert (got.num_tokens, got.num_rows) == (len(want.positions), len(work))


def test_refused_fill_leaves_the_arrays() -> None:
    table = BlockTable(2, 4, 4)
    r = table.new_row()
    table.extend(r, [5, 6])
    one = [np.array([x], np.int32) for x in (r, 0, 3)]
    out = table.fill(*one)
    before = [getattr(out, name).copy() for name in ARRAYS]
    for bad in ((r, 0, 9), (r, 8, 1), (r, 7, 2), (r + 1, 0, 1), (r, 2**31 - 1, 1), (r, 0, 2**31 - 1)):
        with pytest.raises(IndexError):
            table.fill(*(np.array([x], np.int32) for x in bad))
    for name, want in zip(ARRAYS, before, strict=True):
        assert np.array_equal(getattr(out, name), want)


def test_full_is_a_memory_error() -> None:
    table = BlockTable(1, 2, 16)
    r = table.new_row()
    with pytest.raises(MemoryError, match="rows are in use"):
        table.new_row()
    with pytest.raises(MemoryError, match="at most 2"):
        table.extend(r, [1, 2, 3])
    assert table.blocks(r) == []
    assert (table.rows_in_use, table.free_row(r), table.rows_in_use) == (1, [], 0)


def test_needs_no_torch() -> None:
    code = "import sys; import dataplane._fast._oracle, dataplane.kvcache, dataplane.oracle, \
dataplane.model.sampler; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
