"""Who has this request? Every scheduler is asked; the answers, or their absence, decide (pure)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.requests import Log, Recall, Recalled
from web.gateway.routing.events import Effect, RecallDone, SendRecall


@dataclass(slots=True)
class _Search:
    """What is outstanding is counted: after a gateway's loss each stream has a search, with an answer a scheduler."""

    until: float
    to_ask: list[Member]
    silent: int  # who runs schedulers and has not answered ...
    awaited: int  # ... and can be asked, or has been
    answered: set[Member] = field(default_factory=set)
    best: Log | None = None


class Recalls:
    """News brings a search to where it should be, whatever happened before."""

    def __init__(self) -> None:
        self._streams: dict[Member, bool] = {}  # who runs schedulers: can it be asked?
        self._searches: dict[int, _Search] = {}
        self._news: dict[int, None] = {}  # searches to look at, in order
        # Heap: when a search is over; void if there is no such search.
        self._ends: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._searches)

    def begin(self, rid: int, until: float) -> None:
        """Search for `rid` until that moment; a search under way goes on."""
        if rid not in self._searches:
            up = [member for member, up in self._streams.items() if up]
            self._searches[rid] = _Search(until, up, len(self._streams), len(up))
            self._news[rid] = None
            heapq.heappush(self._ends, (until, rid))

    def answer(self, member: Member, recalled: Recalled) -> None:
        search = self._searches.get(recalled.rid)
        if search is None:
            return
        self._news[recalled.rid] = None
        if member not in search.answered:
            search.answered.add(member)
            search.silent -= member in self._streams
            search.awaited -= self._streams.get(member, False)
        log, best = recalled.log, search.best
        if log is None or best is None:
            search.best = log or best
            return
        # A scheduler that has been left may have the longer log, and the one that runs the request the later reader.
        longer = log if len(log.emitted) > len(best.emitted) else best
        search.best = replace(longer, reader=max(log.reader, best.reader))

    def changed(self, member: Member, up: bool | None) -> None:
        """Whether it can be asked now; None: it runs no schedulers any more. What it has not answered when its stream
        breaks, it has to be asked again."""
        before = self._streams.get(member)
        if up is before:
            return
        if up is None:
            del self._streams[member]
        else:
            self._streams[member] = up
        for search in self._searches.values():
            if member not in search.answered:
                search.silent += (up is not None) - (before is not None)
                search.awaited += (up is True) - (before is True)
                if up:
                    search.to_ask.append(member)
        self._news = dict.fromkeys(self._searches)

    def settle(self, now: float, out: list[Effect]) -> None:
        while self._ends and self._ends[0][0] <= now:
            self._news[heapq.heappop(self._ends)[1]] = None
        news, self._news = self._news, {}
        for rid in news:
            search = self._searches.get(rid)
            if search is None:
                continue
            out += [SendRecall(member, Recall(rid)) for member in search.to_ask]
            search.to_ask.clear()
            sure = bool(self._streams) and not search.silent
            # Once it is found, only those who can be asked may have a longer log of it.
            found = search.best is not None and not search.awaited
            if sure or found or now >= search.until:
                del self._searches[rid]
                out.append(RecallDone(rid, search.best, sure))
