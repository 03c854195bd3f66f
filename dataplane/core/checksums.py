"""Which bytes the blocks of a node's pool should have, and which of them nobody has looked at yet.

A copy is checked when it arrives. When it is taken into service nothing is read: the block is `unverified` until
somebody has read it: the first step that needs it does, while it computes, and before anything that it has computed
leaves the node. What idle time there is before is used as well. Taking a gigabyte into service takes as long as taking
a block, and a bit that turned in a copy's memory is still no wrong token.

Blocks that are copied out get a checksum at that moment; it stays with them, so that to demote a request means reading
nothing either. A full block never changes. A step that goes on in a part-filled one ends its checksum."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Check:
    """A block ought to have this CRC-32."""

    block: int
    checksum: int


class Checksums:
    """By block of the pool. Single-threaded: no bytes are read here."""

    def __init__(self) -> None:
        self.failures = 0
        self.unverified: OrderedDict[int, None] = OrderedDict()  # in service, and nobody has looked at them
        self._of: dict[int, int] = {}
        self._tokens: dict[int, int] = {}  # of part-filled ones: positions that their checksum is of
        self._copies: set[int] = set()  # written by others, or at rest, and not looked at in service since

    def of(self, block: int) -> int | None:
        return self._of.get(block)

    def tokens(self, block: int, full: int) -> int:
        """How many positions of the block its checksum is of, `full` for a full block; 0 without one."""
        return self._tokens.get(block, full) if block in self._of else 0

    def arrived(self, block: int, checksum: int, tokens: int, full: int) -> None:
        """A copy with so many positions was written into the block."""
        self._set(block, checksum, tokens, full)
        self._copies.add(block)

    def copied(self, block: int, checksum: int, tokens: int, full: int) -> bool:
        """The block was read to be copied, with so many valid positions. False: it is not as it was before."""
        known = self._of.get(block)
        if known is not None and known != checksum and self._tokens.get(block, full) == tokens:
            self.failures += 1
            return False
        self._set(block, checksum, tokens, full)
        return True

    def is_copy(self, block: int) -> bool:
        """Whether it was written by others, or has been at rest, and nobody has looked at it in service since."""
        return block in self._copies

    def rested(self, block: int) -> None:
        """Nobody computes with it any more, and others count on it: who takes it into service looks at it."""
        self.unverified.pop(block, None)
        if block in self._of:
            self._copies.add(block)

    def claimed(self, block: int) -> None:
        """Who relied on it as a copy takes it into service: it is looked at, whoever computes with it already."""
        if block in self._of:
            self._copies.add(block)

    def in_service(self, block: int) -> None:
        """From now on somebody computes with it."""
        if block in self._copies:
            self.unverified[block] = None

    def written(self, block: int) -> None:
        """A step goes on in this block, or it is free: it is not what it was."""
        self._of.pop(block, None)
        self._tokens.pop(block, None)
        self._copies.discard(block)
        self.unverified.pop(block, None)

    @property
    def part_filled(self) -> bool:
        """Whether any block that a step may go on in has a checksum."""
        return bool(self._tokens)

    # ------------------------------------------------------------------ what to look at

    def checks(self, blocks: Iterable[int]) -> list[Check]:
        """Those of these blocks that nobody has looked at, each once."""
        wanted = dict.fromkeys(block for block in blocks if block in self.unverified)
        return [Check(block, self._of[block]) for block in wanted]

    def next(self, blocks: int) -> list[Check]:
        """Up to so many checks, of whichever blocks."""
        found: list[Check] = []
        for block in self.unverified:
            if len(found) == blocks:
                break
            found.append(Check(block, self._of[block]))
        return found

    def looked_at(self, checks: Sequence[Check], sums: npt.NDArray[np.uint32]) -> list[int]:
        """What the blocks of `checks` have, in their order. Returns the blocks that are not as they ought to be."""
        damaged = []
        for check, found in zip(checks, sums.tolist(), strict=True):
            if self._of.get(check.block) != check.checksum:
                continue  # it was freed or written meanwhile
            if found != check.checksum:
                self.failures += 1
                damaged.append(check.block)
            # Else it has come to rest meanwhile, and its memory may fail yet.
            if check.block in self.unverified:
                del self.unverified[check.block]
                self._copies.discard(check.block)
        return damaged

    def _set(self, block: int, checksum: int, tokens: int, full: int) -> None:
        self._of[block] = checksum
        if tokens < full:
            self._tokens[block] = tokens
        else:
            self._tokens.pop(block, None)
