"""The one account of a pipeline's KV blocks, kept by its scheduler: which request has which block, and what is cached.

A block is known by its request and index until it is full, and from then on by its name (prefix.py): it is shared by
all requests whose tokens begin alike. When no request needs it any more it stays, to be found again, until there is no
room: the least recently used goes first, and of one request the last block first, since nobody can use a block
without those before it. Stages decide none of this: steps tell them which named blocks a request begins with, what the
blocks that it fills are called, and which named blocks are not to be kept (`evictions`).

    open (one request writes it) -> sealed (full, named, shared) -> cached (nobody's) -> gone, or taken again
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Block:
    references: int = 1  # requests that have it
    name: bytes | None = None  # None: it is open


class Account:
    """Counts in blocks. `keeps`: what nobody needs is cached. Raises KeyError for a request that is not here."""

    def __init__(self, quota: int = 0, keeps: bool = True) -> None:
        self.keeps = keeps
        self.queries = 0  # blocks that requests which began could have found ...
        self.hits = 0  # ... and found
        self.evictions: list[bytes] = []  # of whom stages have not been told
        self._quota = quota
        self._tables: dict[int, list[Block]] = {}  # request -> its blocks, first position first
        self._named: dict[bytes, Block] = {}
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # nobody's; the first goes first
        self._used = 0

    # ------------------------------------------------------------------ counting

    @property
    def quota(self) -> int:
        return self._quota

    @property
    def used(self) -> int:
        """Blocks that some request has. More than the quota only after that became smaller: see `set_quota`."""
        return self._used

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """How many blocks requests could have more."""
        return self._quota - self._used

    def __contains__(self, rid: int) -> bool:
        return rid in self._tables

    def blocks(self, rid: int) -> int:
        """How many blocks the request has; 0 for one that is not here."""
        return len(self._tables.get(rid, ()))

    def found(self, names: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, are here."""
        if not self.keeps:
            return 0
        count = 0
        while count < len(names) and names[count] in self._named:
            count += 1
        return count

    def needed(self, names: Sequence[bytes], blocks: int) -> int:
        """How many of `available` a request takes that begins with these names and has so many blocks in all: what it
        shares with running requests is free of charge, what it finds cached is not, since it cannot be evicted then."""
        shared = [self._named[name] for name in names[: self.found(names)]]
        return blocks - sum(block.references > 0 for block in shared)

    # ------------------------------------------------------------------ requests

    def begin(self, rid: int, names: Sequence[bytes]) -> int:
        """A request begins (again): it takes what is here of its full blocks `names`. Returns how many that are.

        Not more than those before its last token are to be named: that one has to be computed in any case."""
        assert rid not in self._tables, "it has begun already"
        found = self.found(names)
        self._tables[rid] = [self._take(name) for name in names[:found]]
        self.queries += len(names)
        self.hits += found
        return found

    def adopt(self, rid: int, names: Sequence[bytes]) -> bool:
        """A request begins with blocks that all stages have, whether they are known here or not. False, and nothing has
        changed: there is no room."""
        assert rid not in self._tables, "it has begun already"
        unknown = sum(name not in self._named or not self._named[name].references for name in names)
        if unknown > self.available:
            return False
        # First what is here, so that nothing of it makes room for the rest.
        known = {name: self._take(name) for name in names if name in self._named}
        self._tables[rid] = [known.get(name) or self._new(name) for name in names]
        return True

    def grow(self, rid: int, blocks: int) -> bool:
        """See that the request has so many blocks. False, and nothing has changed: there is no room."""
        table = self._tables[rid]
        more = blocks - len(table)
        if more > max(0, self.available):
            return False
        for _ in range(more):
            table.append(self._new(None))
        return True

    def seal(self, rid: int, index: int, name: bytes) -> None:
        """Block `index` of the request is computed, or will be by a step that is on its way, and full. If the same
        content has been sealed before, the request has that block from now on: its bits are equal."""
        table = self._tables[rid]
        block, other = table[index], self._named.get(name)
        if block is other:
            return
        assert block.name is None, "content that has a name does not change"
        if other is None:
            block.name, self._named[name] = name, block
        else:
            table[index] = self._take(name)
            self._drop(block)

    def cut(self, rid: int, blocks: int) -> None:
        """The request keeps its first blocks only."""
        table = self._tables[rid]
        self._drop_all(table[blocks:])
        del table[blocks:]

    def release(self, rid: int) -> None:
        """The request ends, or makes room. What is sealed of it stays to be found."""
        self._drop_all(self._tables.pop(rid, ()))

    # ------------------------------------------------------------------ room

    def set_quota(self, blocks: int) -> None:
        """Cached blocks beyond it go at once. If `used` is more, requests have to be released until it is not."""
        self._quota = blocks
        while self._cached and self._used + len(self._cached) > blocks:
            self._evict()

    def keep(self, names: Iterable[bytes]) -> None:
        """All stages have these, and no request needs them: they are cached as far as there is room, in front of what
        was used here. What is not cached is to be evicted."""
        for name in names:
            if name in self._named:
                continue
            if self.keeps and self._used + len(self._cached) < self._quota:
                self._named[name] = Block(0, name)
                self._cached[name] = None
            else:
                self.evictions.append(name)

    def forget(self, names: Iterable[bytes]) -> None:
        """A stage has these no longer: nobody is to find them. Where a request has one, its next step shows that."""
        for name in names:
            if name in self._cached:
                del self._cached[name]
                del self._named[name]
                self.evictions.append(name)

    def reset(self) -> None:
        """What stages have is not known any more. No request is here now."""
        assert not self._tables, "requests have to be released before"
        self._named.clear()
        self._cached.clear()
        self.evictions.clear()

    def check(self) -> None:
        """References are what tables say. Raises AssertionError (tests)."""
        held: dict[int, Block] = {}
        references: dict[int, int] = {}
        for table in self._tables.values():
            assert len({id(block) for block in table}) == len(table), "a request has a block twice"
            for block in table:
                held[id(block)] = block
                references[id(block)] = references.get(id(block), 0) + 1
        for key, block in held.items():
            assert block.references == references[key]
            assert block.references == 1 or block.name is not None, "an open block is one request's"
            assert block.name is None or self._named[block.name] is block
        assert self._used == len(held)
        assert all(name in self._cached for name, block in self._named.items() if id(block) not in held)
        assert all(self._named[name].references == 0 for name in self._cached)

    # ------------------------------------------------------------------

    def _new(self, name: bytes | None) -> Block:
        if self._cached and self._used + len(self._cached) >= self._quota:
            self._evict()
        self._used += 1
        block = Block(1, name)
        if name is not None:
            self._named[name] = block
        return block

    def _take(self, name: bytes) -> Block:
        block = self._named[name]
        if block.references == 0:
            del self._cached[name]
            self._used += 1
        block.references += 1
        return block

    def _drop(self, block: Block) -> None:
        block.references -= 1
        if block.references:
            return
        self._used -= 1
        if block.name is not None:
            self._cached[block.name] = None
            if not self.keeps or self._used + len(self._cached) > self._quota:
                self._evict()

    def _drop_all(self, blocks: Sequence[Block]) -> None:
        for block in reversed(blocks):
            self._drop(block)

    def _evict(self) -> None:
        name, _ = self._cached.popitem(last=False)
        del self._named[name]
        self.evictions.append(name)
