"""Erasure codes: K parity shards that restore any K of N + K shards. Lossless: a shard is bytes, whatever is in it.

    code = make_code("rs", 8, 2)
    parity = [bytearray(code.parity_bytes(longest)) for _ in range(code.parity)]  # zeros
    code.update(parity, index, shard)  # as shards arrive, in any order; or code.encode(shards, parity)
    code.decode(shards, parity, lost={3, 8})  # fills data shard 3 and parity 0

A shard that is shorter than the others counts as if zeros followed. All parities of a set have one size. A call may do
a part only: positions [begin, end) of `positions(size)`; parts are independent and may run in several threads. A buffer
that is written must overlap none that is read. `stream`: what is written goes past the caches, which is faster where
shards come from memory and nobody soon reads what is written; None: if it is long (1 MB) anyway.

Here is what is done with whole shards; which bytes are added to which is in `_native` (rs.c, rdp.c), and how fast in
the loops of `kf_coding_ops`, one set for each instruction set. Kernels for another device have the same three calls.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy.typing as npt
from typing_extensions import Buffer

from kernels.coding import _native
from kernels.coding.field import Matrix, generator, inverse

Shard = Buffer | npt.NDArray[Any]

RDP_DATA_MAX = _native.RDP_ROWS
_RDP_ALIGNMENT = 64  # of rows


class TooManyLost(ValueError):
    """More shards are gone than the code has parities."""


class Code(Protocol):
    data: int  # N
    parity: int  # K

    def parity_bytes(self, longest: int) -> int:
        """The size of each parity, if the longest data shard has so many bytes."""
        ...

    def positions(self, parity_bytes: int) -> int:
        """How many positions there are to divide among threads."""
        ...

    def encode(
        self,
        shards: Sequence[Shard],
        parity: Sequence[Shard | None],
        begin: int = 0,
        end: int | None = None,
        stream: bool | None = None,
    ) -> None:
        """Compute the parities, but not those that are None."""
        ...

    def update(
        self, parity: Sequence[Shard], index: int, shard: Shard, begin: int = 0, end: int | None = None
    ) -> None:
        """Add shard `index` to parities that do not have it yet; adding it again takes it out."""
        ...

    def decode(
        self,
        shards: Sequence[Shard],
        parity: Sequence[Shard | None],
        lost: Collection[int],
        begin: int = 0,
        end: int | None = None,
        stream: bool | None = None,
    ) -> None:
        """Fill the shards whose indices are in `lost`: data 0 .. N - 1, then parities (not filled if None). A lost data
        shard has the size of its buffer. Raises TooManyLost."""
        ...


def make_code(name: str, data: int, parity: int) -> Code:
    """`xor` (parity 1), `rdp` (parity 2) or `rs`. Raises ValueError."""
    if name == "xor" and parity == 1:
        return ReedSolomon(data, 1)
    if name == "rdp" and parity == 2:
        return RowDiagonal(data)
    if name == "rs":
        return ReedSolomon(data, parity)
    raise ValueError(f"no code {name} has {parity} parity shards: xor has 1, rdp has 2, rs any number")


class ReedSolomon:
    """Over GF(2^8), by the generator of field.py. With one parity it is XOR."""

    def __init__(self, data: int, parity: int) -> None:
        if parity > _native.PARITY_MAX:
            raise ValueError(f"at most {_native.PARITY_MAX} parity shards, not {parity}")
        self.data, self.parity = data, parity
        self._rows = generator(data, parity)
        self._native = _native.Code(self._rows)

    def parity_bytes(self, longest: int) -> int:
        return longest

    def positions(self, parity_bytes: int) -> int:
        return parity_bytes

    def encode(
        self,
        shards: Sequence[Shard],
        parity: Sequence[Shard | None],
        begin: int = 0,
        end: int | None = None,
        stream: bool | None = None,
    ) -> None:
        held, out = _native.Shards(shards), _native.Shards(parity, range(self.parity))
        size = _parity_size(held, out)
        self._native.encode(held, out, *_part(begin, end, size), _hint(stream))

    def update(
        self, parity: Sequence[Shard], index: int, shard: Shard, begin: int = 0, end: int | None = None
    ) -> None:
        held, out = _native.Shards([shard]), _native.Shards(parity, range(self.parity))
        _check_update(self, index, parity)
        size = _parity_size(held, out)
        self._native.update(index, held, out, *_part(begin, end, size))

    def decode(
        self,
        shards: Sequence[Shard],
        parity: Sequence[Shard | None],
        lost: Collection[int],
        begin: int = 0,
        end: int | None = None,
        stream: bool | None = None,
    ) -> None:
        data_lost, parity_lost = split_lost(self.data, self.parity, lost)
        if data_lost:
            held, left = _native.Shards(shards, data_lost), _native.Shards(_left(parity, parity_lost))
            rows = parities_left(parity, parity_lost, len(data_lost))
            part = _part(begin, end, _parity_size(held, left))
            self._native.restore(
                data_lost, rows, solution(self._rows, data_lost, rows), held, left, *part, _hint(stream)
            )
        _encode_lost(self, shards, parity, parity_lost, begin, end, stream)


class RowDiagonal:
    """Row-diagonal parity for the prime 17 (rdp.c): two parities by sums alone, at most 16 data shards.

    A parity is 16 rows, so it is up to 1 KB longer than the longest data shard; a position is one of a row.
    """

    parity = 2

    def __init__(self, data: int) -> None:
        if not 1 <= data <= RDP_DATA_MAX:
            raise ValueError(f"rdp has 1 to {RDP_DATA_MAX} data shards, not {data}")
        self.data = data
        self._across = ReedSolomon(data, 1)

    def parity_bytes(self, longest: int) -> int:
        step = _native.RDP_ROWS * _RDP_ALIGNMENT
        return -(-longest // step) * step

    def positions(self, parity_bytes: int) -> int:
        return parity_bytes // _native.RDP_ROWS

    def encode(
        self,
        shards: Sequence[Shard],
        parity: Sequence[Shard | None],
        begin: int = 0,
        end: int | None = None,
        stream: bool | None = None,
    ) -> None:
        held, out = self._shards(shards), _native.Shards(parity, range(2))
        width = self._width(held, out)
        _native.rdp_encode(held, out, width, *_part(begin, end, width), _hint(stream))

    def update(
        self, parity: Sequence[Shard], index: int, shard: Shard, begin: int = 0, end: int | None = None
    ) -> None:
        held, out = _native.Shards([shard]), _native.Shards(parity, range(2))
        _check_update(self, index, parity)
        width = self._width(held, out)
        _native.rdp_update(index, held, out, width, *_part(begin, end, width))

    def decode(
        self,
        shards: Sequence[Shard],
        parity: Sequence[Shard | None],
        lost: Collection[int],
        begin: int = 0,
        end: int | None = None,
        stream: bool | None = None,
    ) -> None:
        data_lost, parity_lost = split_lost(self.data, self.parity, lost)
        if len(data_lost) == 1 and 0 not in parity_lost:
            self._by_rows(shards, parity[0], data_lost, begin, end, stream)
        elif data_lost:
            parities_left(parity, parity_lost, len(data_lost))
            held, both = self._shards(shards, data_lost), _native.Shards(parity, parity_lost)
            width = self._width(held, both)
            last = data_lost[1] if len(data_lost) == 2 else _native.RDP_ROWS
            part = _part(begin, end, width)
            _native.rdp_restore(data_lost[0], last, held, both, width, *part, _hint(stream))
            return
        _encode_lost(self, shards, parity, parity_lost, begin, end, stream)

    def _by_rows(
        self,
        shards: Sequence[Shard],
        across: Shard | None,
        lost: Sequence[int],
        begin: int,
        end: int | None,
        stream: bool | None,
    ) -> None:
        """One lost shard from the row parity, which is a XOR of the others."""
        parities_left([across], (), 1)
        width = self._width(self._shards(shards), _native.Shards([across]))
        begin, end = _part(begin, end, width)
        whole = (begin, end) == (0, width)
        for row in range(1 if whole else _native.RDP_ROWS):
            stop = width * _native.RDP_ROWS if whole else row * width + end
            self._across.decode(shards, [across], lost, row * width + begin, stop, stream)

    def _shards(self, shards: Sequence[Shard], writable: Collection[int] = ()) -> _native.Shards:
        if len(shards) != self.data:
            raise ValueError(f"{self.data} data shards, not {len(shards)}")
        return _native.Shards(shards, writable)

    def _width(self, data: _native.Shards, parity: _native.Shards) -> int:
        if parity.count > self.parity:
            raise ValueError(f"2 parity shards, not {parity.count}")
        size = _parity_size(data, parity)
        if size % _native.RDP_ROWS:
            raise ValueError(f"a parity of rdp has {_native.RDP_ROWS} equal rows, which {size} bytes are not")
        return size // _native.RDP_ROWS


@lru_cache(maxsize=1024)
def solution(rows: Matrix, lost: tuple[int, ...], parities: tuple[int, ...]) -> Matrix:
    """What the syndromes of these parities are multiplied with to give the lost shards."""
    return inverse([bytes(rows[i][j] for j in lost) for i in parities])


def split_lost(data: int, parity: int, lost: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of data and of parities, sorted. Raises TooManyLost, ValueError."""
    indices = sorted(set(lost))
    if len(indices) > parity:
        raise TooManyLost(f"{len(indices)} shards are lost, and {parity} can be restored")
    if indices and not 0 <= indices[0] <= indices[-1] < data + parity:
        raise ValueError(f"shards {indices} of {data + parity}")
    return tuple(i for i in indices if i < data), tuple(i - data for i in indices if i >= data)


