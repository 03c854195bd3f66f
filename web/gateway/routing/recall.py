"""Who has this request? Every scheduler is asked; the answers, or their absence, decide (pure)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.requests import Log, Recall, Recalled
from web.gateway.routing.events import Effect, RecallDone, SendRecall


@dataclass(slots=True)
class _Search:
    until: float
    asked: set[Member] = field(default_factory=set)
    answered: set[Member] = field(default_factory=set)
    best: Log | None = None


class Recalls:
    """Level-triggered: news brings a search to where it should be, whatever happened before."""

    def __init__(self) -> None:
        self._searches: dict[int, _Search] = {}
        self._news: dict[int, None] = {}  # searches to look at, in order
        self._ends: list[
            tuple[float, int]
        ] = []  # heap: when a search is over; void if there is no such search

    def __len__(self) -> int:
        return len(self._searches)

    def begin(self, rid: int, until: float) -> None:
        """Search for `rid` until that moment; a search under way goes on."""
        if rid not in self._searches:
            self._searches[rid] = _Search(until)
            self._news[rid] = None
            heapq.heappush(self._ends, (until, rid))

    def answer(self, member: Member, recalled: Recalled) -> None:
        search = self._searches.get(recalled.rid)
        if search is None:
            return
        self._news[recalled.rid] = None
        search.answered.add(member)
        log, best = recalled.log, search.best
        if log is None or best is None:
            search.best = log or best
            return
        # A scheduler that has been left may have the longer log, and the one that runs the request the later reader.
        longer = log if len(log.emitted) > len(best.emitted) else best
        search.best = replace(longer, reader=max(log.reader, best.reader))

    def lost(self, member: Member) -> None:
        """Its stream broke: what it has not answered, it has to be asked again. A search may be over by that only if it
        has found something."""
        for rid, search in self._searches.items():
            search.asked.discard(member)
            if search.best is not None:
                self._news[rid] = None

    def wake(self) -> None:
        """Who can be asked has changed."""
        self._news = dict.fromkeys(self._searches)

    def settle(self, streams: Mapping[Member, bool], now: float, out: list[Effect]) -> None:
        """`streams`: every member that runs schedulers, and whether it can be asked."""
        while self._ends and self._ends[0][0] <= now:
            self._news[heapq.heappop(self._ends)[1]] = None
        if not self._news:
            return
        reachable = {member for member, up in streams.items() if up}
        news, self._news = self._news, {}
        for rid in news:
            search = self._searches.get(rid)
            if search is None:
                continue
            for member in sorted(reachable - search.asked - search.answered):
                search.asked.add(member)
                out.append(SendRecall(member, Recall(rid)))
            sure = bool(streams) and streams.keys() <= search.answered
            # Once it is found, only those who can be asked may have a longer log of it.
            found = search.best is not None and reachable <= search.answered
            if sure or found or now >= search.until:
                del self._searches[rid]
                out.append(RecallDone(rid, search.best, sure))
