"""Erasure codes over shards that are on a GPU: the calls and the bytes of kernels/coding/codes.py, on its tensors.

    code = make_device_code("rs", 8, 2)
    parity = [torch.zeros(code.parity_bytes(longest), dtype=torch.uint8, device=device) for _ in range(code.parity)]
    code.update(parity, index, shard)  # as shards arrive, in any order; or code.encode(shards, parity)
    code.decode(shards, parity, lost={3, 8})  # fills data shard 3 and parity 0

Shards are contiguous tensors of one device and any dtype; a shorter one counts as if zeros followed. Kernels are
launched on the current stream, in order; buffers must be left alone until they are done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from kernels.coding.codes import make_code, parities_left, solution, split_lost
from kernels.coding.field import generator
from kernels.cuda.cache import device_guard
from kernels.triton.coding import ROWS, Tensors, add_lines, combine, walk


class DeviceCode(Protocol):
    """As kernels.coding.codes.Code, whole shards at a time."""

    data: int  # N
    parity: int  # K

    def parity_bytes(self, longest: int) -> int: ...

    def encode(self, shards: Sequence[torch.Tensor], parity: Tensors) -> None:
        """Compute the parities, but not those that are None."""
        ...

    def update(self, parity: Sequence[torch.Tensor], index: int, shard: torch.Tensor) -> None:
        """Add shard `index` to parities that do not have it yet; adding it again takes it out."""
        ...

    def decode(self, shards: Sequence[torch.Tensor], parity: Tensors, lost: Collection[int]) -> None:
        """Fill the shards whose indices are in `lost`: data 0 .. N - 1, then parities (not filled if None). A lost data
        shard has the size of its buffer. Raises TooManyLost."""
        ...


def make_device_code(name: str, data: int, parity: int) -> DeviceCode:
    """`xor` (parity 1), `rdp` (parity 2) or `rs`. Raises ValueError."""
    sizes = make_code(name, data, parity)  # which refuses what there is not
    return DeviceRowDiagonal(data) if name == "rdp" else DeviceReedSolomon(sizes.data, sizes.parity)


class DeviceReedSolomon:
    """Over GF(2^8), by the generator of field.py. With one parity it is XOR."""

    def __init__(self, data: int, parity: int) -> None:
        self.data, self.parity = data, parity
        self._rows = generator(data, parity)

    def parity_bytes(self, longest: int) -> int:
        return longest

    def encode(self, shards: Sequence[torch.Tensor], parity: Tensors) -> None:
        _check(self, shards, parity)
        self._add(shards, [None] * self.parity, parity, range(self.parity))

    def update(self, parity: Sequence[torch.Tensor], index: int, shard: torch.Tensor) -> None:
        _check_update(self, parity, index, shard)
        with device_guard(shard.device):
            # The powers of two are of all shards: for one, row 1 is a factor as any other.
            combine([shard], parity, parity, [row[index : index + 1] for row in self._rows], sums=True)

    def decode(self, shards: Sequence[torch.Tensor], parity: Tensors, lost: Collection[int]) -> None:
        _check(self, shards, parity)
        data_lost, parity_lost = split_lost(self.data, self.parity, lost)
        if data_lost:
            rows = parities_left(parity, parity_lost, len(data_lost))
            left = [None if i in data_lost else shard for i, shard in enumerate(shards)]
            starts = [parity[i] for i in rows]
            wanted: Tensors = [shards[i] for i in data_lost]
            if rows == (0,):
                self._add(left, starts, wanted, rows)
            else:
                longest = max(shards[i].nbytes for i in data_lost)
                syndromes = [_scratch(shards[0], longest) for _ in rows]
                self._add(left, starts, syndromes, rows)
                with device_guard(shards[0].device):
                    combine(syndromes, [None] * len(rows), wanted, solution(self._rows, data_lost, rows))
        if parity_lost:
            self.encode(shards, [buffer if i in parity_lost else None for i, buffer in enumerate(parity)])

    def _add(self, shards: Tensors, starts: Tensors, outs: Tensors, rows: Sequence[int]) -> None:
        """outs[i] = starts[i] + row rows[i] times the shards."""
        wanted = [i for i, out in enumerate(outs) if out is not None]
        if not wanted:
            return
        chosen = [rows[i] for i in wanted]
        with device_guard(next(out.device for out in outs if out is not None)):
            combine(
                shards, [starts[i] for i in wanted], [outs[i] for i in wanted], [self._rows[i] for i in chosen],
                sums=0 in chosen, powers=1 in chosen,
            )  # fmt: skip


class DeviceRowDiagonal:
    """Row-diagonal parity for the prime 17 (kernels/coding/rdp.c): at most 16 data shards, a parity is 16 rows."""

    parity = 2

    def __init__(self, data: int) -> None:
        self.data = data
        self._sizes = make_code("rdp", data, 2)
        self._across = DeviceReedSolomon(data, 1)

    def parity_bytes(self, longest: int) -> int:
        return self._sizes.parity_bytes(longest)

    def encode(self, shards: Sequence[torch.Tensor], parity: Tensors) -> None:
        width = self._width(shards, parity)
        if width is None:
            return
        across, along = parity
        with device_guard(shards[0].device):
            if across is None:
                across = _scratch(shards[0], width * ROWS)
            add_lines(shards, range(self.data), None, across, width, False)
            if along is not None:
                add_lines([*shards, across], [*range(self.data), ROWS], None, along, width, True)

    def update(self, parity: Sequence[torch.Tensor], index: int, shard: torch.Tensor) -> None:
        _check_update(self, parity, index, shard)
        width = self._rows_of(parity[0].nbytes)
        with device_guard(shard.device):
            add_lines([shard], [index], parity[0], parity[0], width, False)
            # Diagonals have the shard's cells and, in the row parity, the same again.
            add_lines([shard, shard], [index, ROWS], parity[1], parity[1], width, True)

    def decode(self, shards: Sequence[torch.Tensor], parity: Tensors, lost: Collection[int]) -> None:
        width = self._width(shards, parity)
        data_lost, parity_lost = split_lost(self.data, self.parity, lost)
        if len(data_lost) == 1 and 0 not in parity_lost:
            self._across.decode(shards, parity[:1], data_lost)
        elif data_lost:
            parities_left(parity, parity_lost, len(data_lost))
            if width is not None:
                self._solve(shards, parity, data_lost, parity_lost, width)
            return
        if parity_lost:
            self.encode(shards, [buffer if i in parity_lost else None for i, buffer in enumerate(parity)])

    def _solve(
        self,
        shards: Sequence[torch.Tensor],
        parity: Tensors,
        data_lost: Sequence[int],
        parity_lost: Sequence[int],
        width: int,
    ) -> None:
        """Two lost columns, of which the second may be the row parity."""
        columns: list[torch.Tensor | None] = [None if i in data_lost else s for i, s in enumerate(shards)]
        numbers = [*range(self.data), ROWS]
        left = None if 0 in parity_lost else parity[0]
        x, y = (*data_lost, ROWS)[:2]
        across, along = (_scratch(shards[0], width * ROWS) for _ in range(2))
        with device_guard(shards[0].device):
            add_lines([*columns, left], numbers, None, across, width, False)
            add_lines([*columns, left], numbers, parity[1], along, width, True)
            walk(across, along, (x, y), [shards[x], parity[0] if y == ROWS else shards[y]], width)

    def _width(self, shards: Sequence[torch.Tensor], parity: Tensors) -> int | None:
        """Bytes of a row; None if no parity is there."""
        _check(self, shards, parity)
        return next((self._rows_of(buffer.nbytes) for buffer in parity if buffer is not None), None)

    def _rows_of(self, size: int) -> int:
        if size % ROWS:
            raise ValueError(f"a parity of rdp has {ROWS} equal rows, which {size} bytes are not")
        return size // ROWS


def _scratch(like: torch.Tensor, size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _check(code: DeviceCode, shards: Sequence[torch.Tensor], parity: Tensors) -> None:
    """Raises ValueError."""
    if len(shards) != code.data or len(parity) != code.parity:
        raise ValueError(
            f"{code.data} data and {code.parity} parity shards, not {len(shards)} and {len(parity)}"
        )
    checks = [buffer for buffer in parity if buffer is not None]
    sizes = {buffer.nbytes for buffer in checks}
    if len(sizes) > 1:
        raise ValueError(f"parities of {sorted(sizes)} bytes are not of one set")
    if sizes and max(shard.nbytes for shard in shards) > max(sizes):
        raise ValueError(f"a shard is longer than its parity of {max(sizes)} bytes")
    everything = [*shards, *checks]
    if any(not t.is_contiguous() or t.device != everything[0].device for t in everything):
        raise ValueError("shards must be contiguous and on one device")


def _check_update(code: DeviceCode, parity: Sequence[torch.Tensor], index: int, shard: torch.Tensor) -> None:
    if not 0 <= index < code.data:
        raise ValueError(f"shard {index} is not one of {code.data}")
    if any(buffer is None for buffer in parity):
        raise ValueError(f"an update needs all {code.parity} parities")
    _check(code, [shard] * code.data, parity)
