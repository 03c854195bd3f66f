"""Draws by sums that are nearly right: how near they are, and that the tokens are those of exact sums."""

from collections.abc import Iterator

import numpy as np
import pytest

from controlplane.contract.requests import Sampling
from dataplane._fast.sampling import DrawTable
from kernels.cpu import _native

LLAMA3 = 128256
VECTORS = (
    1,
    2,
    3,
)  # instruction sets that have an estimate, where the machine has them; 0 draws by exact sums
NOTHING = np.empty(0, np.int32)


def rows(vocab: int, seed: int) -> np.ndarray:
    """[15, vocab]: flat, ordinary and peaked ones, around zero and far from it."""
    rng = np.random.default_rng((vocab, seed))
    spread = np.array([[0.0], [0.01], [1.0], [3.0], [40.0]])
    values = [rng.standard_normal((5, vocab)) * spread + shift for shift in (0.0, 300.0, -5000.0)]
    return np.concatenate(values).astype(np.float32)


@pytest.fixture(params=VECTORS)
def vectors(request: pytest.FixtureRequest) -> Iterator[int]:
    if _native.set_isa(request.param) != request.param:
        _native.set_isa(-1)
        pytest.skip("this machine has no such vectors")
    yield request.param
    _native.set_isa(-1)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("vocab", [1, 63, 64, 1024, 1025, 5000, LLAMA3])
def test_an_estimate_is_as_near_as_it_says(vocab: int) -> None:
    table, known = DrawTable(1, vocab), 0
    for values in rows(vocab, 0):
        for temperature in (0.01, 0.3, 1.0, 7.0, 1e9):
            exact, about, off = table.estimates(values, temperature)
            if about is None or off is None:
                assert abs(values.max()) / temperature > 20000, "numbers that floats can tell apart"
                continue
            known += 1
            assert (np.abs(about - exact) <= off).all()
            assert off.sum() <= exact.sum() * 2.0**-21, "too far off to draw by it"
    assert known > 50


@pytest.mark.usefixtures("vectors")
def test_numbers_without_an_estimate() -> None:
    table = DrawTable(1, 100)
    values = rows(100, 0)[2]
    for temperature in (1e-5, 1e-20, 1e25, 1e300):
        assert table.estimates(values, temperature)[1] is None
    assert table.estimates(np.full(100, -np.inf, np.float32), 1.0)[1] is None


def test_plain_c_has_none() -> None:
    try:
        assert _native.set_isa(0) == 0
        assert DrawTable(1, 100).estimates(rows(100, 0)[2], 1.0)[1] is None
    finally:
        _native.set_isa(-1)


def drawn(values: np.ndarray, seeds: range, isa: int, **spec: object) -> list[list[int]]:
    """A token of each row for each of these seeds."""
    count, vocab = values.shape
    table, tokens = DrawTable(count, vocab), []
    try:
        _native.set_isa(isa)
        for seed in seeds:
            sampling = Sampling(**{"max_tokens": 1, "seed": seed, "temperature": 1.0, **spec})
            slots = np.array([table.admit(sampling, NOTHING, NOTHING) for _ in range(count)], np.int32)
            tokens.append(table.sample(values, slots)[0].tolist())
            for slot in slots.tolist():
                table.release(slot)
    finally:
        _native.set_isa(-1)
    return tokens


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
def test_tokens_are_those_of_exact_sums(temperature: float) -> None:
    values = rows(LLAMA3, 1)
    spec = {"temperature": temperature, "logit_bias": ((5, -1e30), (9, 3.0)) if temperature == 3.0 else ()}
    want = drawn(values, range(8), 0, **spec)
    for isa in VECTORS:
        assert drawn(values, range(8), isa, **spec) == want, isa


def test_next_to_a_boundary_exact_sums_decide(vectors: int) -> None:
    """As many tokens as there may be, of two logits: the one that is estimated too heavy, then the one too light."""
    vocab = (1 << 19) - 1
    candidates = np.linspace(-1.0, 0.0, 400, dtype=np.float32)
    exact, about, _ = DrawTable(1, 400 * 1024).estimates(np.repeat(candidates, 1024), 1.0)
    assert about is not None
    error = about / exact
    heavy, light = candidates[error.argmax()], candidates[error.argmin()]
    values = np.full((1, vocab), light)
    values[0, : vocab // 2], values[0, -1] = heavy, 0.0  # the best is what the candidates had
    want = drawn(values, range(700), 0)
    assert len({token for row in want for token in row}) > 600
    assert drawn(values, range(700), vectors) == want
