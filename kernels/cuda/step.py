"""A step's arrays on the device, brought there in one copy."""

import numpy as np
import numpy.typing as npt
import torch

from kernels.base import StepArrays
from kernels.triton.attention import Partials, splits_of

ALIGN = 16  # int32 values: 64 bytes, so that no array's alignment depends on another's length
Slab = tuple[int, int, int, int]  # tiles from, to; queries from, to


class DeviceStep:
    """Room on the device for a step of up to `tokens` tokens, `rows` rows, `width` blocks a row and `tiles` tiles.

    fill() copies a step into it; what the step leaves free is padding (tokens at slot -1, tiles without queries).
    plan() says how much of it kernels shall look at. The addresses never change, so that a captured graph may use
    them, and the plan that it was captured with."""

    def __init__(
        self, tokens: int, rows: int, width: int, tiles: int, partials: Partials, device: torch.device
    ) -> None:
        self.capacity = (tokens, rows, width, tiles)
        sizes = [tokens, tokens, 3 * tiles, rows * width]
        starts = np.cumsum([0] + [-(-size // ALIGN) * ALIGN for size in sizes])
        self._host = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        host, there = (
            [t[at : at + size] for at, size in zip(starts.tolist(), sizes, strict=False)]
            for t in (self._host, self._device)
        )
        self._positions, self._slots = host[0].numpy(), host[1].numpy()
        self._tiles, self._tables = host[2].view(tiles, 3).numpy(), host[3].view(rows, width).numpy()
        self._all_positions, self._all_slots = there[0], there[1]
        self.tiles, self.tables = there[2].view(tiles, 3), there[3].view(rows, width)
        self.partials = partials
        self.plan(1, np.arange(0), 0)

    def fits(self, step: StepArrays, tiles: int) -> bool:
        need = (len(step.positions), *step.tables.shape, tiles)
        return all(n <= room for n, room in zip(need, self.capacity, strict=True))

    def plan(self, splits: int, firsts: npt.NDArray[np.integer], tokens: int) -> None:
        """Attention shall go through `splits` splits of keys and the tiles whose first queries are `firsts`; all else
        through `tokens` tokens."""
        self.splits, self.tokens = splits, tokens
        self.positions, self.slots = self._all_positions[:tokens], self._all_slots[:tokens]  # int32
        self.slabs = slabs(firsts, tokens, self.partials.queries(splits))

    def fill(self, step: StepArrays | None, tiles: npt.NDArray[np.int32]) -> None:
        """Copies `step`, cut into `tiles` (see query_tiles); None is a step of padding only, without any effect."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before may still be reading
        tokens = 0 if step is None else len(step.positions)
        self._positions[tokens:] = -1
        self._slots[tokens:] = -1
        self._tiles[len(tiles) :] = 0
        self._tiles[: len(tiles)] = tiles
        if step is not None:
            self._positions[:tokens] = step.positions
            self._slots[:tokens] = step.slots
            self._tables[: step.tables.shape[0], : step.tables.shape[1]] = step.tables
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def query_tiles(cu_q: npt.NDArray[np.int32], tile_queries: int) -> npt.NDArray[np.int32]:
    """[N, 3] int32: row, first query and end of the row's queries, for tiles of up to tile_queries of one row."""
    counts = np.diff(cu_q)
    per_row = -(-counts // tile_queries)
    row = np.repeat(np.arange(len(counts), dtype=np.int32), per_row)
    nth = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    return np.stack([row, cu_q[row] + nth * tile_queries, cu_q[row + 1]], axis=1).astype(np.int32)


def slabs(firsts: npt.NDArray[np.integer], tokens: int, room: int) -> list[Slab]:
    """Consecutive tiles, given by their first queries, such that the queries of each slab fit in `room`."""
    found: list[Slab] = []
    begin = 0
    while begin < len(firsts):
        query = int(firsts[begin])
        end = int(np.searchsorted(firsts, query + room, side="right")) - 1
        if tokens - query <= room:
            end = len(firsts)
        if end <= begin:
            raise ValueError(f"a tile has more queries than there is room for ({room})")
        found.append((begin, end, query, int(firsts[end]) if end < len(firsts) else tokens))
        begin = end
    return found


def splits_needed(step: StepArrays) -> int:
    """How many splits of keys the longest row of a step has."""
    return splits_of(int(step.context_lens.max()))
