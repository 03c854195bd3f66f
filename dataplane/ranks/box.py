"""The memory in which a node and the ranks of its stage have one step: what goes in, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from kernels.base import StepArrays
from kernels.memory import ALIGN_BYTES, huge_zeros

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """See kernels.base.StepArrays."""

    positions: I64
    slots: I64
    cu_q: I32
    context_lens: I32
    tables: I32

    def of(self, rows: Sequence[int]) -> tuple[Rows, I32]:
        """Some of the rows as a step of their own, and which tokens of this one theirs are."""
        chosen = np.asarray(rows, np.intp)
        starts, ends = self.cu_q[chosen], self.cu_q[chosen + 1]
        cu_q = np.zeros(len(chosen) + 1, np.int32)
        np.cumsum(ends - starts, out=cu_q[1:])
        places = np.arange(cu_q[-1], dtype=np.int32) + np.repeat(starts - cu_q[:-1], ends - starts)
        taken = (self.positions[places], self.slots[places], cu_q)
        return Rows(*taken, self.context_lens[chosen], self.tables[chosen]), places


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of a box a step fills. width: columns of its block tables; picked: rows that logits are wanted of."""

    tokens: int
    rows: int
    width: int
    picked: int


class StepBox:
    """Made before the ranks are forked, and shared with them; pages are taken as they are first written.

    rows_max: tokens of a step. width_max: blocks of the longest context. Raises MemoryError."""

    def __init__(
        self, rows_max: int, width_max: int, hidden: int, is_bf16: bool, embeds: bool, vocabulary: int
    ) -> None:
        """embeds: the stage takes tokens, not activations. vocabulary: of which it returns logits; 0: none."""
        self.rows_max, self._hidden = rows_max, hidden
        item = np.dtype(np.uint16 if is_bf16 else np.float32)
        source = (np.int64, rows_max) if embeds else (item, rows_max * hidden)
        out = (np.float32, rows_max * vocabulary) if vocabulary else (item, rows_max * hidden)
        self._vocabulary = vocabulary
        parts = {
            "source": source,
            "positions": (np.int64, rows_max),
            "slots": (np.int64, rows_max),
            "cu_q": (np.int32, rows_max + 1),
            "context_lens": (np.int32, rows_max),
            "tables": (np.int32, rows_max * width_max),
            "picked": (np.int32, rows_max),
            "out": out,
        }
        sizes = {
            name: -(-count * np.dtype(kind).itemsize // ALIGN_BYTES) * ALIGN_BYTES
            for name, (kind, count) in parts.items()
        }
        memory = huge_zeros(sum(sizes.values()), shared=True)
        self._parts: dict[str, npt.NDArray[np.generic]] = {}
        at = 0
        for name, (kind, count) in parts.items():
            taken = memory[at : at + count * np.dtype(kind).itemsize]
            self._parts[name] = taken.view(kind)
            at += sizes[name]

    def put(self, source: I64 | Buffer, step: StepArrays, picked: I32) -> Sizes:
        """Raises ValueError for a step that is larger than the box, and for one whose arrays do not fit together: what
        is missing would be the one's before."""
        tokens, (rows, width) = len(step.positions), step.tables.shape
        if tokens > self.rows_max or rows * width > len(self._parts["tables"]):
            raise ValueError(
                f"a step of {tokens} tokens in {rows} rows of {width} blocks: there is room for {self.rows_max}"
                f" tokens and {len(self._parts['tables'])} blocks"
            )
        if (len(step.slots), len(step.cu_q), len(step.context_lens)) != (tokens, rows + 1, rows):
            raise ValueError("the arrays of a step have different lengths")
        if step.cu_q[0] != 0 or step.cu_q[-1] != tokens or (np.diff(step.cu_q) < 0).any():
            raise ValueError("cu_q must run from 0 to the number of tokens")
        if len(picked) > self.rows_max:
            raise ValueError(f"logits of {len(picked)} rows: there is room for {self.rows_max}")
        inputs = self._parts["source"]
        filled = inputs[: tokens * (1 if inputs.dtype == np.int64 else self._hidden)]
        given = memoryview(source).cast("B")  # type: ignore[arg-type]
        if given.nbytes != filled.nbytes:
            raise ValueError(f"{given.nbytes} bytes of input for {tokens} tokens, which have {filled.nbytes}")
        filled[:] = np.asarray(given).view(inputs.dtype)
        for name, values in (
            ("positions", step.positions),
            ("slots", step.slots),
            ("cu_q", step.cu_q),
            ("context_lens", step.context_lens),
            ("tables", step.tables.reshape(-1)),
            ("picked", picked),
        ):
            self._parts[name][: len(values)] = values
        return Sizes(tokens, rows, width, len(picked))

    def source(self, sizes: Sizes) -> I64 | Buffer:
        """Tokens, or the bytes of activations."""
        inputs = self._parts["source"]
        if inputs.dtype == np.int64:
            return inputs[: sizes.tokens].view(np.int64)
        return inputs[: sizes.tokens * self._hidden].view(np.uint8).data

    def rows(self, sizes: Sizes) -> Rows:
        tokens, rows = sizes.tokens, sizes.rows
        tables = self._array("tables", rows * sizes.width).reshape(rows, sizes.width)
        return Rows(
            self._parts["positions"][:tokens].view(np.int64),
            self._parts["slots"][:tokens].view(np.int64),
            self._array("cu_q", rows + 1),
            self._array("context_lens", rows),
            tables,
        )

    def picked(self, sizes: Sizes) -> I32:
        return self._array("picked", sizes.picked)

    def out(self, sizes: Sizes) -> npt.NDArray[np.generic]:
        """Logits float32 [picked, vocabulary], or activations [tokens, hidden]."""
        rows, width = (sizes.picked, self._vocabulary) if self._vocabulary else (sizes.tokens, self._hidden)
        return self._parts["out"][: rows * width].reshape(rows, width)

    def _array(self, name: str, count: int) -> I32:
        return self._parts[name][:count].view(np.int32)
