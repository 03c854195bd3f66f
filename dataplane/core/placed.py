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

    def wants(self, target: Member, rid: int) -> bool:
        """Whether this member is to have a copy of the request."""
        return any(self.members.get(holder) == target for holder in self._holders.get(rid, ()))

    def place(self, order: Place, tokens: int) -> tuple[list[Member], list[Member]]:
        """The scheduler says who is to have copies of a request that has `tokens` positions in full blocks here.
        Returns who gets one from now on, and whose goes."""
        rid = order.rid
        before = self._at(self._holders.get(rid, ()))
        fresh = [holder for holder in order.holders if holder not in self._holders.get(rid, ())]
        self._holders[rid] = order.holders
        for key in [key for key in self._waits if key[0] == rid and key[1] not in order.holders]:
            del self._waits[key]
        # The first one is the one that is coming, which may have been said before: a lost answer is given again.
        for holder in dict.fromkeys((*fresh, *order.holders[:1])):
            self._waits[rid, holder] = tokens
        now = self._at(order.holders)
        return [m for m in now if m not in before], [m for m in before if m not in now]

    def forget(self, rid: int) -> None:
        """The request has ended here or makes room."""
        for holder in self._holders.pop(rid, ()):
            self._waits.pop((rid, holder), None)

    def copied(self, sources: Mapping[Member, ReplicaSource]) -> list[tuple[int, PipelineId]]:
        """Copies that were waited for and are there now."""
        found = []
        for (rid, holder), tokens in list(self._waits.items()):
            member = self.members.get(holder)
            source = sources.get(member) if member is not None else None
            if source is not None and source.known and source.acked(rid) >= tokens:
                del self._waits[rid, holder]
                found.append((rid, holder))
        return found

    def _at(self, holders: Iterable[PipelineId]) -> list[Member]:
        return [self.members[holder] for holder in holders if holder in self.members]


def tokens_where(wanted: Callable[[int], bool], tokens: Callable[[int], int]) -> Callable[[int], int]:
    """`tokens` of requests that are wanted, 0 of others: as if they were not here."""
    return lambda rid: tokens(rid) if wanted(rid) else 0
