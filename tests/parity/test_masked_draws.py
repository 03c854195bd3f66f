"""Draws under a grammar's mask: what they mean, and that no instruction set, thread or neighbour changes a bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.requests import Sampling
from dataplane._fast.sampling import DrawTable
from dataplane.model.sampler import SamplingTable
from kernels.cpu import _native
from tests.parity.sampler_oracle import Row, Sampled, draw, oracle
from tests.parity.test_sampler import VOCAB, assert_equal, logits, random_row, row, rows_of

LLAMA3 = 128256


def with_mask(r: Row, allowed: tuple[int, ...]) -> Row:
    spec = Sampling(**{f: getattr(r.spec, f) for f in r.spec.__struct_fields__} | {"grammar": "some"})
    return replace(r, spec=spec, allowed=allowed)


def admit(table: SamplingTable, r: Row) -> int:
    slot = table.admit(r.spec, r.prompt, r.output)
    if r.allowed is not None:
        assert table.masks is not None
        bits = np.zeros(table.masks.shape[1] * 32, np.uint8)
        bits[list(r.allowed)] = 1
        table.masks[slot] = np.packbits(bits, bitorder="little").view(np.int32)
    return slot


def sampled(values: np.ndarray, rows: list[Row], isa: int = -1, threads: int = 1) -> list[Sampled]:
    table = SamplingTable(len(rows), values.shape[1], _native.Team(threads))
    try:
        _native.set_isa(isa)
        return draw(table, values, [admit(table, r) for r in rows])
    finally:
        _native.set_isa(-1)


masked_rows = st.builds(
    lambda r, allowed: with_mask(r, tuple(sorted(allowed))),
    rows_of,
    st.sets(st.integers(0, VOCAB - 1), min_size=1),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(masked_rows | rows_of, min_size=1, max_size=6), st.integers(0, 1000))
def test_equals_the_oracle_whatever_stands_beside_it(rows: list[Row], seed: int) -> None:
    values = logits(seed, len(rows))
    together = sampled(values, rows)
    for got, raw, r in zip(together, values, rows, strict=True):
        assert_equal(got, oracle(raw, r), r)
        assert sampled(raw[None], [r]) == [got]
        if r.allowed is not None:
            assert got.token in r.allowed
            assert {t for t, _ in got.top} <= set(r.allowed), "a token that cannot come has a probability"


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1024, 1025, 5000, LLAMA3])
def test_any_instruction_set_and_number_of_threads(vocab: int) -> None:
    """Masks of one token, of few, of nearly all and of all, with every other parameter beside them."""
    rng = np.random.default_rng(vocab)
    values = (rng.standard_normal((12, vocab)) * 3).astype(np.float32)
    shares = (0.0, 0.001, 0.03, 0.5, 0.97, 1.0)
    rows = []
    for i in range(12):
        r = random_row(rng, vocab) if vocab > 64 else row(seed=i, logprobs=i % 3)
        allowed = np.flatnonzero(rng.random(vocab) < shares[i % 6])
        rows.append(with_mask(r, tuple(allowed.tolist()) or (int(rng.integers(vocab)),)))
    want = sampled(values, rows, isa=0)
    for got, raw, r in zip(want, values, rows, strict=True):
        assert_equal(got, oracle(raw, r), r)
    for isa in (1, 2, 3):
        for threads in (1, 3):
            assert sampled(values, rows, isa, threads) == want, (isa, threads)


def test_a_mask_of_all_tokens_is_none() -> None:
    values = logits(5, 8)
    rows = [row(seed=i, logprobs=3, top_p=0.9 if i % 2 else 1.0) for i in range(8)]
    free = sampled(values, rows)
    assert sampled(values, [with_mask(r, tuple(range(VOCAB))) for r in rows]) == free


def test_stop_tokens_wait_for_min_tokens_unless_nothing_else_may_come() -> None:
    values = np.array([[9.0, 1.0, 8.0, 7.0]], np.float32)
    early = row(temperature=0.0, min_tokens=2, stop_token_ids=(0, 2, 2))
    assert sampled(values, [with_mask(early, (0, 1, 2))])[0].token == 1
    assert sampled(values, [with_mask(early, (0, 2))])[0].token == 0, "the grammar ends here"
    assert sampled(values, [with_mask(early, (2,))])[0].token == 2
    assert sampled(values, [with_mask(early, (0, 3))])[0].token == 3
    late = row(output=[1, 1], temperature=0.0, min_tokens=2, stop_token_ids=(0, 2))
    assert sampled(values, [with_mask(late, (0, 1, 2))])[0].token == 0


def test_a_mask_without_tokens_is_named_and_others_are_drawn() -> None:
    values = logits(0, 3)
    values[2, 0] = np.nan
    table = SamplingTable(3, VOCAB)
    rows = [with_mask(row(logprobs=1), allowed) for allowed in ((), (3, 4), (1,))]
    drawn = table.sample(values, np.array([admit(table, r) for r in rows], np.int32))
    assert (drawn.dead_ends, drawn.poisoned) == ((0,), (2,))
    assert drawn.tokens[1] in (3, 4)
    assert list(drawn.logprobs) == list(drawn.top) == [1]


def test_bits_beyond_the_vocabulary_do_not_count() -> None:
    table = SamplingTable(1, 33)
    slot = admit(table, with_mask(row(temperature=0.0), (32,)))
    assert table.masks is not None
    table.masks[slot] = (0, -2)  # all of the second word but token 32
    drawn = table.sample(logits(0, 1, 33), np.array([slot], np.int32))
    assert drawn.dead_ends == (0,)


def test_masks_must_fit_the_table() -> None:
    nothing = np.zeros(0, np.int32)
    table = DrawTable(2, 64)
    for shape in ((2, 3), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match="do not fit the table"):
            table.admit(row().spec, nothing, nothing, np.zeros(shape, np.int32))
    assert table.in_use == 0
