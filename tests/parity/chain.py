"""Stages chained in one process, with the block tables that the data plane would keep."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import BlockTable
from dataplane.executor import StageExecutor


def i32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


class Chain:
    """num_stages executors; each stage gives out its blocks in another order."""

    def __init__(
        self,
        model_dir: Path,
        num_stages: int = 1,
        dtype: Literal["float32", "bfloat16"] = "float32",
        block_size: int = 16,
        num_blocks: int = 64,
        threads: int = 1,
        weights: Literal["model", "int8"] = "model",
        context_max: int = 0,
        sums: Literal["float", "fixed"] = "float",
    ) -> None:
        self.block_size = block_size
        self.stages = [
            StageExecutor(
                model_dir,
                s,
                num_stages,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=dtype,
                threads=threads,
                weights=weights,
                context_max=context_max,
                sums=sums,
            )
            for s in range(num_stages)
        ]
        self.tables = [BlockTable(32, num_blocks, block_size) for _ in self.stages]
        orders = [np.random.default_rng(s).permutation(num_blocks).tolist() for s in range(num_stages)]
        self.free: list[list[int]] = orders
        self.lengths: dict[int, int] = {}

    def new(self) -> int:
        rows = {table.new_row() for table in self.tables}
        assert len(rows) == 1
        row = rows.pop()
        self.lengths[row] = 0
        return row

    def release(self, row: int) -> None:
        for table, free in zip(self.tables, self.free, strict=True):
            free.extend(table.free_row(row))

    def step(self, work: list[tuple[int, list[int]]]) -> dict[int, npt.NDArray[Any]]:
        """Appends tokens to rows and returns each row's logits [tokens, vocab]."""
        rows = i32(*(row for row, _ in work))
        starts = i32(*(self.lengths[row] for row, _ in work))
        counts = i32(*(len(tokens) for _, tokens in work))
        tokens = np.array([t for _, ts in work for t in ts], np.int64)
        hidden = None
        for stage, table, free in zip(self.stages, self.tables, self.free, strict=True):
            for row, start, count in zip(rows, starts, counts, strict=True):
                need = -(-int(start + count) // self.block_size) - table.num_blocks(row)
                table.extend(row, [free.pop() for _ in range(need)])
            arrays = table.fill(rows, starts, counts)
            out = stage.forward(
                tokens if stage.is_first else None, hidden, arrays, np.arange(len(tokens), dtype=np.int32)
            )
            hidden = None if stage.is_last else memoryview(out).cast("B")
        for row, new in work:
            self.lengths[row] += len(new)
        cut = np.cumsum(counts)[:-1]
        # Logits are valid until the next step only.
        return dict(zip(rows.tolist(), np.split(out.copy(), cut), strict=True))

    def greedy(self, prompts: list[list[int]], count: int, chunk: int = 1000) -> list[list[int]]:
        """Greedy continuations of all prompts, prefilled in chunks and decoded together."""
        rows = [self.new() for _ in prompts]
        texts: dict[int, list[int]] = {row: list(p) for row, p in zip(rows, prompts, strict=True)}
        last: dict[int, npt.NDArray[Any]] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            for at in range(0, len(prompt), chunk):
                last[row] = self.step([(row, prompt[at : at + chunk])])[row][-1]
        for _ in range(count):
            for row in rows:
                texts[row].append(int(last[row].argmax()))
            if _ < count - 1:
                out = self.step([(row, texts[row][-1:]) for row in rows])
                last = {row: out[row][-1] for row in rows}
        for row in rows:
            self.release(row)
        return [texts[row][len(p) :] for row, p in zip(rows, prompts, strict=True)]
