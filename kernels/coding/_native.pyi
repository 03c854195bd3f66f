from collections.abc import Collection, Sequence
from typing import Any

import numpy.typing as npt
from typing_extensions import Buffer

Shard = Buffer | npt.NDArray[Any]

DATA_MAX: int
PARITY_MAX: int
RDP_ROWS: int

def set_level(level: int) -> int: ...
def bit_matrix(factor: int) -> int: ...

class Shards:
    def __init__(self, buffers: Sequence[Shard | None], writable: Collection[int] = ()) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def longest(self) -> int: ...
    @property
    def shortest(self) -> int: ...

class Code:
    def __init__(self, rows: Sequence[bytes]) -> None: ...
    def encode(self, data: Shards, parity: Shards, begin: int, end: int, stream: int = -1) -> None: ...
    def update(self, index: int, shard: Shards, parity: Shards, begin: int, end: int) -> None: ...
    def restore(
        self,
        lost: Sequence[int],
        rows: Sequence[int],
        inverse: Sequence[bytes],
        data: Shards,
        parity: Shards,
        begin: int,
        end: int,
        stream: int = -1,
    ) -> None: ...

def rdp_encode(data: Shards, parity: Shards, width: int, begin: int, end: int, stream: int = -1) -> None: ...
def rdp_update(index: int, shard: Shards, parity: Shards, width: int, begin: int, end: int) -> None: ...
def rdp_restore(
    x: int, y: int, data: Shards, parity: Shards, width: int, begin: int, end: int, stream: int = -1
) -> None: ...
