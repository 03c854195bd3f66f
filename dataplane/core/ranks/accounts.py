"""Room for KV as a vector: one entry a rank, in blocks of planes (a plane is the K and V of one head of one layer)."""

from __future__ import annotations

from collections.abc import Mapping

from dataplane.core.ranks.starting import Start
from kernels.ranks.layout import DATA_PARALLEL, Layout


def planes_for_all(layout: Layout) -> dict[int, int]:
    """Of each rank: planes of its tensor-parallel heads, which every request has blocks in."""
    planes = dict.fromkeys(layout.ranks, 0)
    for row in layout.heads:
        for holder in row:
            if holder != DATA_PARALLEL:
                planes[holder] += 1
    return planes


def planes_for_owned(layout: Layout) -> int:
    """Planes of data-parallel heads: a request has blocks in those of its owner."""
    return sum(row.count(DATA_PARALLEL) for row in layout.heads)


class RankAccounts:
    """Which request has how many blocks, and what that takes of each rank. A block is some positions of all planes."""

    def __init__(self, layout: Layout, capacity: Mapping[int, int]) -> None:
        """`capacity`: blocks of planes that a rank has room for. Raises ValueError for a rank without an entry."""
        if missing := [rank for rank in layout.ranks if rank not in capacity]:
            raise ValueError(f"ranks {missing} have no capacity")
        self._capacity = {rank: capacity[rank] for rank in layout.ranks}
        self._for_all = planes_for_all(layout)
        self._for_owned = planes_for_owned(layout)
        self._used = dict.fromkeys(layout.ranks, 0)
        self._requests: dict[int, tuple[int, int]] = {}  # owner, blocks

    def used(self) -> dict[int, int]:
        """Blocks of planes in use, by rank."""
        return dict(self._used)

    def cost(self, rank: int, owner: int) -> int:
        """Blocks of planes that one block of a request of this owner takes at a rank."""
        return self._for_all[rank] + (self._for_owned if rank == owner else 0)

    def can_take(self, owner: int, blocks: int) -> bool:
        """Whether every rank has room for so many more blocks of a request of this owner."""
        return all(
            self._used[rank] + blocks * self.cost(rank, owner) <= capacity
            for rank, capacity in self._capacity.items()
        )

    def take(self, request: int, owner: int, blocks: int) -> None:
        """Give a request that many blocks more. Raises ValueError if there is no room (ask first), or if the request
        has blocks at another owner."""
        before = self._requests.get(request, (owner, 0))
        if before[0] != owner or not self.can_take(owner, blocks):
            raise ValueError(f"request {request}: no room for {blocks} blocks at owner {owner}")
        self._requests[request] = (owner, before[1] + blocks)
        self._add(owner, blocks)

    def begin(self, start: Start, blocks: int) -> bool:
        """A request takes that many blocks, and the one that moves for it takes its own along. False: there is no room
        for both, and nothing has changed. Raises ValueError if the request that moves has no blocks."""
        if start.moves is None or start.target is None:
            if not self.can_take(start.rank, blocks):
                return False
            self.take(start.request, start.rank, blocks)
            return True
        if start.moves not in self._requests:
            raise ValueError(f"request {start.moves} has no blocks that could move to rank {start.target}")
        owner = self._requests[start.moves][0]
        moved = self.release(start.moves)
        if self.can_take(start.target, moved):
            self.take(start.moves, start.target, moved)
            if self.can_take(start.rank, blocks):
                self.take(start.request, start.rank, blocks)
                return True
            self.release(start.moves)
        self.take(start.moves, owner, moved)
        return False

    def release(self, request: int) -> int:
        """All blocks of a request; returns how many there were, none for one that has none."""
        owner, blocks = self._requests.pop(request, (self._owner_of_none(), 0))
        self._add(owner, -blocks)
        return blocks

    def spread(self) -> float:
        """The fullest rank against the emptiest; 1.0 if nothing is used, infinite if one has nothing."""
        most, least = max(self._used.values()), min(self._used.values())
        return 1.0 if not most else most / least if least else float("inf")

    def _owner_of_none(self) -> int:
        return next(iter(self._used))

    def _add(self, owner: int, blocks: int) -> None:
        for rank in self._used:
            self._used[rank] += blocks * self.cost(rank, owner)
