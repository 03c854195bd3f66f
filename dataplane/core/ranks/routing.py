"""Which rank owns a request, and of which requests the next prefill batch has how many tokens.

A request's owner computes its data-parallel heads (kernels/ranks/layout.py). All ranks wait for the slowest in every
layer, so a batch is drawn token by token from the rank that has the least to do in it (FailSafe, arXiv 2511.14116)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# Drawn at a time: large pieces first, since each costs a turn, then ever smaller ones, which even out a batch.
QUANTUM_TOKENS, QUANTUM_TOKENS_MIN = 256, 16


def chunk_cost(tokens: int, context: int) -> int:
    """What data-parallel attention costs for so many tokens after `context` others, in pairs of positions."""
    return tokens * tokens + tokens * context + tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens of a request that a step computes: positions `start` to `start + tokens`."""

    request: int
    rank: int  # the owner
    start: int
    tokens: int


@dataclass(slots=True)
class _Pending:
    request: int
    start: int  # position of the first token that is to be computed
    end: int


class Router:
    """Requests of one stage. Each is submitted once, drawn until its prompt is computed, and ended once."""

    def __init__(self, ranks: Iterable[int], quantum_tokens: int = QUANTUM_TOKENS) -> None:
        """Raises ValueError without a rank, or for a quantum of less than a token."""
        self._quantum = quantum_tokens
        self._waiting: dict[int, deque[_Pending]] = {rank: deque() for rank in sorted(ranks)}
        self._pending = dict.fromkeys(self._waiting, 0)
        self._held = dict.fromkeys(self._waiting, 0)
        self._owner: dict[int, int] = {}
        self._tokens: dict[int, int] = {}  # of a request, held by its owner
        if not self._waiting or quantum_tokens < 1:
            raise ValueError(
                f"{len(self._waiting)} ranks, {quantum_tokens} tokens at a time: 1 or more of each"
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self._waiting)

    def pending(self, rank: int) -> int:
        """Tokens that the rank is still to compute prompts of."""
        return self._pending[rank]

    def held(self, rank: int) -> int:
        """Tokens that the rank has computed, of requests that it owns."""
        return self._held[rank]

    def owner(self, request: int) -> int:
        return self._owner[request]

    def submit(self, request: int, tokens: int, done: int = 0) -> int:
        """A request with `tokens` positions to compute, of which `done` are there already. Returns its owner: the rank
        with the fewest tokens pending. Of equals the one that has computed fewest: when nothing waits, as with few
        requests, the first rank would own all. Raises ValueError if the request is there, or has no tokens."""
        if request in self._owner or not 0 <= done <= tokens or not tokens:
            raise ValueError(f"request {request}: {done} of {tokens} tokens, or submitted twice")
        rank = min(self._waiting, key=lambda each: (self._pending[each], self._held[each], each))
        self._take(request, rank, done)
        if done < tokens:
            self._waiting[rank].append(_Pending(request, done, tokens))
            self._pending[rank] += tokens - done
        return rank

    def grown(self, request: int, tokens: int = 1) -> None:
        """Decode steps have added tokens."""
        self._tokens[request] += tokens
        self._held[self._owner[request]] += tokens

    def end(self, request: int) -> None:
        """It has finished or was cancelled; it need not be there any more."""
        rank = self._owner.pop(request, None)
        if rank is None:
            return
        self._held[rank] -= self._tokens.pop(request)
        waiting = self._waiting[rank]
        for found in [each for each in waiting if each.request == request]:
            self._pending[rank] -= found.end - found.start
            waiting.remove(found)

    def draw(
        self,
        budget_tokens: int,
        busy: Mapping[int, int] | None = None,
        may_start: Callable[[int], bool] = lambda _: True,
    ) -> list[Chunk]:
        """The next batch: again and again from the rank that has least to do in it, until the budget is full or nobody
        has anything. `busy`: what ranks have to do in this step besides, as chunk_cost counts. `may_start` is asked
        before a request's first tokens are drawn, and takes its blocks if it says yes; after a no the rank's requests
        wait, in their order. Chunks of one request are one."""
        load = [((busy or {}).get(rank, 0), rank) for rank, waiting in self._waiting.items() if waiting]
        heapq.heapify(load)
        drawn: dict[int, Chunk] = {}
        while load and budget_tokens > 0:
            cost, rank = load[0]
            head = self._waiting[rank][0]
            before = drawn.get(head.request)
            if before is None and not self._tokens[head.request] and not may_start(head.request):
                heapq.heappop(load)
                continue
            piece = max(QUANTUM_TOKENS_MIN, budget_tokens // (2 * len(self._waiting)))
            tokens = min(self._quantum, piece, budget_tokens, head.end - head.start)
            start, had = (before.start, before.tokens) if before else (head.start, 0)
            drawn[head.request] = Chunk(head.request, rank, start, had + tokens)
            budget_tokens -= tokens
            head.start += tokens
            self._pending[rank] -= tokens
            self._tokens[head.request] += tokens
            self._held[rank] += tokens
            if head.start == head.end:
                self._waiting[rank].popleft()
            cost += chunk_cost(had + tokens, start) - (chunk_cost(had, start) if had else 0)
            if self._waiting[rank]:
                heapq.heapreplace(load, (cost, rank))
            else:
                heapq.heappop(load)
        return list(drawn.values())

    def change(self, ranks: Iterable[int]) -> dict[int, int]:
        """Other ranks from now on. Requests of those that are gone get new owners, the longest first: returned as
        request -> owner. Those of ranks that stay keep theirs. Raises ValueError without a rank."""
        wanted = sorted(ranks)
        if not wanted:
            raise ValueError("no ranks are left")
        gone = [rank for rank in self._waiting if rank not in wanted]
        waiting = [each for rank in gone for each in self._waiting[rank]]
        orphans = {request: self._tokens[request] for request, rank in self._owner.items() if rank in gone}
        self._waiting = {rank: self._waiting.get(rank, deque()) for rank in wanted}
        self._pending = {rank: self._pending.get(rank, 0) for rank in wanted}
        self._held = {rank: self._held.get(rank, 0) for rank in wanted}
        left = {each.request: each for each in waiting}
        for request in sorted(orphans, key=lambda each: (-orphans[each], each)):
            if request in left and not orphans[request]:
                continue  # it has nothing yet: it waits like a new one, below
            rank = min(wanted, key=lambda each: (self._held[each], each))
            self._take(request, rank, orphans[request])
            if request in left:
                self._queue(left[request], rank)
        for each in waiting:
            if not orphans[each.request]:
                rank = min(wanted, key=lambda other: (self._pending[other], self._held[other], other))
                self._take(each.request, rank, 0)
                self._queue(each, rank)
        return {request: self._owner[request] for request in orphans}

    def rewind(self, request: int, tokens: int) -> None:
        """Of a request only the first `tokens` positions are there any more; the others are computed before what waits.
        Raises ValueError if it has fewer."""
        rank, had = self._owner[request], self._tokens[request]
        if not 0 <= tokens <= had:
            raise ValueError(f"request {request} has {had} tokens, not {tokens}")
        lost = had - tokens
        if not lost:
            return
        self._tokens[request] = tokens
        self._held[rank] -= lost
        self._pending[rank] += lost
        for each in self._waiting[rank]:
            if each.request == request:
                each.start = tokens
                return
        self._waiting[rank].appendleft(_Pending(request, tokens, had))

    def _take(self, request: int, rank: int, tokens: int) -> None:
        self._owner[request] = rank
        self._tokens[request] = tokens
        self._held[rank] += tokens

    def _queue(self, each: _Pending, rank: int) -> None:
        self._waiting[rank].append(each)
        self._pending[rank] += each.end - each.start
