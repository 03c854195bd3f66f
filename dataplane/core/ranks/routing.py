"""Which rank owns a request, and of which requests the next prefill batch has how many tokens.

A request's owner computes its data-parallel heads (kernels/ranks/layout.py). All ranks wait for the slowest in every
layer, so a batch is drawn token by token from the rank that has the least to do in it (FailSafe, arXiv 2511.14116)."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dataplane.core.ranks.starting import Sized, Start, choose_start

# Drawn at a time: large pieces first, since each costs a turn, then ever smaller ones, which even out a batch.
QUANTUM_TOKENS, QUANTUM_TOKENS_MIN = 256, 16
# Prompts under way at a time, for each rank: a rank whose first one is done goes on with the next at once.
STARTED_PER_RANK = 4
# Where requests wait for room: of a rank's part of the budget one piece of so many, and of that the part of ranks that
# have prompts to this power, but not less than the last. Chosen with `bench failsafe`: taking all of the budget, ranks
# of a full stage computed up to 1.3 times the mean, and it served up to 16 % less.
CROWDED_PARTS, CROWDED_POWER, CROWDED_LEAST = 8, 3, 0.25
# Of the requests that wait, how many from the first on are looked at for the one that levels the ranks' room best, and
# how many may start before an older one.
LOOKED_AT, OVERTAKEN_MAX = 16, 16


def chunk_cost(tokens: int, context: int, token_pairs: int = 1) -> int:
    """What data-parallel heads cost for so many tokens after `context` others, in pairs of a position with one that is
    not behind it: their scores, and the products, of which a token's are as much as `token_pairs` pairs."""
    return tokens * (tokens + 1) // 2 + tokens * context + tokens * token_pairs


