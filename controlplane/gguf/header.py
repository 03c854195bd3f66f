"""The header of a GGUF file: its fields, and where its tensors are.

Read here and not by the `gguf` package, which takes seconds for a vocabulary (measured: 2.2 s for 49,152 tokens, here
0.1 s): every process of a cluster reads it when it starts. Tests compare both.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
COUNT_MAX = 1 << 24  # fields, tensors, values of one array
DIMENSIONS_MAX = 4
NESTED_MAX = 4
STRING, ARRAY = 8, 9
# By number of the type.
NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


class GgufError(ValueError):
    """The file is not one, or holds what is not supported."""


@dataclass(frozen=True, slots=True)
class Block:
    """How values of a type lie in the file: `values` in `bytes`."""

    name: str
    values: int
    bytes: int


# By number of ggml's type.
BLOCKS = {
    0: Block("f32", 1, 4),
    1: Block("f16", 1, 2),
    2: Block("q4_0", 32, 18),
    3: Block("q4_1", 32, 20),
    6: Block("q5_0", 32, 22),
    7: Block("q5_1", 32, 24),
    8: Block("q8_0", 32, 34),
    10: Block("q2_k", 256, 84),
    11: Block("q3_k", 256, 110),
    12: Block("q4_k", 256, 144),
    13: Block("q5_k", 256, 176),
    14: Block("q6_k", 256, 210),
    30: Block("bf16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape`: the last dimension is the one whose values lie side by side. `offset`: bytes, in the file."""

    block: Block
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block.values * self.block.bytes

    @property
    def bytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Header:
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Whether the path names a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def read_header(path: Path) -> Header:
    """Raises GgufError, OSError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise GgufError("is too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, size).header()
            except (struct.error, UnicodeDecodeError) as error:
                raise GgufError(f"ends within its header or is damaged: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self._size = data, size
        self._at = 0

    def header(self) -> Header:
        if self._data[:4] != MAGIC:
            raise GgufError("is not a GGUF file")
        self._at = 4
        version = self._number("<I")
        if version not in VERSIONS:
            raise GgufError(f"is of version {version}; supported: {', '.join(map(str, VERSIONS))}")
        tensors, fields = self._count(), self._count()
        values = {}
        for _ in range(fields):
            name = self._string()
            values[name] = self._value(self._number("<I"), 0)
        found = [self._tensor() for _ in range(tensors)]
        align = values.get("general.alignment", ALIGNMENT)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise GgufError(f"has general.alignment = {align!r:.40}, not a power of two")
        start = -(-self._at // align) * align
        placed = {}
        for name, tensor in found:
            tensor = Tensor(tensor.block, tensor.shape, start + tensor.offset)
            if name in placed or tensor.offset + tensor.bytes > self._size:
                raise GgufError(f"{name!r:.80} is there twice, or the file is cut off")
            placed[name] = tensor
        return Header(values, placed)

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(kind, self._data, self._at)
        self._at += struct.calcsize(kind)
        return value

    def _count(self) -> int:
        count: int = self._number("<Q")
        if count > COUNT_MAX:
            raise GgufError(f"says that it holds {count} values in one place")
        return count

    def _string(self) -> str:
        length: int = self._number("<Q")
        end = self._at + length
        if end > self._size:
            raise GgufError("ends within its header")
        text = self._data[self._at : end].decode()
        self._at = end
        return text

    def _value(self, kind: int, depth: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY and depth < NESTED_MAX:
            inner = self._number("<I")
            count = self._count()
            if inner not in NUMBERS:
                return [self._value(inner, depth + 1) for _ in range(count)]
            code = NUMBERS[inner][1]
            array = struct.unpack_from(f"<{count}{code}", self._data, self._at)
            self._at += struct.calcsize(f"<{count}{code}")
            return list(array)
        if kind not in NUMBERS:
            raise GgufError(f"has a value of type {kind}")
        return self._number(NUMBERS[kind])

    def _tensor(self) -> tuple[str, Tensor]:
        name = self._string()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise GgufError(f"{name!r:.80} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in BLOCKS:
            raise GgufError(f"{name!r:.80} is of ggml's type {kind}, which is not supported")
        block = BLOCKS[kind]
        if shape[-1] % block.values or not all(0 < size < 1 << 40 for size in shape):
            raise GgufError(f"{name!r:.80} has a shape of {shape}, of blocks of {block.values}")
        return name, Tensor(block, shape, offset)