def parities_left(parity: Sequence[object], lost: Collection[int], count: int) -> tuple[int, ...]:
    """The first `count` parities that are not lost. Raises ValueError if one of them is None."""
    rows = tuple(i for i in range(len(parity)) if i not in lost)[:count]
    if any(parity[i] is None for i in rows):
        raise ValueError(f"parities {list(rows)} are needed, and not all of them are there")
    return rows


def _encode_lost(
    code: Code,
    shards: Sequence[Shard],
    parity: Sequence[Shard | None],
    lost: Collection[int],
    begin: int,
    end: int | None,
    stream: bool | None,
) -> None:
    """The lost parities, once all data is there."""
    wanted = [buffer if i in lost else None for i, buffer in enumerate(parity)]
    if any(buffer is not None for buffer in wanted):
        code.encode(shards, wanted, begin, end, stream)


def _left(parity: Sequence[Shard | None], lost: Collection[int]) -> list[Shard | None]:
    return [None if i in lost else buffer for i, buffer in enumerate(parity)]


def _check_update(code: Code, index: int, parity: Sequence[Shard]) -> None:
    if not 0 <= index < code.data:
        raise ValueError(f"shard {index} is not one of {code.data}")
    if len(parity) != code.parity or any(buffer is None for buffer in parity):
        raise ValueError(f"an update needs all {code.parity} parities")


def _parity_size(data: _native.Shards, parity: _native.Shards) -> int:
    if parity.shortest != parity.longest:
        raise ValueError(f"parities of {parity.shortest} and of {parity.longest} bytes are not of one set")
    if data.longest > max(parity.longest, 0):
        raise ValueError(
            f"a shard of {data.longest} bytes is longer than its parity of {max(parity.longest, 0)}"
        )
    return max(parity.longest, 0)


def _hint(stream: bool | None) -> int:
    return -1 if stream is None else int(stream)


def _part(begin: int, end: int | None, positions: int) -> tuple[int, int]:
    end = positions if end is None else end
    if not 0 <= begin <= end <= positions:
        raise ValueError(f"[{begin}, {end}) is not a part of {positions} positions")
    return begin, end
