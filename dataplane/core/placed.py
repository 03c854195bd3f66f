"""Which copies of requests go where on one stage, where each request has a holder of its own (see holders.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from controlplane.contract.ids import Member, PipelineId
from dataplane.core.messages import Place
from dataplane.core.replication import ReplicaSource


@dataclass(slots=True)
class Placed:
    """Of one pipeline. `members`: who serves the stage of each pipeline that may hold copies."""

    members: dict[PipelineId, Member] = field(default_factory=dict)
    _holders: dict[int, tuple[PipelineId, ...]] = field(default_factory=dict)  # by request
    # Copies that the scheduler waits for: the positions that there were when it asked for them.
    _waits: dict[tuple[int, PipelineId], int] = field(default_factory=dict)
    _held: dict[tuple[int, PipelineId], int] = field(default_factory=dict)  # those of which it was told so
    # Those that are gone again, and whether the scheduler has to be told.
    _lost: dict[tuple[int, PipelineId], bool] = field(default_factory=dict)

    def wants(self, target: Member, rid: int) -> bool:
        """Whether this member is to have a copy of the request."""
        return any(self.members.get(holder) == target for holder in self._holders.get(rid, ()))

    def place(self, order: Place, tokens: int) -> tuple[list[Member], list[Member]]:
        """The scheduler says who is to have copies of a request that has `tokens` positions in full blocks here.
        Returns who gets one from now on, and whose goes."""
        rid = order.rid
        before_ids = self._holders.get(rid, ())
        before = self._at(before_ids)
        fresh = [holder for holder in order.holders if holder not in before_ids]
        self._holders[rid] = order.holders
        for holder in before_ids:
            if holder not in order.holders:
                self._forget(rid, holder)
            elif (rid, holder) in self._lost:
                self._lost[rid, holder] = True  # that was said may be lost
        # The first one is the one that is coming, which may have been said before: a lost answer is given again.
        for holder in dict.fromkeys((*fresh, *order.holders[:1])):
            self._waits[rid, holder] = tokens
        now = self._at(order.holders)
        return [m for m in now if m not in before], [m for m in before if m not in now]

    def forget(self, rid: int) -> None:
        """The request has ended here or makes room."""
        for holder in self._holders.pop(rid, ()):
            self._forget(rid, holder)

    def copied(self, sources: Mapping[Member, ReplicaSource]) -> list[tuple[int, PipelineId]]:
        """Copies that were waited for and are there now."""
        found = []
        for key, tokens in list(self._waits.items()):
            acked = self._acked(key, sources)
            if acked is not None and acked >= tokens:
                del self._waits[key]
                self._lost.pop(key, None)
                self._held[key] = tokens
                found.append(key)
        return found

    def lost(self, sources: Mapping[Member, ReplicaSource]) -> list[tuple[int, PipelineId]]:
        """Copies that were there and are so no longer: their holder needed the room, or is another process. They are
        sent again, and waited for."""
        for key, tokens in list(self._held.items()):
            acked = self._acked(key, sources)
            if acked is not None and acked < tokens:
                del self._held[key]
                self._waits[key] = max(tokens, self._waits.get(key, 0))
                self._lost[key] = True
        untold = [key for key, untold in self._lost.items() if untold]
        self._lost.update(dict.fromkeys(untold, False))
        return untold

    def _acked(self, key: tuple[int, PipelineId], sources: Mapping[Member, ReplicaSource]) -> int | None:
        """Positions of the copy that its holder has acknowledged; None: it has not said yet what it has."""
        member = self.members.get(key[1])
        source = sources.get(member) if member is not None else None
        return source.acked(key[0]) if source is not None and source.known else None

    def _forget(self, rid: int, holder: PipelineId) -> None:
        for book in (self._waits, self._held, self._lost):
            book.pop((rid, holder), None)

    def _at(self, holders: Iterable[PipelineId]) -> list[Member]:
        return [self.members[holder] for holder in holders if holder in self.members]


def tokens_where(wanted: Callable[[int], bool], tokens: Callable[[int], int]) -> Callable[[int], int]:
    """`tokens` of requests that are wanted, 0 of others: as if they were not here."""
    return lambda rid: tokens(rid) if wanted(rid) else 0
