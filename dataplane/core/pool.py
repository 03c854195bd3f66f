"""The blocks of a node's pool: who has one, what it is called, which bytes it should have.

A block is free, or has holders: rows of the block table and names that are kept. A full one has a name (prefix.py), and
there is one block of a name: whoever needs that content holds it, too. One whose holders are all copies for others is
at rest: nobody computes with it, and who takes it into service looks at it first."""

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
        self._former: dict[int, bytes] = {}  # names that another block has now, with the same content
        self._more: dict[int, int] = {}  # holders of a block besides the first
        self._copied: dict[int, int] = {}  # holders of a block that are copies for others

    def find(self, name: bytes) -> int | None:
        return self._named.get(name)

    def has(self, name: bytes) -> bool:
        """Whether a block of that name is here, whoever holds it."""
        return name in self._named

    def name_of(self, block: int) -> bytes:
        """Its name, b"" if it has none."""
        return self._names.get(block, b"")

    def former_name_of(self, block: int) -> bytes:
        """The name that it had until another block was called so, b"" if there was none."""
        return self._former.get(block, b"")

    def call(self, block: int, name: bytes) -> None:
        """From now on this is the block of that name, and of no other; another one that was has none any more."""
        if self._names.get(block, name) != name:
            self.forget(block)
        self._former.pop(block, None)
        before = self._named.get(name)
        if before is not None and before != block:
            del self._names[before]
            self._former[before] = name
        self._named[name], self._names[block] = block, name

    def forget(self, block: int) -> bytes:
        """The block has no name any more. Returns the one that it had, b"" if it had none."""
        name = self._names.pop(block, b"")
        if name:
            del self._named[name]
            self.gone.append(name)
        return name

    def add(self, block: int) -> None:
        """One holder more that computes with it, or keeps it for those who may."""
        self._more[block] = self._more.get(block, 0) + 1

    def drop(self, block: int) -> None:
        """One such holder less: without any it is free."""
        more = self._more.get(block, 0)
        if more > 1:
            self._more[block] = more - 1
        elif more:
            del self._more[block]
        else:
            self.forget(block)
            self._former.pop(block, None)
            self.checksums.written(block)
            self.free.append(block)
            return
        if self.at_rest(block):
            self.checksums.rested(block)

    def drop_all(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.drop(block)

    # Copies for others.

    def new_copy(self) -> int:
        """A free block, held by a copy from now on. Raises IndexError if there is none."""
        block = self.free.pop()
        self._copied[block] = 1
        return block

    def add_copy(self, block: int) -> None:
        self.add(block)
        self._copied[block] = self._copied.get(block, 0) + 1

    def drop_copy(self, block: int) -> None:
        self.serve(block)
        self.drop(block)

    def serve(self, block: int) -> None:
        """One of its copies is taken into service, by what computes with it from now on."""
        if self._copied[block] > 1:
            self._copied[block] -= 1
        else:
            del self._copied[block]

    def rest(self, block: int) -> None:
        """One that computed with it holds it as a copy from now on."""
        self._copied[block] = self._copied.get(block, 0) + 1
        if self.at_rest(block):
            self.checksums.rested(block)

    def at_rest(self, block: int) -> bool:
        return self._copied.get(block, 0) == 1 + self._more.get(block, 0)

    def holders(self, block: int) -> int:
        """How many a block has that is not free."""
        return 1 + self._more.get(block, 0)

    def only(self, holders: Counter[int]) -> set[int]:
        """Of blocks and how many of their holders are counted, those that have no others."""
        return {block for block, count in holders.items() if count == 1 + self._more.get(block, 0)}

    def check(self, holders: Counter[int], copies: Counter[int]) -> None:
        """`holders`: all there are, `copies`: those that are copies for others. Raises AssertionError."""
        assert {b: n for b, n in copies.items() if n} == self._copied, "copies are miscounted"
        for block in self._copied:
            assert not self.at_rest(block) or self.checksums.is_copy(block), (
                "a block at rest would not be looked at"
            )
        assert not holders.keys() & set(self.free), "a block is free and somebody's"
        assert sorted([*holders, *self.free]) == list(range(self.num_blocks)), "a block is lost"
        assert {b: n - 1 for b, n in holders.items() if n > 1} == self._more, "holders are miscounted"
        assert {name: block for block, name in self._names.items()} == self._named
        assert self._names.keys() | self._former.keys() <= holders.keys(), "a free block has a name"
        assert not self._names.keys() & self._former.keys(), "a block has two names"
        assert self.checksums.unverified.keys() <= holders.keys(), "a free block waits to be looked at"
