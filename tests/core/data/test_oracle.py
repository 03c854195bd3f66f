"""The executor without tensors: its tokens depend on everything they ought to depend on, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from controlplane.contract.requests import Sampling
from dataplane._fast.blocktable import BlockTable
from dataplane.demo import model_dir
from dataplane.devices import A10_LLAMA_8B_QUARTER, PROFILES
from dataplane.model.config import load_config
from dataplane.model.sampler import SamplingTable
from dataplane.oracle import CANDIDATES, OracleExecutor

BLOCK = 4
STAGES = 3


class Pipeline:
    """Stages with a block table each, whose rows are given blocks in a scattered order."""

    def __init__(self, seed: int = 0) -> None:
        self.stages = [
            OracleExecutor(
                load_config(model_dir()),
                s,
                STAGES,
                num_blocks=64,
                block_size=BLOCK,
                profile=PROFILES["instant"],
            )
            for s in range(STAGES)
        ]
        order = np.random.default_rng(seed).permutation(64).tolist()
        self.table = BlockTable(8, 16, BLOCK)
        self._free = order
        for executor in self.stages:  # whatever was there before must not matter
            executor.kv.array.view(np.uint8)[:] = 0xA5

    def row(self) -> int:
        row = self.table.new_row()
        self.table.extend(row, [self._free.pop() for _ in range(10)])
        return row

    def run(self, *parts: tuple[int, int, list[int]]) -> np.ndarray:
        """One step of (row, start, tokens); logits [rows, vocab] after the last token of each."""
        rows, starts = (np.array([p[i] for p in parts], np.int32) for i in (0, 1))
        counts = np.array([len(p[2]) for p in parts], np.int32)
        arrays = self.table.fill(rows, starts, counts)
        hidden = None
        for executor in self.stages:
            tokens = np.concatenate([p[2] for p in parts]).astype(np.int64) if executor.is_first else None
            hidden = executor.forward(tokens, hidden, arrays, np.cumsum(counts, dtype=np.int32) - 1).data
        return np.array(hidden)


PROMPT = list(range(100, 119))


def test_a_prompt_in_chunks_or_token_by_token_gives_the_same_bits() -> None:
    whole = Pipeline(1)
    expected = whole.run((whole.row(), 0, PROMPT))
    for cuts in ([7, 12], list(range(1, len(PROMPT)))):
        pipeline = Pipeline(2)  # other blocks
        row = pipeline.row()
        for start, end in zip([0, *cuts], [*cuts, len(PROMPT)], strict=True):
            logits = pipeline.run((row, start, PROMPT[start:end]))
        assert np.array_equal(logits, expected)


def test_company_in_a_batch_changes_nothing() -> None:
    alone = Pipeline()
    row = alone.row()
    alone.run((row, 0, PROMPT))
    expected = alone.run((row, len(PROMPT), [7]))
    crowd = Pipeline()
    row, other = crowd.row(), crowd.row()
    crowd.run((row, 0, PROMPT), (other, 0, [5, 6]))
    assert np.array_equal(crowd.run((other, 2, [9, 9, 9]), (row, len(PROMPT), [7]))[1], expected[0])


def swap_blocks(pipeline: Pipeline, stage: int, row: int) -> None:
    a, b = (pipeline.table.block(row, index) for index in (0, 1))
    kv = pipeline.stages[stage].kv
    kept = bytes(kv.view(a))
    kv.write(a, kv.view(b))
    kv.write(b, kept)


def flip_bit(pipeline: Pipeline, stage: int, row: int) -> None:
    pipeline.stages[stage].kv.view(pipeline.table.block(row, 2))[5] ^= 1


def stale_block(pipeline: Pipeline, stage: int, row: int) -> None:
    kv = pipeline.stages[stage].kv
    kv.write(pipeline.table.block(row, 1), bytes(kv.block_bytes))


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("harm", [swap_blocks, flip_bit, stale_block])
def test_wrong_kv_on_any_stage_shows_in_the_next_token(
    harm: Callable[[Pipeline, int, int], None], stage: int
) -> None:
    pipeline = Pipeline()
    row = pipeline.row()
    pipeline.run((row, 0, PROMPT))
    sound = pipeline.run((row, len(PROMPT), [7]))
    harm(pipeline, stage, row)
    assert not np.array_equal(pipeline.run((row, len(PROMPT), [7])), sound)


def test_what_lies_behind_the_context_does_not_matter() -> None:
    pipeline = Pipeline()
    row = pipeline.row()
    pipeline.run((row, 0, PROMPT[:17]))
    sound = pipeline.run((row, 17, [7]))  # position 17 is the second of four in its block
    for executor in pipeline.stages:
        executor.kv.view(pipeline.table.block(row, 4))[16:] = b"\x17" * 16
        executor.kv.view(pipeline.table.block(row, 5))[:] = b"\x17" * 32
    assert np.array_equal(pipeline.run((row, 17, [7])), sound)


def test_the_seed_chooses_among_the_candidates() -> None:
    pipeline = Pipeline()
    logits = pipeline.run((pipeline.row(), 0, PROMPT))
    table = SamplingTable(64, pipeline.stages[0].config.vocab_size)
    slots = np.array([table.admit(Sampling(4, seed), PROMPT) for seed in range(64)], np.int32)
    drawn = table.sample(np.repeat(logits, 64, axis=0), slots).tokens
    likely = set(np.flatnonzero(logits[0] > -100).tolist())
    assert len(likely) == CANDIDATES
    assert set(drawn.tolist()) == likely


def test_a_step_keeps_its_device_busy_as_long_as_the_profile_says() -> None:
    scale = 1e-3  # a thousand times slower, so that this process's own time is nothing
    executor = OracleExecutor(
        load_config(model_dir()),
        0,
        2,
        num_blocks=8,
        block_size=BLOCK,
        profile=A10_LLAMA_8B_QUARTER,
        time_scale=scale,
    )
    table = BlockTable(1, 8, BLOCK)
    table.extend(table.new_row(), [3, 1, 2])
    zero = np.zeros(1, np.int32)
    executor.forward(np.arange(5), None, table.fill(zero, zero, zero + 5), np.zeros(0, np.int32))
    p = A10_LLAMA_8B_QUARTER
    expected = (p.fixed_s + 5 * p.per_token_s + 5 * p.per_context_token_s) / scale
    assert executor.step_s == pytest.approx(expected)


def test_inputs_that_do_not_fit_are_refused() -> None:
    pipeline = Pipeline()
    arrays = pipeline.table.fill(
        np.array([pipeline.row()], np.int32), np.zeros(1, np.int32), np.ones(1, np.int32)
    )
    first, second, _ = pipeline.stages
    none = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="needs 1 tokens"):
        first.forward(np.arange(2), None, arrays, none)
    with pytest.raises(IndexError, match="vocabulary"):
        first.forward(np.array([1 << 20]), None, arrays, none)
    with pytest.raises(ValueError, match="activations"):
        second.forward(None, b"1234567", arrays, none)
    with pytest.raises(ValueError, match="stage 2"):
        OracleExecutor(load_config(model_dir()), 2, 2, num_blocks=1, profile=PROFILES["instant"])
