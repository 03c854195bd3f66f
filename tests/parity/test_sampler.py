"""The sampler: what it means, and that a row depends on nothing but itself."""

import math
import random
import threading
import time
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.requests import Sampling
from dataplane._fast.sampling import DrawTable, SlotsFull
from dataplane.model.sampler import SamplingTable
from kernels.cpu import _native
from tests.parity.sampler_oracle import Row, Sampled, draw, integer_weights, oracle, uniform

VOCAB = 97
ROWS_MAX = 16


def logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def row(prompt: Any = (), output: Any = (), **spec: Any) -> Row:
    return Row(Sampling(**{"max_tokens": 1, "seed": 0, **spec}), list(prompt), list(output))


def sample(values: np.ndarray, rows: list[Row]) -> list[Sampled]:
    table = SamplingTable(len(rows), values.shape[1])
    return draw(table, values, [table.admit(r.spec, r.prompt, r.output) for r in rows])


def assert_equal(got: Sampled, want: Sampled, r: Row) -> None:
    assert got.token == want.token, r
    assert [t for t, _ in got.top] == [t for t, _ in want.top]
    assert [p for _, p in got.top] == pytest.approx([p for _, p in want.top], abs=1e-9)
    assert (got.logprob is None) == (want.logprob is None)
    assert got.logprob is None or got.logprob == pytest.approx(want.logprob, abs=1e-9)


def draws(values: np.ndarray, count: int, **spec: Any) -> np.ndarray:
    """`count` tokens drawn from one row at different positions."""
    table = SamplingTable(1, values.shape[1])
    slot, tokens = table.admit(row(**spec).spec, [], []), []
    for _ in range(count):
        tokens.append(draw(table, values, [slot])[0].token)
        table.append(slot, 0)
    return np.array(tokens)


specs = st.builds(
    Sampling,
    max_tokens=st.just(1),
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
rows_of = st.builds(Row, specs, tokens, tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows_of, min_size=1, max_size=6), st.integers(0, 1000), st.randoms())
def test_a_row_does_not_depend_on_the_batch(rows: list[Row], seed: int, rng: random.Random) -> None:
    """Nor on its slot, its neighbours, or whether its output was there at once or came token by token."""
    values = logits(seed, len(rows))
    before = values.copy()
    together = sample(values, rows)
    assert np.array_equal(values, before), "the caller's logits were changed"
    table = SamplingTable(ROWS_MAX, VOCAB)
    order = list(range(len(rows)))
    rng.shuffle(order)
    slots: dict[int, int] = {}
    for i in order:
        if rng.random() < 0.3 and table.slots_in_use < ROWS_MAX - len(rows):
            table.admit(rows[0].spec, [1, 2], [3])
        half = rng.randint(0, len(rows[i].output))
        slots[i] = table.admit(rows[i].spec, rows[i].prompt, rows[i].output[:half])
        for token in rows[i].output[half:]:
            table.append(slots[i], token)
    assert draw(table, values[order], [slots[i] for i in order]) == [together[i] for i in order]
    for i, r in enumerate(rows):
        assert draw(table, values[i : i + 1], [slots[i]]) == [together[i]]
        assert_equal(together[i], oracle(values[i], r), r)


@pytest.mark.parametrize(("vocab", "batches"), [(VOCAB, 12), (4096, 8), (32000, 4), (128256, 2)])
def test_equals_the_oracle(vocab: int, batches: int) -> None:
    """All parameters mixed; flat, ordinary and peaked logits, half of them with many equal values."""
    for batch in range(batches):
        rng = np.random.default_rng((vocab, batch))
        count = int(rng.integers(1, 65))
        spread = rng.choice([0.0, 0.3, 1.0, 3.0, 8.0], (count, 1))
        values = (rng.standard_normal((count, vocab)) * spread).astype(np.float32)
        if batch % 2:
            values = np.round(values * 4) / 4
        rows = [random_row(rng, vocab) for _ in range(count)]
        for got, raw, r in zip(sample(values, rows), values, rows, strict=True):
            assert_equal(got, oracle(raw, r), r)


LLAMA3 = 128256


def sampled(values: np.ndarray, rows: list[Row], isa: int, threads: int) -> list[Sampled]:
    """With another instruction set, and rows shared among threads."""
    table = SamplingTable(len(rows), values.shape[1], _native.Team(threads))
    try:
        _native.set_isa(isa)
        return draw(table, values, [table.admit(r.spec, r.prompt, r.output) for r in rows])
    finally:
        _native.set_isa(-1)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 1024, 1025, 5000, LLAMA3])
