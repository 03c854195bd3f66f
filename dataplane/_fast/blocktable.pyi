from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

class TableFull(MemoryError):
    """No free row, or more blocks than one row may have."""

class KvGap(ValueError):
    """A step begins behind the positions that are valid."""

class Rows:
    """The rows of a step of B rows, K of which sample. Raises ValueError."""

    def __init__(self, data: bytes) -> None: ...
    @property
    def rids(self) -> npt.NDArray[np.int64]: ...  # [B]
    @property
    def starts(self) -> npt.NDArray[np.int32]: ...  # [B]
    @property
    def counts(self) -> npt.NDArray[np.int32]: ...  # [B]
    @property
    def sample_rids(self) -> npt.NDArray[np.int64]: ...  # [K]
    @property
    def sample_rows(
        self,
    ) -> npt.NDArray[np.int32]: ...  # [K] index in the step of the token before what is sampled
    @property
    def drafts(self) -> npt.NDArray[np.int32]: ...  # [B] how many of the row's last tokens are drafts
    @property
    def depths(self) -> npt.NDArray[np.int32]: ...  # [K] how many drafts are before what is sampled

def lookup(held: dict[int, int], keys: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], int]: ...

class StepArrays:
    """The arrays of one step; the next fill() into the same object overwrites them."""

    @property
    def positions(self) -> npt.NDArray[np.int64]: ...  # [T]
    @property
    def slots(self) -> npt.NDArray[np.int64]: ...  # [T] block * block_size + offset
    @property
    def cu_q(self) -> npt.NDArray[np.int32]: ...  # [B + 1]
    @property
    def context_lens(self) -> npt.NDArray[np.int32]: ...  # [B]
    @property
    def tables(self) -> npt.NDArray[np.int32]: ...  # [B, W]
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_rows(self) -> int: ...

class BlockTable:
    def __init__(self, max_rows: int, max_blocks_per_row: int, block_size: int) -> None: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def max_blocks_per_row(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def rows_in_use(self) -> int: ...
    def new_row(self) -> int: ...
    def free_row(self, row: int) -> list[int]: ...
    def extend(self, row: int, blocks: Iterable[int]) -> None: ...
    def set_block(self, row: int, index: int, block: int) -> None: ...
    def truncate(self, row: int, num_blocks: int) -> list[int]: ...
    def blocks(self, row: int) -> list[int]: ...
    def block(self, row: int, index: int) -> int: ...
    def num_blocks(self, row: int) -> int: ...
    def valid(self, row: int) -> int: ...
    def set_valid(self, row: int, tokens: int) -> None: ...
    def valid_of(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]: ...
    def grow(
        self,
        rows: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        free: list[int],
    ) -> int: ...
    def commit(
        self,
        rows: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        drafts: npt.NDArray[np.int32] | None = None,
    ) -> list[int]: ...
    def fill(
        self,
        rows: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        out: StepArrays | None = None,
    ) -> StepArrays: ...
