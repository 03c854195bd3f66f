"""Sums that do not depend on order, grouping or instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.ranks import _native, sums

LEVELS = (0, 1)


@pytest.fixture(params=LEVELS, ids=("C", "AVX2"))
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    if _native.set_level(request.param) != request.param:
        pytest.skip("this processor has no AVX2")
    yield request.param
    _native.set_level(-1)


def whole(x: float) -> int:
    """rint(x * 2^32), by exact arithmetic: Python rounds halves to even, too."""
    return round(Fraction(float(x)) * 2**sums.BITS)


def awkward(rng: np.random.Generator, n: int) -> npt.NDArray[np.float32]:
    """Of every size that a float32 below 2^30 has, halves of the last place, zeros of both signs."""
    x = rng.standard_normal(n) * np.exp2(rng.integers(-60, 30, n))
    x[::7] = (rng.integers(-(2**20), 2**20, len(x[::7])) + 0.5) * 2.0**-sums.BITS
    x[::11] = 0.0
    x[::22] = -0.0
    return np.clip(x, -(2.0**30), 2.0**30).astype(np.float32)


def test_a_partial_sum_is_rounded_to_the_nearest_whole_number(level: int) -> None:
    x = awkward(np.random.default_rng(1), 1003)
    total = np.zeros(len(x), np.int64)
    assert sums.add(total, x, sums.limit_of(1)) == 0
    assert total.tolist() == [whole(value) for value in x]


def test_the_total_is_rounded_twice_as_it_is_said(level: int) -> None:
    rng = np.random.default_rng(2)
    total = rng.integers(-(2**62), 2**62, 1003) >> rng.integers(0, 62, 1003)
    total[:5] = (0, 1, -1, 2**62, -(2**62))
    expected = [np.float32(np.float64(int(value)) * 2.0**-sums.BITS) for value in total]
    assert sums.to_float(total).tobytes() == np.array(expected, np.float32).tobytes()


@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.data())
def test_the_sum_is_the_same_in_any_order_and_grouping(seed: int, shards: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    parts = [awkward(rng, 37) * np.float32(2.0**-7) for _ in range(shards)]
    limit = sums.limit_of(shards)
    at_once = np.zeros(37, np.int64)
    for part in parts:
        assert sums.add(at_once, part, limit) == 0
    ranks = data.draw(st.integers(1, 8))
    grouped = np.zeros((ranks, 37), np.int64)
    for part in data.draw(st.permutations(parts)):
        sums.add(grouped[data.draw(st.integers(0, ranks - 1))], part, limit)
    assert np.array_equal(grouped.sum(axis=0), at_once)


def test_float32_sums_do_depend_on_the_order() -> None:
    """So the tests above can see it."""
    rng = np.random.default_rng(3)
    parts = rng.standard_normal((8, 64)).astype(np.float32)
    forward, backward = parts[0].copy(), parts[7].copy()
    for k in range(1, 8):
        forward += parts[k]
        backward += parts[7 - k]
    assert forward.tobytes() != backward.tobytes()


def test_what_does_not_fit_is_counted_and_left_out(level: int) -> None:
    limit = sums.limit_of(8)
    x = np.ones(23, np.float32)
    x[[0, 3, 9, 22]] = np.float32(limit), -np.inf, np.nan, np.float32(-3e38)
    total = np.full(23, 5, np.int64)
    assert sums.add(total, x, limit) == 4
    assert total.tolist() == [5 if i in (0, 3, 9, 22) else 5 + 2**sums.BITS for i in range(23)]


def test_no_sum_within_the_limit_wraps(level: int) -> None:
    for shards in (1, 2, 3, 7, 64, 256):
        limit = sums.limit_of(shards)
        largest = np.full(8, np.nextafter(np.float32(limit), np.float32(0)), np.float32)
        total = np.zeros(8, np.int64)
        for _ in range(shards):
            assert sums.add(total, largest, limit) == 0
        assert total.tolist() == [shards * whole(largest[0])] * 8


def test_the_error_is_below_that_of_a_float32_product() -> None:
    """2,048 inputs, as a product over them: in eight shards of fixed cut and in one go."""
    rng = np.random.default_rng(4)
    weights = (rng.standard_normal((256, 2048)) / np.sqrt(2048)).astype(np.float32)
    x = rng.standard_normal(2048).astype(np.float32)
    exact = weights.astype(np.float64) @ x.astype(np.float64)
    plain = np.zeros(256, np.float32)
    total = np.zeros(256, np.int64)
    for first in range(0, 2048, 256):
        partial = np.zeros(256, np.float32)
        for k in range(first, first + 256):
            product = weights[:, k] * x[k]
            partial += product
            plain += product
        sums.add(total, partial, sums.limit_of(8))
    assert np.abs(sums.to_float(total) - exact).max() < np.abs(plain - exact).max()


def test_sizes_and_shards_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        sums.add(np.zeros(3, np.int64), np.zeros(4, np.float32), 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        _native.to_float(np.zeros(3, np.int64), np.zeros(4, np.float32))
    for shards in (0, sums.SHARDS_MAX + 1):
        with pytest.raises(ValueError, match="shards"):
            sums.limit_of(shards)
