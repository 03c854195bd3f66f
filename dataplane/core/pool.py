"""The blocks of a node's pool: who has one, what it is called, which bytes it should have.

A block is free, or has holders: rows of the block table and names that are kept. A full one has a name (prefix.py), and
there is one block of a name: whoever needs that content holds it, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dataplane.core.checksums import Checksums


class Pool:
    """`free` is shared with the block table, which takes blocks from its end: each of them has one holder then."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.checksums = Checksums()
        self.gone: list[bytes] = []  # names that are not here any more: for the replicator to take
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._more: dict[int, int] = {}  # holders of a block besides the first

    def find(self, name: bytes) -> int | None:
        return self._named.get(name)

    def has(self, name: bytes) -> bool:
        """Whether a block of that name is here, whoever holds it."""
        return name in self._named

    def name_of(self, block: int) -> bytes:
        """Its name, b"" if it has none."""
        return self._names.get(block, b"")

    def call(self, block: int, name: bytes) -> None:
        """From now on this is the block of that name, and of no other; another one that was has none any more."""
        if self._names.get(block, name) != name:
            self.forget(block)
        before = self._named.get(name)
        if before is not None:
            del self._names[before]
        self._named[name], self._names[block] = block, name

    def forget(self, block: int) -> bytes:
        """The block has no name any more. Returns the one that it had, b"" if it had none."""
        name = self._names.pop(block, b"")
        if name:
            del self._named[name]
            self.gone.append(name)
        return name

    def add(self, block: int) -> None:
        """One holder more."""
        self._more[block] = self._more.get(block, 0) + 1

    def drop(self, block: int) -> None:
        """One holder less: without any it is free."""
        more = self._more.get(block, 0)
        if more > 1:
            self._more[block] = more - 1
        elif more:
            del self._more[block]
        else:
            self.forget(block)
            self.checksums.written(block)
            self.free.append(block)

    def drop_all(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.drop(block)

    def only(self, holders: Counter[int]) -> set[int]:
        """Of blocks and how many of their holders are counted, those that have no others."""
        return {block for block, count in holders.items() if count == 1 + self._more.get(block, 0)}

    def check(self, holders: Counter[int]) -> None:
        """`holders`: all there are. Raises AssertionError."""
        assert not holders.keys() & set(self.free), "a block is free and somebody's"
        assert sorted([*holders, *self.free]) == list(range(self.num_blocks)), "a block is lost"
        assert {b: n - 1 for b, n in holders.items() if n > 1} == self._more, "holders are miscounted"
        assert {name: block for block, name in self._names.items()} == self._named
        assert self._names.keys() <= holders.keys(), "a free block has a name"
        assert self.checksums.unverified.keys() <= holders.keys(), "a free block waits to be looked at"
