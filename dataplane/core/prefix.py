"""Chain hashes: what a full block of KV is known by, wherever it lies.

KV at a position is a function of all tokens up to it, so a block is named by its own tokens and by the name of the
block before it. Equal names mean equal bits (on nodes of equal numerics), whichever request had them computed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

NAME_BYTES = 16  # nobody finds two blocks with one name, not on purpose either


class PrefixHasher:
    """Names of the full blocks of a token log that only grows at its end, or is cut back there.

    `salt`: requests of different salts share nothing. It has all that decides the bits of KV besides tokens (the
    numerics of all stages of the pipeline), and a tenant's own."""

    def __init__(self, block_size: int, salt: bytes = b"") -> None:
        self.block_size = block_size
        self.names: list[bytes] = []
        self._root = hashlib.blake2b(salt, digest_size=NAME_BYTES, person=b"kv prefix").digest()

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """`tokens`: the whole log. Returns the names of the blocks that have become full since the last call."""
        size, first = self.block_size, len(self.names)
        name = self.names[-1] if self.names else self._root
        for start in range(first * size, len(tokens) - size + 1, size):
            block = struct.pack(f"<{size}i", *tokens[start : start + size])
            name = hashlib.blake2b(block, digest_size=NAME_BYTES, key=name).digest()
            self.names.append(name)
        return self.names[first:]

    def cut(self, tokens: int) -> None:
        """The log is cut back to so many tokens: the rest may become another one."""
        del self.names[tokens // self.block_size :]


def unpack_names(data: bytes) -> list[bytes]:
    """Names, one behind the other. Raises ValueError when they are cut short."""
    if len(data) % NAME_BYTES:
        raise ValueError(f"{len(data)} bytes are no names of blocks")
    return [data[at : at + NAME_BYTES] for at in range(0, len(data), NAME_BYTES)]
