"""Decode steps as CUDA graphs: one launch instead of ten a layer.

A graph has fixed shapes. So there is one for each power of two of rows and of splits of keys (how far the longest
context reaches); a step takes the smallest that holds it, and the rest of it is padding. Which one it is cannot be seen
in the bits: kernels/triton/__init__.py."""

from collections.abc import Callable

import numpy as np
import torch

from kernels.base import StepArrays
from kernels.cuda.step import DeviceStep, query_tiles, splits_needed
from kernels.triton.attention import Partials, keys_of
from kernels.triton.jit import ceil_div, power_of_two

Body = Callable[[DeviceStep], None]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_capture(body: Callable[[], None]) -> Callable[[], None]:
    """Runs `body` once, so that all its kernels are compiled and loaded, and captures it. Returns the replay."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


def run_uncaptured(body: Callable[[], None]) -> Callable[[], None]:
    """The same on a device without graphs (Triton's interpreter)."""
    body()
    return body


class DecodeGraphs:
    """The graphs of one stage. `body` runs its layers over a DeviceStep and, in place, over `residual`.

    At most log2(rows_max) x log2(splits_max) of them exist. `capture_all` makes them; one that is missing is captured
    when its shape first occurs, which takes as long as some steps."""

    def __init__(
        self,
        body: Body,
        residual: torch.Tensor,
        rows_max: int,
        splits_max: int,
        block_size: int,
        partials: Partials,
    ) -> None:
        self.rows_max, self.splits_max = rows_max, splits_max
        self._body, self._residual, self._block_size, self._partials = body, residual, block_size, partials
        self._capture: Capture = cuda_capture if residual.is_cuda else run_uncaptured
        self._graphs: dict[tuple[int, int], tuple[DeviceStep, Callable[[], None]]] = {}

    def takes(self, step: StepArrays) -> bool:
        """Whether `step` is a decode step (one token a row) of at most rows_max rows."""
        return len(step.positions) == len(step.context_lens) <= self.rows_max

    def capture_all(self) -> None:
        """Every shape, the smallest first."""
        for rows in powers_to(self.rows_max):
            for splits in powers_to(self.splits_max):
                if (rows, splits) not in self._graphs:
                    self._graphs[rows, splits] = self._make(rows, splits)

    def run(self, step: StepArrays) -> None:
        rows, splits = power_of_two(len(step.context_lens)), power_of_two(splits_needed(step))
        if (rows, splits) not in self._graphs:
            self._graphs[rows, splits] = self._make(rows, splits)
        device_step, replay = self._graphs[rows, splits]
        device_step.fill(step, query_tiles(step.cu_q, 1))
        replay()

    def _make(self, rows: int, splits: int) -> tuple[DeviceStep, Callable[[], None]]:
        width = ceil_div(keys_of(splits), self._block_size)
        step = DeviceStep(rows, rows, width, rows, self._partials, self._residual.device)
        step.plan(splits, np.arange(rows), rows)
        # Capturing runs the body: over padding, which leaves the cache alone, and what it does to the residual is
        # taken back.
        step.fill(None, np.empty((0, 3), np.int32))
        kept = self._residual[:rows].clone()
        replay = self._capture(lambda: self._body(step))
        self._residual[:rows] = kept
        return step, replay


def powers_to(most: int) -> list[int]:
    """1, 2, 4 ... up to the first that is at least `most`."""
    return [1 << n for n in range((most - 1).bit_length() + 1)]
