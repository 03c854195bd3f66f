"""The sampler: what it means, and that a row depends on nothing but itself."""

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.requests import Sampling
from dataplane.model.sampler import NonFiniteLogits, SampleRow, sample, uniform

VOCAB = 97
NONE = np.empty(0, np.int32)


def logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def row(position: int = 5, prompt: Any = (), output: Any = (), **spec: Any) -> SampleRow:
    return SampleRow(
        Sampling(**{"max_tokens": 1, "seed": 0, **spec}),
        np.array(prompt, np.int32),
        np.array(output, np.int32),
        position,
    )


def draws(values: np.ndarray, count: int, **spec: Any) -> np.ndarray:
    """`count` tokens drawn from one row at different positions."""
    got = sample(np.repeat(values, count, axis=0), [row(p, **spec) for p in range(count)])
    return np.array([s.token for s in got])


specs = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 200]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (96, -100.0))]),
    min_tokens=st.sampled_from([0, 4]),
    stop_token_ids=st.sampled_from([(), (0, 7)]),
    logprobs=st.sampled_from([None, 0, 3, 500]),
)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=8)
rows_of = st.builds(
    lambda spec, prompt, output, position: SampleRow(
        spec, np.array(prompt, np.int32), np.array(output, np.int32), position
    ),
    specs,
    tokens,
    tokens,
    st.integers(0, 10**6),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rows_of, min_size=1, max_size=6), st.integers(0, 1000), st.randoms())
def test_a_row_does_not_depend_on_the_batch(rows: list[SampleRow], seed: int, random: Any) -> None:
    values = logits(seed, len(rows))
    before = values.copy()
    together = sample(values, rows)
    assert np.array_equal(values, before), "the caller's logits were changed"
    for i, r in enumerate(rows):
        assert sample(values[i : i + 1], [r]) == [together[i]]
    order = list(range(len(rows)))
    random.shuffle(order)
    assert sample(values[order], [rows[i] for i in order]) == [together[i] for i in order]
    assert sample(torch.from_numpy(values), rows) == together


@settings(max_examples=150, deadline=None)
@given(rows_of, st.integers(0, 1000))
def test_draws_stay_in_the_allowed_set(r: SampleRow, seed: int) -> None:
    values = logits(seed)
    got = sample(values, [r])[0]
    spec = r.spec
    if len(r.output) < spec.min_tokens:
        assert got.token not in spec.stop_token_ids
    if spec.top_k == 1 or spec.temperature < 1e-5:
        greedy = msgspec.structs.replace(spec, temperature=0.0)
        want = sample(values, [dataclasses.replace(r, spec=greedy)])[0].token
        assert got.token == want


def test_greedy_takes_the_first_of_equals() -> None:
    values = np.zeros((1, 5), np.float32)
    values[0, [2, 4]] = 1.0
    assert sample(values, [row(temperature=0.0)])[0].token == 2


def test_distribution() -> None:
    values = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    count = 4000
    for spec, want in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, np.array([0.5, 0.3, 0.15, 0]) / 0.95),
        ({"min_p": 0.25}, np.array([0.5, 0.3, 0.15, 0]) / 0.95),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"logit_bias": ((0, -100.0),)}, [0, 0.6, 0.3, 0.1]),
    ):
        share = np.bincount(draws(values, count, seed=11, **spec), minlength=4) / count
        assert np.abs(share - want).max() < 0.025, (spec, share)
        assert ((share > 0) == (np.array(want) > 0)).all(), (spec, share)


def test_nucleus_larger_than_the_guess() -> None:
    """Flat logits over many tokens: top-p must not stop at the candidates it sorts first."""
    values = np.zeros((1, 5000), np.float32)
    got = draws(values, 400, seed=1, top_p=0.9)
    assert got.max() > 3000
    assert got.max() < 4500


def test_noise_depends_on_seed_and_position_only() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    values = np.array([[uniform(s, p) for p in range(200)] for s in range(20)])
    assert len(np.unique(values)) == values.size
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.25


def test_penalties() -> None:
    values = np.array([[2.0, -1.0, 1.5, 1.4]], np.float32)
    for spec, want in (
        ({}, 0),
        ({"repetition_penalty": 1.5}, 2),  # prompt and output: 0 -> 1.33
        ({"presence_penalty": 0.6}, 0),  # the prompt does not count
        ({"frequency_penalty": 0.6}, 0),
    ):
        assert sample(values, [row(prompt=[0, 1], temperature=0.0, **spec)])[0].token == want
    for spec, want in (
        ({"presence_penalty": 0.4}, 0),
        ({"presence_penalty": 0.6}, 2),
        ({"frequency_penalty": 0.2}, 0),
        ({"frequency_penalty": 0.3}, 2),  # twice: 2.0 - 0.6
    ):
        assert sample(values, [row(output=[0, 0], temperature=0.0, **spec)])[0].token == want
    # A negative logit is multiplied: -1 -> -1.5
    biased = np.array([[-1.0, -1.2]], np.float32)
    assert sample(biased, [row(prompt=[0], temperature=0.0, repetition_penalty=1.5)])[0].token == 1


def test_min_tokens_masks_stops() -> None:
    values = np.array([[9.0, 1.0, 8.0]], np.float32)
    spec = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (0, 2)}
    assert sample(values, [row(output=[1], **spec)])[0].token == 1
    assert sample(values, [row(output=[1, 1], **spec)])[0].token == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    values = logits(4)
    raw = torch.from_numpy(values).double().log_softmax(-1)[0]
    spec = {"temperature": 0.0, "logit_bias": ((13, 100.0),), "repetition_penalty": 2.0}
    got = sample(values, [row(prompt=[1, 2], logprobs=3, **spec)])[0]
    assert got.token == 13
    assert got.logprob == pytest.approx(raw[13].item(), abs=1e-5)
    best = raw.topk(3)
    assert [t for t, _ in got.top] == best.indices.tolist()
    assert [p for _, p in got.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sample(values, [row(logprobs=0)])[0].top == ()
    assert sample(values, [row()])[0].logprob is None


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_is_named(poison: float) -> None:
    values = logits(0, 4)
    values[1, 7] = values[3, 0] = poison
    with pytest.raises(NonFiniteLogits) as caught:
        sample(values, [row()] * 4)
    assert caught.value.rows == (1, 3)


def test_wrong_number_of_rows() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        sample(logits(0, 3), [row()] * 2)