def test_any_instruction_set_and_number_of_threads(vocab: int) -> None:
    """The same bits: tokens, and log probabilities to the last one. Denormals are not zero here."""
    rng = np.random.default_rng(vocab)
    values = (rng.standard_normal((12, vocab)) * 3).astype(np.float32)
    values[1] = np.round(values[1])  # many equal
    values[2] *= np.float32(1e-39)
    rows = [random_row(rng, vocab) if vocab > 64 else row(seed=i, logprobs=i % 3) for i in range(12)]
    rows[0] = row(seed=1, logprobs=5)
    rows[1] = row(seed=2, logprobs=20, top_p=0.9)
    rows[2] = row(temperature=0.0, logprobs=2)
    rows[3] = row(seed=3, logprobs=300, top_p=0.95, top_k=1000)
    want = sampled(values, rows, 0, 1)
    assert want[2].token == int(values[2].argmax()), "a denormal was taken for zero"
    assert want[1].top == oracle_top(values[1], want[1])
    for isa in (0, 1, 2, 3):
        for threads in (1, 3):
            assert sampled(values, rows, isa, threads) == want, (isa, threads)


def oracle_top(values: np.ndarray, got: Sampled) -> tuple[tuple[int, float], ...]:
    """The order of the largest, equal ones by token, with the values that `got` names."""
    order = np.argsort(-values, kind="stable")[: len(got.top)].tolist()
    return tuple(zip(order, [p for _, p in got.top], strict=True))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 300, 5000, 9999])
@pytest.mark.parametrize("kinds", [1, 3, 40, 0])
def test_the_most_likely_are_in_order(count: int, kinds: int) -> None:
    """However many are asked for, over five blocks, with few or no different values."""
    values = logits(count, 1, 5000)
    if kinds:
        values = np.random.default_rng(kinds).integers(0, kinds, (1, 5000)).astype(np.float32) - kinds / 2
    got = sample(values, [row(seed=1, logprobs=count)])[0]
    assert_equal(got, oracle(values[0], row(seed=1, logprobs=count)), row(seed=1, logprobs=count))
    assert len(got.top) == min(count, 5000)


