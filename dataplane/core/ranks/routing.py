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
# Prompts under way at a time, for each rank: with one, a rank whose last one is done has nothing until all others' are.
STARTED_PER_RANK = 2
# Where requests wait for room, the pieces of a rank's part of the budget (Router.draw). Chosen with `bench failsafe`:
# with 1 the ranks of a full stage computed up to 1.3 times the mean, and it served up to 16 % less.
CROWDED_PARTS = 8


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
    """Requests of one stage. Each is submitted once, drawn until its prompt is computed, and ended once.

    A request gets its owner when its first tokens are drawn, not when it comes: who waits for room is bound to no rank,
    and requests start in the order in which they came."""

    def __init__(self, ranks: Iterable[int], quantum_tokens: int = QUANTUM_TOKENS) -> None:
        """Raises ValueError without a rank, or for a quantum of less than a token."""
        self._quantum = quantum_tokens
        self._queue: dict[int, int] = {}  # requests that have no owner yet, and their tokens
        self._started: dict[int, deque[_Pending]] = {rank: deque() for rank in sorted(ranks)}
        self._pending = dict.fromkeys(self._started, 0)
        self._held = dict.fromkeys(self._started, 0)
        self._owner: dict[int, int] = {}
        self._tokens: dict[int, int] = {}  # of a request, held by its owner
        if not self._started or quantum_tokens < 1:
            raise ValueError(
                f"{len(self._started)} ranks, {quantum_tokens} tokens at a time: 1 or more of each"
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self._started)

    @property
    def waiting(self) -> int:
        """Requests without an owner."""
        return len(self._queue)

    def pending(self, rank: int) -> int:
        """Tokens that the rank is still to compute, of requests that it owns."""
        return self._pending[rank]

    def held(self, rank: int) -> int:
        """Tokens that the rank has computed, of requests that it owns."""
        return self._held[rank]

    def owner(self, request: int) -> int | None:
        """None: it has not begun, or is not there."""
        return self._owner.get(request)

    def submit(self, request: int, tokens: int, done: int = 0) -> None:
        """A request with `tokens` positions to compute. One of which `done` are there already gets its owner now: the
        rank with the fewest tokens pending, of equals the one that holds fewest. Raises ValueError if the request is
        there, or for a number of tokens that cannot be."""
        if request in self._owner or request in self._queue or not 0 <= done <= tokens or not tokens:
            raise ValueError(f"request {request}: {done} of {tokens} tokens, or submitted twice")
        if not done:
            self._queue[request] = tokens
            return
        rank = min(self._started, key=lambda each: (self._pending[each], self._held[each], each))
        self._take(request, rank, done)
        if done < tokens:
            self._append(_Pending(request, done, tokens), rank)

    def grown(self, request: int, tokens: int = 1) -> None:
        """Decode steps have added tokens."""
        self._tokens[request] += tokens
        self._held[self._owner[request]] += tokens

    def end(self, request: int) -> None:
        """It has finished or was cancelled; it need not be there any more."""
        self._queue.pop(request, None)
        rank = self._owner.pop(request, None)
        if rank is None:
            return
        self._held[rank] -= self._tokens.pop(request)
        started = self._started[rank]
        for found in [each for each in started if each.request == request]:
            self._pending[rank] -= found.end - found.start
            started.remove(found)

    def draw(
        self,
        budget_tokens: int,
        busy: Mapping[int, int] | None = None,
        may_start: Callable[[int, int], bool] = lambda request, rank: True,
    ) -> list[Chunk]:
        """The next batch: again and again from the rank that has least to do in it, until the budget is full or there
        is nothing. When a rank has nothing, the next request starts. `busy`: what ranks have to do in this step
        besides, as chunk_cost counts. `may_start` (request, rank) takes the request's blocks if it says yes; after a
        no nothing starts in this batch.

        While requests wait like that, a rank computes no more than one CROWDED_PARTS-th of its part of the budget.
        Few can start at a time then; computed at once, one rank would do all of the batch and the others wait for it.
        In small pieces prompts of several ranks meet in a batch, and come along with tokens that are decoded anyway.
        Chunks of one request are one."""
        batch = _Batch(self, budget_tokens, may_start)
        cost = {rank: (busy or {}).get(rank, 0) for rank in self._started}
        batch.start_more()
        load = [(cost[rank], rank) for rank, started in self._started.items() if started]
        heapq.heapify(load)
        while load and batch.left > 0:
            _, rank = heapq.heappop(load)
            more = batch.add(rank)
            cost[rank] += more
            if more and self._started[rank]:
                heapq.heappush(load, (cost[rank], rank))
            elif more:
                there = {each for _, each in load}
                for fresh in batch.start_more() - there:
                    heapq.heappush(load, (cost[fresh], fresh))
        return list(batch.chunks.values())

    def change(self, ranks: Iterable[int]) -> dict[int, int]:
        """Other ranks from now on. Requests of those that are gone get new owners, the longest first: returned as
        request -> owner. Those of ranks that stay keep theirs. Raises ValueError without a rank."""
        wanted = sorted(ranks)
        if not wanted:
            raise ValueError("no ranks are left")
        gone = [rank for rank in self._started if rank not in wanted]
        left = {each.request: each for rank in gone for each in self._started[rank]}
        orphans = {request: self._tokens[request] for request, rank in self._owner.items() if rank in gone}
        self._started = {rank: self._started.get(rank, deque()) for rank in wanted}
        self._pending = {rank: self._pending.get(rank, 0) for rank in wanted}
        self._held = {rank: self._held.get(rank, 0) for rank in wanted}
        for request in sorted(orphans, key=lambda each: (-orphans[each], each)):
            rank = min(wanted, key=lambda each: (self._held[each], each))
            self._take(request, rank, orphans[request])
            if request in left:
                self._append(left[request], rank)
        return {request: self._owner[request] for request in orphans}

    def rewind(self, request: int, tokens: int) -> None:
        """Of a request that has begun only the first `tokens` positions are there any more; the others are computed
        before what its owner has else. Raises ValueError if it has fewer."""
        rank, had = self._owner.get(request), self._tokens.get(request, 0)
        if rank is None or not 0 <= tokens <= had:
            raise ValueError(f"request {request} has {had} tokens, not {tokens}")
        lost = had - tokens
        if not lost:
            return
        self._tokens[request] = tokens
        self._held[rank] -= lost
        self._pending[rank] += lost
        for each in self._started[rank]:
            if each.request == request:
                each.start = tokens
                return
        self._started[rank].appendleft(_Pending(request, tokens, had))

    # ------------------------------------------------------------------ for a batch

    def head(self, rank: int) -> _Pending | None:
        """Whose tokens are drawn next from a rank that has some."""
        return self._started[rank][0] if self._started[rank] else None

    @property
    def started(self) -> int:
        """Requests that have begun, and whose prompts are not all computed."""
        return sum(map(len, self._started.values()))

    @property
    def idle(self) -> bool:
        """Whether a rank has nothing to compute."""
        return not all(self._started.values())

    def least(self) -> int:
        """The rank with the fewest tokens, computed and pending."""
        return min(self._started, key=lambda each: (self._pending[each] + self._held[each], each))

    def first_waiting(self) -> int | None:
        return next(iter(self._queue), None)

    def start(self, request: int, rank: int) -> None:
        tokens = self._queue.pop(request)
        self._take(request, rank, 0)
        self._append(_Pending(request, 0, tokens), rank)

    def drawn(self, rank: int, tokens: int) -> None:
        """So many tokens of the rank's head."""
        head = self._started[rank][0]
        head.start += tokens
        self._pending[rank] -= tokens
        self._tokens[head.request] += tokens
        self._held[rank] += tokens
        if head.start == head.end:
            self._started[rank].popleft()

    @property
    def quantum_tokens(self) -> int:
        return self._quantum

    def _take(self, request: int, rank: int, tokens: int) -> None:
        self._owner[request] = rank
        self._tokens[request] = tokens
        self._held[rank] += tokens

    def _append(self, each: _Pending, rank: int) -> None:
        self._started[rank].append(each)
        self._pending[rank] += each.end - each.start


