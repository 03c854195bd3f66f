"""One group of up to eight ranks in virtual time: steps by the cost model, faults by a trace, decisions by
dataplane/core/ranks.

Requests wait in any number (offline): what is measured is tokens a second. A request takes the blocks of its whole
length when it starts, in all systems: nothing is preempted but by a loss of room."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.failsafe_model import BANDWIDTH, BLOCK_TOKENS, EXACT_SUM_BYTES, FLOAT_SUM_BYTES, Cost, Model, Work
from bench.failsafe_traces import Lengths
from dataplane.core.ranks.accounts import RankAccounts
from dataplane.core.ranks.routing import Router
from dataplane.core.ranks.starting import Start
from kernels.ranks.layout import Layout, Shape, first_layout

BUDGET_TOKENS = 8192  # of a step
QUEUE_PER_RANK = 4  # requests that wait for each rank: enough for a batch that is drawn from all of them
RUNNING_MAX = 512  # requests at a time


@dataclass(slots=True)
class Request:
    number: int
    prompt: int
    output: int
    computed: int = 0  # positions
    # Positions that are computed as a prompt before the next token: prompt, and what was recomputed.
    wanted: int = 0
    generated: int = 0
    joined: int = -1  # the decode step at which `generated` was right; -1: not decoding


@dataclass(slots=True)
class Served:
    """Tokens that were computed and kept: what a loss takes away is subtracted, what is computed again is added
    again."""

    tokens: int = 0
    # By bin of time: prompt and output of requests that ended.
    completed: dict[int, int] = field(default_factory=dict)
    # Seconds, fullest against emptiest rank.
    kv_spread: list[tuple[float, float]] = field(default_factory=list)
    compute_s: float = 0.0  # of the slowest ranks, over all steps ...
    compute_mean_s: float = 0.0  # ... and in the mean over ranks


class Queue:
    """Requests of a trace, again and again; those that come back are first."""

    def __init__(self, lengths: Sequence[Lengths]) -> None:
        self._lengths, self._next = lengths, 0
        self._back: list[int] = []

    def take(self) -> Request:
        if self._back:
            number = heapq.heappop(self._back)
        else:
            number, self._next = self._next, self._next + 1
        lengths = self._lengths[number % len(self._lengths)]
        return Request(number, lengths.prompt, lengths.output, wanted=lengths.prompt)

    def put_back(self, number: int) -> None:
        heapq.heappush(self._back, number)


class Engine:
    """What serves: one layout and the requests in it. `bin_s`: of Served.completed."""

    def __init__(self, model: Model, queue: Queue, served: Served, exact: bool, bin_s: float = 60.0) -> None:
        self.model, self.queue, self.served = model, queue, served
        self.sum_bytes = EXACT_SUM_BYTES if exact else FLOAT_SUM_BYTES
        self.requests: dict[int, Request] = {}  # that are with the router
        self._bin_s = bin_s
        self.moved_bytes = 0
        self._decode_steps = 0
        self._ends: dict[int, list[int]] = {}  # by decode step
        self._decoding: dict[int, list[int]] = {}  # by rank: requests, and positions that they read
        # Positions that the last step computed, of requests in their prompt.
        self.last_step: dict[int, int] = {}

    def start(self, ranks: int) -> bool:
        """A fresh group of so many ranks. False: the model does not fit."""
        self.serve(first_layout(Shape(self.model.layers, self.model.kv_heads, self.model.shards), ranks))
        return self.cost.fits

    def serve(self, layout: Layout, router: Router | None = None) -> None:
        """Without requests that have KV; `router` may have some that wait."""
        self.layout = layout
        self.cost = Cost(self.model, layout, self.sum_bytes)
        self.router = router or Router(layout.ranks, token_pairs=self.cost.token_pairs)
        self.account = RankAccounts(layout, dict.fromkeys(layout.ranks, self.cost.blocks()))
        self._decoding = {rank: [0, 0] for rank in layout.ranks}
        self._ends.clear()

    # ------------------------------------------------------------------ a step

    def step(self, now: float, until: float) -> float:
        """One step, or many where nothing but decoding goes on. Returns when it ends; `until` if there is nothing."""
        self._top_up()
        # What decoding tokens read takes the memory's time, whoever computes prompts: only their products count.
        busy = {rank: count * self.cost.token_pairs for rank, (count, _) in self._decoding.items()}
        decoding = sum(count for count, _ in self._decoding.values())
        self.moved_bytes = 0
        chunks = self.router.draw(max(0, BUDGET_TOKENS - decoding), busy, self._may_start)
        moved_bytes, self.moved_bytes = self.moved_bytes, 0
        if not chunks and not decoding:
            return until
        count = 1 if chunks else self._steps_alike(now, until)
        owned = {
            rank: Work(requests, read=read + requests * count // 2)
            for rank, (requests, read) in self._decoding.items()
        }
        sampled = decoding
        for chunk in chunks:
            pairs = chunk.tokens * chunk.start + chunk.tokens * (chunk.tokens + 1) / 2
            owned[chunk.rank].add(chunk.tokens, pairs)
            request = self.requests[chunk.request]
            sampled += request.computed + chunk.tokens == request.wanted
        step = self.cost.step(owned, sampled)
        now += step.seconds * count + moved_bytes / BANDWIDTH.peer
        self.served.kv_spread.append((step.seconds * count, self.account.spread()))
        self.served.compute_s += step.compute_s * count
        self.served.compute_mean_s += step.compute_mean_s * count
        self._decoded(count, now)
        self.last_step.clear()
        for chunk in chunks:
            request = self.requests[chunk.request]
            request.computed += chunk.tokens
            self.served.tokens += chunk.tokens
            self.last_step[chunk.request] = chunk.tokens
            if request.computed == request.wanted:
                self._decode(request, now)
        return now

    def _top_up(self) -> None:
        for _ in range(QUEUE_PER_RANK * len(self.layout.ranks) - self.router.waiting):
            request = self.queue.take()
            self.requests[request.number] = request
            self.router.submit(request.number, request.wanted, room=request.prompt + request.output)

    def _may_start(self, start: Start) -> bool:
        request = self.requests[start.request]
        running = len(self.requests) - self.router.waiting
        blocks = blocks_of(request.prompt + request.output)
        if running >= RUNNING_MAX or not self.account.begin(start, blocks):
            return False
        if start.moves is not None and start.target is not None:
            self._move(self.requests[start.moves], start.target)
        return True

    def _move(self, request: Request, rank: int) -> None:
        """A request that is decoded gets another owner: its data-parallel heads' KV goes there before the next step."""
        self._catch_up(request)
        for owner, sign in ((self.owner(request.number), -1), (rank, 1)):
            self._decoding[owner][0] += sign
            self._decoding[owner][1] += sign * request.computed
        self.moved_bytes += self.cost.moved_bytes(request.computed)

    def _steps_alike(self, now: float, until: float) -> int:
        """Decode steps until a request ends, or something happens outside."""
        owned = {rank: Work(count, read=read) for rank, (count, read) in self._decoding.items()}
        seconds = self.cost.step(owned, 1).seconds
        first = min(self._ends) - self._decode_steps
        return max(1, min(first, int((until - now) / seconds)))

    def _decode(self, request: Request, now: float) -> None:
        """Its prompt is there, and so is its next token, unless it was there before a loss."""
        if not request.generated:
            request.generated = 1
            self.served.tokens += 1
        if request.generated >= request.output:
            self._end(request, now)
        else:
            self._join(request)

    def _join(self, request: Request) -> None:
        request.joined = self._decode_steps
        state = self._decoding[self.owner(request.number)]
        state[0] += 1
        state[1] += request.computed
        self._ends.setdefault(self._decode_steps + request.output - request.generated, []).append(
            request.number
        )

    def _decoded(self, count: int, now: float) -> None:
        self._decode_steps += count
        for state in self._decoding.values():
            state[1] += count * state[0]
            self.served.tokens += count * state[0]
        for number in self._ends.pop(self._decode_steps, ()):
            request = self.requests[number]
            state = self._decoding[self.owner(number)]
            self._catch_up(request)
            state[0] -= 1
            state[1] -= request.computed
            self._end(request, now)

    def owner(self, number: int) -> int:
        """Of a request that has begun."""
        owner = self.router.owner(number)
        assert owner is not None
        return owner

    def _catch_up(self, request: Request) -> None:
        steps = self._decode_steps - request.joined
        request.generated += steps
        request.computed += steps
        self.router.grown(request.number, steps)
        request.joined = self._decode_steps

    def _end(self, request: Request, now: float) -> None:
        del self.requests[request.number]
        self.account.release(request.number)
        self.router.end(request.number)
        place = int(now / self._bin_s)
        total = request.prompt + request.output
        self.served.completed[place] = self.served.completed.get(place, 0) + total

    # ------------------------------------------------------------------ other ranks

    def running(self) -> list[Request]:
        """Those that have KV, oldest first. They do not go on before `change` or `start`."""
        for request in self.requests.values():
            if request.joined >= 0:
                self._catch_up(request)
                request.joined, request.wanted = -1, request.computed
        return sorted(
            (each for each in self.requests.values() if each.computed), key=lambda each: each.number
        )

    def on_shelf(self, request: Request) -> int:
        """Blocks whose copies are on the shelf, if all but the last step's are."""
        return (request.computed - self.last_step.get(request.number, 1)) // BLOCK_TOKENS

    def change(self, layout: Layout, resume: Mapping[int, int]) -> int:
        """Go on in another layout, each request behind the blocks that are there; owners are the router's. Requests
        without room begin again, the youngest first. Returns how many do."""
        running = self.running()
        self.serve(layout, self.router)
        without_room = 0
        for request in running:
            number, owner = request.number, self.owner(request.number)
            blocks = blocks_of(request.prompt + request.output)
            if not self.account.can_take(owner, blocks) or not resume[number]:
                without_room += bool(resume[number])
                self.give_up(request)
                continue
            self.account.take(number, owner, blocks)
            keep = resume[number] * BLOCK_TOKENS
            if resume[number] < request.computed // BLOCK_TOKENS:
                self.served.tokens -= request.computed - keep
                request.computed = keep
                self.router.rewind(number, keep)
            elif request.generated and request.computed == request.wanted:
                self._join(request)
        for request in [each for each in self.requests.values() if not each.computed]:
            # One that has an owner and no tokens yet needs room here as well.
            mine, blocks = self.router.owner(request.number), blocks_of(request.prompt + request.output)
            if mine is not None and not self.account.begin(Start(request.number, mine), blocks):
                self.give_up(request)
        return without_room

    def give_up(self, request: Request) -> None:
        """It begins again, some time: what was computed of it counts no longer."""
        self.served.tokens -= request.computed + (request.generated > 0)
        self.router.end(request.number)
        self.account.release(request.number)
        self.queue.put_back(request.number)
        del self.requests[request.number]

    def give_up_all(self) -> None:
        self.running()
        for request in list(self.requests.values()):
            self.give_up(request)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
