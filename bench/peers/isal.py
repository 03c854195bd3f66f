"""Intel ISA-L (Debian: libisal2; LD_LIBRARY_PATH chooses another), called through ctypes."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernels.coding.field import Matrix, inverse

Shard = npt.NDArray[np.uint8]
Call = Callable[[int], None]  # codes so many bytes of each shard


class Isal:
    """Raises OSError if the library is not there."""

    def __init__(self, avx2: bool = False) -> None:
        """`avx2`: its functions for processors that have no more than that."""
        name = ctypes.util.find_library("isal") or "libisal.so.2"
        self._library = ctypes.CDLL(name)
        self._avx2 = avx2
        self._keep: list[object] = []
        mapped = Path("/proc/self/maps").read_text().split()
        self.version = next((Path(word).name for word in mapped if "libisal" in word), name)

    def xor(self, sources: Sequence[Shard], out: Shard) -> Call:
        """`xor_gen`: its addresses must be multiples of 32."""
        pointers = self._pointers([*sources, out])
        count = len(sources) + 1
        function = self._library.xor_gen_avx if self._avx2 else self._library.xor_gen

        def call(size: int) -> None:
            if function(count, size, pointers):
                raise RuntimeError("xor_gen refuses these shards")

        return call

    def pq(self, sources: Sequence[Shard], out: Sequence[Shard]) -> Call:
        """`pq_gen`, for RAID 6: the sum, and the sum with powers of two. Addresses and sizes: multiples of 32."""
        pointers, count = self._pointers([*sources, *out]), len(sources) + 2
        function = self._library.pq_gen_avx2 if self._avx2 else self._library.pq_gen

        def call(size: int) -> None:
            if function(count, size, pointers):
                raise RuntimeError("pq_gen refuses these shards")

        return call

    def dot(self, rows: Sequence[bytes], sources: Sequence[Shard], out: Sequence[Shard]) -> Call:
        """`ec_encode_data`: each output is a row times the sources."""
        tables, read, written = self._tables(rows), self._pointers(sources), self._pointers(out)
        function = self._library.ec_encode_data_avx2 if self._avx2 else self._library.ec_encode_data
        function.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 3
        return lambda size: function(size, len(sources), len(out), tables, read, written)

    def update(self, rows: Sequence[bytes], index: int, source: Shard, out: Sequence[Shard]) -> Call:
        """`ec_encode_data_update`"""
        tables, written = self._tables(rows), self._pointers(out)
        function = self._library.ec_encode_data_update
        if self._avx2:
            function = self._library.ec_encode_data_update_avx2
        function.argtypes = [ctypes.c_int] * 4 + [ctypes.c_void_p] * 3
        address = source.ctypes.data
        self._keep.append(source)
        return lambda size: function(size, len(rows[0]), len(out), index, tables, address, written)

    def _tables(self, rows: Sequence[bytes]) -> ctypes.Array[ctypes.c_char]:
        tables = ctypes.create_string_buffer(32 * len(rows) * len(rows[0]))
        # From 2.31 on, tables are made for the best processor level, unless one asks for those of all others.
        plain = self._avx2 and hasattr(self._library, "ec_init_tables_base")
        init = self._library.ec_init_tables_base if plain else self._library.ec_init_tables
        init(len(rows[0]), len(rows), b"".join(rows), tables)
        return tables

    def _pointers(self, shards: Sequence[Shard]) -> ctypes.Array[ctypes.c_void_p]:
        self._keep.extend(shards)
        return (ctypes.c_void_p * len(shards))(*(shard.ctypes.data for shard in shards))


def restoring_rows(rows: Matrix, lost: Sequence[int]) -> Matrix:
    """What the data that is left, followed by as many parities, is multiplied with to give the lost data."""
    count = len(rows[0])
    left = [bytes(int(i == j) for j in range(count)) for i in range(count) if i not in lost]
    solution = inverse([*left, *rows[: len(lost)]])
    return tuple(solution[i] for i in lost)
