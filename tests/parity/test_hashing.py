"""The oracle executor's stage in Cython equals its definition (dataplane/oracle.py), one position after the other."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane._fast.hashing import stage_hashes
from dataplane.oracle import Hashes, kv_hashes, out_hashes, position_weights

BLOCK, BLOCKS, STAGE = 4, 60, 2
ROWS = ((0, 1), (7, 1), (8, 1), (0, 11), (6, 9), (12, 4))  # positions before the step, tokens in it
WEIGHTS = position_weights(64)


def step(random: np.random.Generator) -> StepArrays:
    table = BlockTable(len(ROWS), 16, BLOCK)
    free = random.permutation(BLOCKS).tolist()
    for start, count in ROWS:
        table.extend(table.new_row(), [free.pop() for _ in range(-(-(start + count) // BLOCK))])
    starts, counts = np.array(ROWS, np.int32).T
    for row, start in enumerate(starts):
        table.set_valid(row, int(start))
    return table.fill(np.arange(len(ROWS), dtype=np.int32), starts, counts)


def defined(hashes: Hashes, blocks: Hashes, arrays: StepArrays) -> Hashes:
    blocks.reshape(-1)[arrays.slots] = kv_hashes(hashes, STAGE)
    out = np.empty_like(hashes)
    for row, (start, count) in enumerate(ROWS):
        for index in range(count):
            kv = blocks[arrays.tables[row]].reshape(-1)[: start + index + 1]
            token = slice(arrays.cu_q[row] + index, arrays.cu_q[row] + index + 1)
            seen = (kv * WEIGHTS[: len(kv)]).sum(dtype=np.uint64, keepdims=True)
            out[token] = out_hashes(hashes[token], seen)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_is_defined(seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = step(random)
    hashes = random.integers(0, 2**64, arrays.num_tokens, np.uint64)
    blocks = random.integers(0, 2**64, (BLOCKS, BLOCK), np.uint64)
    expected_blocks = blocks.copy()
    expected = defined(hashes, expected_blocks, arrays)
    assert np.array_equal(stage_hashes(hashes, blocks, arrays, STAGE, WEIGHTS), expected)
    assert np.array_equal(blocks, expected_blocks)


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        ({"slots": np.array([0, 1, BLOCKS * BLOCK])}, IndexError),
        ({"slots": np.array([0, -1, 2])}, IndexError),
        ({"tables": np.array([[BLOCKS]], np.int32)}, IndexError),
        ({"context_lens": np.array([5], np.int32)}, ValueError),
        ({"context_lens": np.array([2], np.int32)}, ValueError),
        ({"cu_q": np.array([0, 2], np.int32)}, ValueError),
        ({"cu_q": np.array([0, 2, 3], np.int32)}, ValueError),
    ],
)
def test_arrays_that_do_not_fit_are_refused(harm: dict[str, np.ndarray], error: type[Exception]) -> None:
    sound = {
        "slots": np.array([0, 1, 2]),
        "cu_q": np.array([0, 3], np.int32),
        "context_lens": np.array([3], np.int32),
        "tables": np.array([[0]], np.int32),
    }
    blocks = np.zeros((BLOCKS, BLOCK), np.uint64)
    hashes = np.ones(3, np.uint64)
    stage_hashes(hashes, blocks.copy(), SimpleNamespace(**sound), STAGE, WEIGHTS)  # type: ignore[arg-type]
    with pytest.raises(error):
        stage_hashes(hashes, blocks, SimpleNamespace(**sound | harm), STAGE, WEIGHTS)  # type: ignore[arg-type]
    assert not blocks.any()