def random_row(rng: np.random.Generator, vocab: int) -> Row:
    def one_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    return row(
        prompt=rng.integers(0, vocab, int(rng.integers(0, 300))).tolist(),
        output=rng.integers(0, vocab // 8, int(rng.integers(0, 2000))).tolist(),
        seed=int(rng.integers(0, 2**62)),
        temperature=one_of(0.0, 9e-6, 1e-5, 1e-4, 0.1, 0.8, 1.0, 2.0, 100.0, 1e9),
        top_k=one_of(0, 0, 1, 2, 40, 1000, vocab - 1, vocab, 2 * vocab),
        top_p=one_of(1.0, 1.0, 0.95, 0.5, 0.999999, 0.01, 0.0),
        min_p=one_of(0.0, 0.0, 0.05, 0.5, 1.0),
        repetition_penalty=one_of(1.0, 1.0, 1.3, 0.8),
        presence_penalty=one_of(0.0, 0.0, 0.5, -1.0),
        frequency_penalty=one_of(0.0, 0.0, 0.3, -0.1),
        logit_bias=one_of((), ((3, -100.0), (5, 2.5), (5, 0.5))),
        min_tokens=one_of(0, 0, 1000),
        stop_token_ids=(1, 2),
        logprobs=one_of(None, None, 0, 5),
    )


@pytest.mark.parametrize("vocab", [1, 15, VOCAB, 4096, 32000, 128256])
def test_arithmetic_is_the_same_on_every_machine(vocab: int) -> None:
    """Bits, not closeness: whatever vectors the compiler chose, the weights are those of plain IEEE operations."""
    table = DrawTable(1, vocab)
    for seed in range(20):
        values = logits(seed, 1, vocab)[0] * np.float32(seed)
        mantissa, exponent = math.frexp(int(integer_weights(values, 1.0).sum()))
        z = (mantissa - 0.75) / (mantissa + 0.75)
        series = 0.0
        for k in range(27, 0, -2):
            series = series * (z * z) + 1.0 / k
        log = 2.0 * z * series + -0.2876820724517809 + (exponent - 44) * 0.6931471805599453
        got = table.log_sum_exp(values)
        assert got == float(values.max()) + log
        assert got == pytest.approx(torch.from_numpy(values).double().logsumexp(0).item(), abs=1e-9)


@pytest.mark.parametrize("temperature", [1e-5, 0.3, 1.0, 7.0, 1e30])
def test_draws_invert_the_integer_weights(temperature: float) -> None:
    values = logits(3, 1, 5000)
    weights = integer_weights(values[0], temperature).astype(object)  # exact products below
    cumulative = np.cumsum(weights)
    spec = {"temperature": temperature, "seed": 5}
    for position, token in enumerate(draws(values, 300, **spec)):
        pick = int(uniform(5, position) * 2**53) * int(cumulative[-1]) >> 53
        assert token == np.flatnonzero(cumulative > pick)[0]


@settings(max_examples=150, deadline=None)
@given(rows_of, st.integers(0, 1000))
def test_draws_stay_in_the_allowed_set(r: Row, seed: int) -> None:
    values = logits(seed)
    got = sample(values, [r])[0]
    spec = r.spec
    if len(r.output) < spec.min_tokens:
        assert got.token not in spec.stop_token_ids
    if spec.top_k == 1 or spec.temperature < 1e-5:
        greedy = msgspec.structs.replace(spec, temperature=0.0)
        assert got.token == sample(values, [replace(r, spec=greedy)])[0].token


def test_greedy_takes_the_first_of_equals() -> None:
    values = np.zeros((1, 3000), np.float32)
    assert sample(values, [row(temperature=0.0)])[0].token == 0
    values[0, [1, 2]] = -0.0, 0.0
    values[0, 0] = -1.0
    assert sample(values, [row(temperature=0.0)])[0].token == 1, "-0 equals 0"
    for first in (4, 1023, 1024, 2998):
        values[0] = -3.0
        values[0, [first, 2999]] = -1.0
        assert sample(values, [row(temperature=0.0)])[0].token == first


def test_everything_masked_is_no_crash() -> None:
    values = np.zeros((1, 3), np.float32)
    for temperature in (0.0, 1.0):
        r = row(temperature=temperature, min_tokens=1, stop_token_ids=(0, 1, 2), top_p=0.5)
        assert sample(values, [r])[0].token == 0


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


def test_nucleus_of_equals_takes_the_first() -> None:
    values = np.zeros((1, 5000), np.float32)
    got = draws(values, 400, seed=1, top_p=0.9)
    assert got.max() > 4400
    assert got.max() < 4500
    assert draws(values, 400, seed=1, top_k=3).max() > 4500, "top-k keeps all that equal its last"


@pytest.mark.parametrize("sampled", [1.0, -1.0, -40.0, 30.0, -np.inf])
@pytest.mark.parametrize("top_p", [0.999, 0.9, 0.5, 0.05])
def test_a_nucleus_is_exact_whatever_part_of_the_vocabulary_tells(sampled: float, top_p: float) -> None:
    """Where to look for it is guessed from the first tokens of each block of 1,024: these may be unlike the others."""
    values = logits(2, 1, 7000)
    first = np.arange(7000) % 1024 < 64
    if sampled == -np.inf:
        spec = {"logit_bias": tuple((int(i), -1e9) for i in np.flatnonzero(first))}
    else:
        values[0, first] += np.float32(sampled)
        spec = {}
    for seed in range(60):
        r = row(seed=seed, top_p=top_p, **spec)
        assert_equal(sample(values, [r])[0], oracle(values[0], r), r)


def test_noise_depends_on_seed_and_position_only() -> None:
    """The numbers are numpy's Philox: seen through many equal tokens, the draw is the noise's first bits."""
    vocab = (1 << 19) - 1  # the most there may be
    table = SamplingTable(40, vocab)
    flat = np.zeros((1, vocab), np.float32)
    for seed in (0, 1, 2**63, 2**64 - 1, -5):
        slot = table.admit(row(seed=seed).spec, [], [])
        for position in range(5):
            assert draw(table, flat, [slot])[0].token == int(uniform(seed, position) * 2**53) * vocab >> 53
            table.append(slot, 7)
    values = np.array([[uniform(s, p) for p in range(200)] for s in range(20)])
    assert len(np.unique(values)) == values.size
    assert abs(values.mean() - 0.5) < 0.02


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
    assert sample(values, [row(output=[1, 1], **spec, presence_penalty=0.1)])[0].token == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    values = logits(4)
    raw = torch.from_numpy(values).double().log_softmax(-1)[0]
    spec = {"temperature": 0.0, "logit_bias": ((13, 100.0),), "repetition_penalty": 2.0}
    got = sample(values, [row(prompt=[1, 2], logprobs=3, **spec)])[0]
    assert got.token == 13
    assert got.logprob == pytest.approx(raw[13].item(), abs=1e-9)
    best = raw.topk(3)
    assert [t for t, _ in got.top] == best.indices.tolist()
    assert [p for _, p in got.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    table = SamplingTable(2, VOCAB)
    slots = [table.admit(row(logprobs=n).spec, [], []) for n in (None, 0)]
    drawn = table.sample(np.repeat(values, 2, axis=0), np.array(slots, np.int32))
    assert (list(drawn.logprobs), drawn.top) == ([1], {1: ()})


@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf, -np.inf])
def test_poison_is_named_and_others_are_drawn(poison: float) -> None:
    values = logits(0, 4)
    healthy = sample(values, [row(logprobs=1)] * 4)
    values[1, 7] = values[3, 0] = poison
    table = SamplingTable(4, VOCAB)
    slots = np.array([table.admit(row(logprobs=1).spec, [], []) for _ in range(4)], np.int32)
    drawn = table.sample(values, slots)
    assert drawn.poisoned == (1, 3)
    assert [drawn.tokens[0], drawn.tokens[2]] == [healthy[0].token, healthy[2].token]
    assert list(drawn.logprobs) == list(drawn.top) == [0, 2]


