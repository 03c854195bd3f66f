"""GF(2^8) over x^8 + x^4 + x^3 + x^2 + 1, by tables; what codes and their oracle agree on: the generator."""

from __future__ import annotations

from collections.abc import Sequence

Matrix = tuple[bytes, ...]  # rows

_POLYNOMIAL = 0x11D
_ORDER = 255  # of 2

_POWERS = bytearray(2 * _ORDER)
_LOGARITHMS = bytearray(256)
_value = 1
for _exponent in range(_ORDER):
    _POWERS[_exponent] = _POWERS[_exponent + _ORDER] = _value
    _LOGARITHMS[_value] = _exponent
    _value = _value << 1 ^ (_POLYNOMIAL if _value & 0x80 else 0)


def power_of_two(exponent: int) -> int:
    return _POWERS[exponent % _ORDER]


def multiply(a: int, b: int) -> int:
    return _POWERS[_LOGARITHMS[a] + _LOGARITHMS[b]] if a and b else 0


def reciprocal(a: int) -> int:
    """Raises ZeroDivisionError."""
    if a == 0:
        raise ZeroDivisionError("0 has no reciprocal")
    return _POWERS[_ORDER - _LOGARITHMS[a]]


def inverse(matrix: Sequence[bytes]) -> Matrix:
    """Of a square matrix, by Gauss and Jordan. Raises ZeroDivisionError if it has none."""
    size = len(matrix)
    rows = [bytearray(row) + bytearray(size) for row in matrix]
    for index, row in enumerate(rows):
        row[size + index] = 1
    for column in range(size):
        pivot = next((index for index in range(column, size) if rows[index][column]), None)
        if pivot is None:
            raise ZeroDivisionError("the matrix is singular")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = reciprocal(rows[column][column])
        rows[column] = bytearray(multiply(scale, value) for value in rows[column])
        for index, row in enumerate(rows):
            if index != column and row[column]:
                factor = row[column]
                for at, value in enumerate(rows[column]):
                    row[at] ^= multiply(factor, value)
    return tuple(bytes(row[size:]) for row in rows)


def generator(data: int, parity: int) -> Matrix:
    """The parity rows of a code that restores any `parity` losses: an extended Cauchy matrix.

    Every square part of a Cauchy matrix 1 / (x_i + y_j) has an inverse, also with a row of ones added, if all x and
    all y differ. Here y_j = 2^-j; x_1 = 0 makes the second row powers of two; x_2, x_3 .. are 2^1, 2^2 .., which are
    2^-254, 2^-253 .. and so no y while data + parity <= 257. Ones and powers of two cost no table to multiply with.
    """
    if data < 1 or parity < 1 or data + parity > 257:
        raise ValueError(
            f"no code has {data} data and {parity} parity shards: at least 1 each, at most 257 together"
        )
    offsets = [0, *(power_of_two(i) for i in range(1, parity - 1))]
    rows = [bytes([1] * data)]
    for x in offsets[: parity - 1]:
        rows.append(bytes(reciprocal(x ^ power_of_two(-j)) for j in range(data)))
    return tuple(rows)
