"""The field and the generator of the erasure codes: known values, and that any losses can be solved for."""

from __future__ import annotations

import itertools

import pytest

from kernels.coding import _native
from kernels.coding.field import generator, inverse, multiply, power_of_two, reciprocal


def test_the_field_and_the_generator_by_known_values() -> None:
    assert [power_of_two(i) for i in (0, 1, 7, 8, 9, 254, 255, -1)] == [1, 2, 128, 29, 58, 142, 1, 142]
    assert multiply(0x80, 2) == 0x1D
    assert multiply(0xB6, 0x53) == 0xEE  # by hand: polynomials, not tables
    assert all(multiply(a, reciprocal(a)) == 1 for a in range(1, 256))
    assert generator(4, 3) == (bytes([1, 1, 1, 1]), bytes([1, 2, 4, 8]), bytes([244, 83, 78, 183]))


@pytest.mark.parametrize("shape", [(8, 3), (16, 4), (5, 5)])
def test_every_square_part_of_the_generator_has_an_inverse(shape: tuple[int, int]) -> None:
    rows = generator(*shape)
    for size in range(1, shape[1] + 1):
        for lines in itertools.combinations(range(shape[1]), size):
            for columns in itertools.combinations(range(shape[0]), size):
                inverse([bytes(rows[i][j] for j in columns) for i in lines])  # raises if it has none


@pytest.mark.parametrize("parity", range(1, 9))
def test_the_widest_codes_are_cauchy_matrices(parity: int) -> None:
    """1 / (x + y) with all x and all y different, and x never y."""
    rows = generator(257 - parity, parity)
    y = [reciprocal(value) for value in rows[1]] if parity > 1 else []
    x = [{reciprocal(value) ^ at for value, at in zip(row, y, strict=True)} for row in rows[1:]]
    assert all(len(found) == 1 for found in x)
    values = [found.pop() for found in x]
    assert len(set(values)) == len(values)
    assert len(set(y)) == len(y)
    assert not set(values) & set(y)
    with pytest.raises(ValueError, match="at most 257 together"):
        generator(258 - parity, parity)


def test_matrices_multiply_as_the_processor_reads_them() -> None:
    """GF2P8AFFINEQB: bit i of a result is the parity of byte 7 - i of the matrix and the operand."""
    for factor in (0, 1, 2, 3, 0x1D, 0x80, 0xFF):
        matrix = _native.bit_matrix(factor)
        for value in range(256):
            bits = [(matrix >> 8 * (7 - i) & value & 0xFF).bit_count() % 2 for i in range(8)]
            assert sum(bit << i for i, bit in enumerate(bits)) == multiply(factor, value), (factor, value)