class _Batch:
    """One batch while it is drawn."""

    def __init__(self, router: Router, budget_tokens: int, may_start: Callable[[int, int], bool]) -> None:
        self.chunks: dict[int, Chunk] = {}
        self.left = budget_tokens
        self._router, self._may_start = router, may_start
        self._taken = dict.fromkeys(router.ranks, 0)
        self._part = max(QUANTUM_TOKENS_MIN, budget_tokens // (CROWDED_PARTS * len(router.ranks)))
        self._refused = False

    def add(self, rank: int) -> int:
        """Draws some tokens from a rank. Returns what they cost, 0 if it gives none."""
        head = self._router.head(rank)
        assert head is not None, "a rank that has nothing is not drawn from"
        piece = max(QUANTUM_TOKENS_MIN, self.left // (2 * len(self._taken)))
        tokens = min(self._router.quantum_tokens, piece, self.left, head.end - head.start)
        if self._refused:
            tokens = min(tokens, self._part - self._taken[rank])
            if tokens <= 0:
                return 0
        before = self.chunks.get(head.request)
        start, had = (before.start, before.tokens) if before else (head.start, 0)
        self.chunks[head.request] = Chunk(head.request, rank, start, had + tokens)
        self._router.drawn(rank, tokens)
        self._taken[rank] += tokens
        self.left -= tokens
        return chunk_cost(had + tokens, start) - (chunk_cost(had, start) if had else 0)

    def start_more(self) -> set[int]:
        """Starts requests, each with the rank that has fewest tokens, until all ranks have something to compute.
        Returns their owners."""
        owners = set[int]()
        while (
            not self._refused
            and self._router.started < STARTED_PER_RANK * len(self._taken)
            and self._router.idle
        ):
            request, rank = self._router.first_waiting(), self._router.least()
            if request is None:
                break
            if not self._may_start(request, rank):
                self._refused = True
                break
            self._router.start(request, rank)
            owners.add(rank)
        return owners