def crowded_budget(budget_tokens: int, with_prompts: int, ranks: int) -> int:
    """Tokens of a batch while requests wait for room, where so many ranks have prompts to compute."""
    share = max((with_prompts / ranks) ** CROWDED_POWER, CROWDED_LEAST)
    part = max(QUANTUM_TOKENS_MIN, int(budget_tokens / (CROWDED_PARTS * ranks) * share))
    return with_prompts * part


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens of a request that a step computes: positions `start` to `start + tokens`."""

    request: int
    rank: int  # the owner
    start: int
    tokens: int


@dataclass(slots=True)
class _Waiting:
    tokens: int
    room: int
    overtaken: int = 0  # requests that came later and started before it


@dataclass(slots=True)
class _Pending:
    request: int
    start: int  # position of the first token that is to be computed
    end: int


class Router:
    """Requests of one stage. Each is submitted once, drawn until its prompt is computed, and ended once.

    A request gets its owner when its first tokens are drawn, not when it comes: who waits for room is bound to no rank.
    Of the first LOOKED_AT requests that wait the one starts which levels the ranks' room best, but none is overtaken
    more than OVERTAKEN_MAX times."""

    def __init__(
        self, ranks: Iterable[int], quantum_tokens: int = QUANTUM_TOKENS, token_pairs: int = 1
    ) -> None:
        """`token_pairs`: see chunk_cost. Raises ValueError without a rank, or for less than one of these."""
        self._quantum, self.token_pairs = quantum_tokens, token_pairs
        self._queue: dict[int, _Waiting] = {}  # requests that have no owner yet
        self._started: dict[int, deque[_Pending]] = {rank: deque() for rank in sorted(ranks)}
        self._pending = dict.fromkeys(self._started, 0)
        self._held = dict.fromkeys(self._started, 0)
        self._room = dict.fromkeys(self._started, 0)
        self._owner: dict[int, int] = {}
        self._tokens: dict[int, int] = {}  # of a request, held by its owner
        self._needs: dict[int, int] = {}  # positions of a request that has an owner, those to come included
        if not self._started or quantum_tokens < 1 or token_pairs < 1:
            raise ValueError(
                f"{len(self._started)} ranks, {quantum_tokens} tokens at a time, {token_pairs} pairs a token: "
                "1 or more of each"
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

    def room(self, rank: int) -> int:
        """Positions of the requests that it owns, those included that are not computed yet."""
        return self._room[rank]

    def owner(self, request: int) -> int | None:
        """None: it has not begun, or is not there."""
        return self._owner.get(request)

    def submit(self, request: int, tokens: int, done: int = 0, room: int = 0) -> None:
        """A request with `tokens` positions to compute, which will have `room` in all as far as that is known. One of
        which `done` are there already gets its owner now: the rank with the fewest tokens pending, of equals the one
        that holds fewest. Raises ValueError if the request is there, or for a number of tokens that cannot be."""
        if request in self._owner or request in self._queue or not 0 <= done <= tokens or not tokens:
            raise ValueError(f"request {request}: {done} of {tokens} tokens, or submitted twice")
        if not done:
            self._queue[request] = _Waiting(tokens, max(tokens, room))
            return
        rank = min(self._started, key=lambda each: (self._pending[each], self._held[each], each))
        self._take(request, rank, done, max(tokens, room))
        if done < tokens:
            self._append(_Pending(request, done, tokens), rank)

    def grown(self, request: int, tokens: int = 1) -> None:
        """Decode steps have added tokens."""
        rank = self._owner[request]
        self._tokens[request] += tokens
        self._held[rank] += tokens
        if (more := self._tokens[request] - self._needs[request]) > 0:
            self._needs[request] += more
            self._room[rank] += more

    def end(self, request: int) -> None:
        """It has finished or was cancelled; it need not be there any more."""
        self._queue.pop(request, None)
        rank = self._owner.pop(request, None)
        if rank is None:
            return
        self._held[rank] -= self._tokens.pop(request)
        self._room[rank] -= self._needs.pop(request)
        started = self._started[rank]
        for found in [each for each in started if each.request == request]:
            self._pending[rank] -= found.end - found.start
            started.remove(found)

    def draw(
        self,
        budget_tokens: int,
        busy: Mapping[int, int] | None = None,
        may_start: Callable[[Start], bool] = lambda start: True,
    ) -> list[Chunk]:
        """The next batch: again and again from the rank that has least to do in it, until the budget is full or there
        is nothing. Requests start, a few for each rank, as long as there is room. `busy`: what ranks have to do in
        this step besides, as chunk_cost counts. `may_start` takes the request's blocks if it says yes, and then sees to
        it that another one's KV is where the start moves it before the step; after a no nothing starts in this batch.

        While requests wait like that, a batch is small, the smaller the fewer ranks have prompts (crowded_budget). Few
        can start at a time then; computed at once, one rank would do all of the batch and the others wait for it. In
        small pieces prompts of several ranks meet in a batch, and come along with tokens that are decoded anyway.
        Chunks of one request are one."""
        batch = _Batch(self, budget_tokens, may_start)
        cost = {rank: (busy or {}).get(rank, 0) for rank in self._started}
        batch.begin()
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
        self._room = {rank: self._room.get(rank, 0) for rank in wanted}
        for request in sorted(orphans, key=lambda each: (-self._needs[each], each)):
            rank = min(wanted, key=lambda each: (self._room[each], each))
            self._take(request, rank, orphans[request], self._needs[request])
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
    def without_prompts(self) -> int:
        """Ranks without prompt tokens to compute."""
        return sum(not started for started in self._started.values())

    def next_start(self, drawn: Container[int]) -> Start | None:
        """None: no request waits. `drawn`: requests with tokens in this batch, which stay where they are."""
        looked_at = list(itertools.islice(self._queue.items(), LOOKED_AT))
        if looked_at and looked_at[0][1].overtaken >= OVERTAKEN_MAX:
            del looked_at[1:]
        waiting = (Sized(request, each.room) for request, each in looked_at)
        idle = [rank for rank, started in self._started.items() if not started]

        def decoded(rank: int) -> Iterator[Sized]:
            """Of a rank without prompts: all of its requests, if their prompts do not end in this very batch."""
            mine = (each for each, owner in self._owner.items() if owner == rank and each not in drawn)
            return (Sized(each, self._needs[each]) for each in mine)

        return choose_start(self._room, idle, waiting, decoded)

    def start(self, start: Start) -> None:
        for each, waiting in self._queue.items():
            if each == start.request:
                break
            waiting.overtaken += 1
        if start.moves is not None and start.target is not None:
            self._move(start.moves, start.target)
        started = self._queue.pop(start.request)
        self._take(start.request, start.rank, 0, started.room)
        self._append(_Pending(start.request, 0, started.tokens), start.rank)

    def _move(self, request: int, rank: int) -> None:
        source, needs = self._owner[request], self._needs[request]
        self._held[source] -= self._tokens[request]
        self._room[source] -= needs
        self._take(request, rank, self._tokens[request], needs)

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

    def _take(self, request: int, rank: int, tokens: int, needs: int) -> None:
        self._owner[request] = rank
        self._tokens[request] = tokens
        self._held[rank] += tokens
        self._needs[request] = needs
        self._room[rank] += needs

    def _append(self, each: _Pending, rank: int) -> None:
        self._started[rank].append(each)
        self._pending[rank] += each.end - each.start


class _Batch:
    """One batch while it is drawn."""

    def __init__(self, router: Router, budget_tokens: int, may_start: Callable[[Start], bool]) -> None:
        self.chunks: dict[int, Chunk] = {}
        self.left = budget_tokens
        self._router, self._may_start = router, may_start
        self._ranks = router.ranks
        self._refused = False

    def begin(self) -> None:
        """Starts what it can, and takes less if requests have to wait for room."""
        self.start_more()
        with_prompts = len(self._ranks) - self._router.without_prompts
        if self._refused and with_prompts:
            self.left = min(self.left, crowded_budget(self.left, with_prompts, len(self._ranks)))

    def add(self, rank: int) -> int:
        """Draws some tokens from a rank. Returns what they cost, 0 if it gives none."""
        head = self._router.head(rank)
        assert head is not None, "a rank that has nothing is not drawn from"
        piece = max(QUANTUM_TOKENS_MIN, self.left // (2 * len(self._ranks)))
        tokens = min(self._router.quantum_tokens, piece, self.left, head.end - head.start)
        before = self.chunks.get(head.request)
        start, had = (before.start, before.tokens) if before else (head.start, 0)
        self.chunks[head.request] = Chunk(head.request, rank, start, had + tokens)
        self._router.drawn(rank, tokens)
        self.left -= tokens
        pairs = self._router.token_pairs
        return chunk_cost(had + tokens, start, pairs) - chunk_cost(had, start, pairs)

    def start_more(self) -> set[int]:
        """Starts requests, each with the rank that has fewest tokens, until all ranks have something to compute.
        Returns their owners."""
        owners = set[int]()
        while not self._refused and self._router.started < STARTED_PER_RANK * len(self._ranks):
            start = self._router.next_start(self.chunks)
            if start is None:
                break
            if not self._may_start(start):
                self._refused = True
                break
            self._router.start(start)
            owners.add(start.rank)
        return owners