def test_a_released_slot_forgets() -> None:
    table = SamplingTable(1, 2)
    penalised = row(temperature=0.0, logprobs=1, repetition_penalty=9.0, logit_bias=((0, -5.0),)).spec
    slot = table.admit(penalised, [0], [0, 0])
    values = np.array([[1.0, 0.5]], np.float32)
    assert draw(table, values, [slot])[0].token == 1
    with pytest.raises(SlotsFull, match="all 1 slots"):
        table.admit(penalised, [], [])
    table.release(slot)
    assert table.slots_in_use == 0
    for call in (
        lambda: table.release(slot),
        lambda: table.append(slot, 0),
        lambda: draw(table, values, [slot]),
    ):
        with pytest.raises(IndexError, match="not in use"):
            call()
    again = table.admit(row(temperature=0.0).spec, [], [])
    assert draw(table, values, [again]) == [Sampled(0, None, ())]


def test_wrong_arguments_change_nothing() -> None:
    table = SamplingTable(2, 5)
    for bad in (
        row(prompt=[5]),
        row(output=[-1]),
        row(logit_bias=((9, 1.0),)),
        row(min_tokens=1, stop_token_ids=(5,)),
    ):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            table.admit(bad.spec, bad.prompt, bad.output)
    slot = table.admit(row(temperature=0.0, frequency_penalty=1.0).spec, [], [])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        table.append_many(np.array([slot, slot], np.int32), np.array([4, 5]))
    values = np.array([[0, 0, 0, 0, 0.5]], np.float32)
    assert draw(table, values, [slot])[0].token == 4, "the first token of the refused call was counted"
    for shape, slots in (((1, 4), [slot]), ((2, 5), [slot]), ((1, 5), [])):
        with pytest.raises(ValueError, match="do not fit"):
            draw(table, np.zeros(shape, np.float32), slots)
    assert draw(table, np.zeros((0, 5), np.float32), []) == []
    for rows, vocab in ((0, 5), (1, 0), (1, 1 << 19)):
        with pytest.raises(ValueError, match="no table"):
            SamplingTable(rows, vocab)


def test_sampling_releases_the_interpreter_and_guards_the_table() -> None:
    """Another thread runs meanwhile, and is refused what would pull memory from under the draw."""
    table = SamplingTable(1, 1 << 18)
    slot = table.admit(row().spec, [], [])
    values = logits(0, 1, 1 << 18)
    stop = threading.Event()

    def keep_sampling() -> None:
        while not stop.is_set():
            table.sample(values, np.array([slot], np.int32))

    thread = threading.Thread(target=keep_sampling)
    thread.start()
    try:
        deadline, refused = time.monotonic() + 30, ""
        while not refused and time.monotonic() < deadline:
            try:
                table.append(slot, 0)
            except RuntimeError as error:
                refused = str(error)
    finally:
        stop.set()
        thread.join(30)
    assert "another thread is sampling" in refused
