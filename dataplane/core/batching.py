"""Which rows the next step computes: running requests first, then prompts in chunks, then who waits.

Every request has the KV blocks it needs in the pipeline's account before it is given rows; all stages hold the same
blocks, so the scheduler's account is every stage's. What is cached of its prompt is not computed again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from controlplane.contract.config import EngineConfig, Speculation
from controlplane.contract.repair import Computing
from dataplane.core.account import Account
from dataplane.core.request import Phase, Request
from dataplane.core.speed import CHUNK_MIN, ONCE_MULTIPLE, STEP_MULTIPLE, StepSpeed

# Tokens of a prompt, for each row that a step takes before rows cost time: a chunk this long computes more than it
# reads, so to halve a longer one costs little.
CHUNK_ROWS = 16

# Of logits that a step has for log probabilities of prompts, 4 bytes a token of the vocabulary.
SCORED_BYTES = 64 << 20

Chunk = tuple[Request, int]  # that many tokens of a request, from `issued` on


@dataclass(frozen=True, slots=True)
class Limits:
    block_size: int  # tokens
    max_batch_tokens: int  # rows of one step
    max_running: int
    max_waiting: int
    context_len: int  # tokens, prompt and output
    orphan_grace_s: float
    vocab_size: int = 1 << 31  # token ids are below it
    rows_min: int = 4  # so few rows cost what one costs: while all have places they are not split
    request_bytes: int = 1 << 30  # that requests keep beside their KV; more are refused
    step_target_s: float = 0.0  # what a step may take while somebody reads along; 0: as StepSpeed finds
    prefix_caching: bool = True
    speculation: Speculation = "off"
    max_draft_tokens: int = 8  # of a request in a step

    @classmethod
    def from_config(
        cls, engine: EngineConfig, context_len: int, orphan_grace_s: float, vocab_size: int
    ) -> Limits:
        return cls(
            engine.block_size,
            engine.max_batch_tokens,
            engine.max_running,
            engine.max_waiting,
            context_len,
            orphan_grace_s,
            vocab_size,
            engine.rows_min,
            engine.request_bytes,
            engine.step_target_s,
            engine.prefix_caching,
            engine.speculation,
            engine.max_draft_tokens,
        )

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def scored_rows(self) -> int:
        """Tokens of prompts whose log probabilities are asked for that a step may have: each needs a row of logits."""
        return max(16, SCORED_BYTES // (4 * self.vocab_size))


def _even(tokens: int, most: int) -> int:
    """Tokens of a chunk, at most `most`, so that all chunks are of one size: the last one, however short, follows the
    others through the stages at their pace, so what they have more than it is waited for."""
    if most <= 0:
        return 0
    return most if tokens <= most else -(-tokens // -(-tokens // most))


def _alike(names: list[bytes], others: list[bytes]) -> int:
    """How many of them, from the first on, are equal."""
    count = 0
    while count < min(len(names), len(others)) and names[count] == others[count]:
        count += 1
    return count


class Batcher:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.microbatches = 1  # that the pipeline's stages can compute at the same time
        self.rows_max = limits.max_batch_tokens  # of a step; fewer while the stages seem too slow
        self.shared = 1  # pipelines among which the busiest of its nodes divides its time
        self.account = Account(keeps=limits.prefix_caching)
        self.running: dict[int, Request] = {}  # in order of admission
        self._waiting: list[tuple[int, int, int]] = []  # heap of (priority, order, rid)
        self._queued: dict[int, Request] = {}
        self.speed = StepSpeed(limits.step_target_s)
        self._turn = 0  # steps whose rows were chosen
        self._scored_left = 0  # rows of logits that this step has room for
        self._prompts_turn = False  # where a step has one row, decodes and prompts take turns

    @property
    def quota_blocks(self) -> int:
        return self.account.quota

    @quota_blocks.setter
    def quota_blocks(self, blocks: int) -> None:
        self.account.set_quota(blocks)

    @property
    def computing(self) -> Computing:
        """How fast what was lost is computed again."""
        speed = self.speed
        chunk = speed.chunk_tokens(1, self.limits.max_batch_tokens, ONCE_MULTIPLE, lost=True)
        return Computing(speed.step_s, speed.token_s, speed.pace_s, chunk)

    @property
    def used_blocks(self) -> int:
        return self.account.used

    @property
    def max_waiting(self) -> int:
        """Requests that may queue: as long in time as when nobody else's work is done on its nodes."""
        return max(1, self.limits.max_waiting // self.shared)

    @property
    def waiting(self) -> int:
        return len(self._queued)

    def enqueue(self, request: Request) -> None:
        self._release(request)
        request.phase = Phase.WAITING
        self._queued[request.rid] = request
        heapq.heappush(self._waiting, (request.priority, request.order, request.rid))
        if len(self._waiting) > 2 * len(self._queued) + 64:  # entries of requests that were cancelled
            self._waiting = [(r.priority, r.order, r.rid) for r in self._queued.values()]
            heapq.heapify(self._waiting)

    def never_fits(self) -> list[Request]:
        """Waiting requests that the quota, as it is now, could not hold even alone."""
        return [r for r in self._queued.values() if self.limits.blocks_for(r.total + 1) > self.quota_blocks]

    def remove(self, request: Request) -> None:
        """The request is no longer here to run, whether it ran or waited."""
        self._queued.pop(request.rid, None)
        self._release(request)

    def adopt(self, request: Request, position: int) -> bool:
        """Run a request of which the stages already hold so many positions. False when the quota has no room for it."""
        names = request.names[: position // self.limits.block_size]
        # Asked first: what it had to give back at once would be cached here, while stages are told to drop it.
        needed = self.account.needed(names, self.limits.blocks_for(request.total))
        if len(self.running) >= self.limits.max_running or needed > self.account.available:
            return False
        if not (self.account.adopt(request.rid, names) and self._reserve(request, request.total)):
            raise AssertionError(f"request {request.rid:x} does not fit where there was room for it")
        self.running[request.rid] = request
        request.interrupted = True
        return True

    def unblock(self, before: float) -> None:
        """Try again those whose grammars have been waited for since `before`."""
        for request in self.running.values():
            if request.blocked_at is not None and request.blocked_at < before:
                request.unblock()

    def reserve_drafts(self, request: Request, count: int) -> int:
        """For how many of so many drafts behind its log the request has blocks. Nobody makes room for them."""
        while count > 0 and not self._reserve(request, request.total + count):
            count -= 1
        return max(0, count)

    def preempt_until_fits(self) -> list[Request]:
        """The requests, youngest first, that must give their blocks back for the quota to hold."""
        victims = []
        while self.account.available < 0 and self.running:
            victims.append(self._preempt_youngest())
        return victims

    def next_rows(self, admit: bool, in_flight: int) -> tuple[list[Chunk], list[Request]]:
        """Rows for the next step, and the requests preempted to make room. Never more than `rows_max` rows.

        Decodes and chunks of prompts share a step. Decodes are spread over no more microbatches than their rows are
        worth: few wait for the others to come back, and go on with them. Neither a prompt nor most of the decodes wait
        for anybody while one more microbatch can compute.
        """
        decodes: list[Request] = []
        prompts: list[Request] = []
        for request in self.running.values():
            left = request.total - request.issued
            if left > 0:
                (decodes if left == 1 else prompts).append(request)
        new = admit and bool(self._queued)
        # More wait than there are places. They wait for decodes to end, so what counts is how much the stages get done,
        # and that is the most when all of them always have a step, and steps are alike.
        short = len(self._queued) > self.limits.max_running - len(self.running)
        # Whose tokens a step may have besides decodes.
        coming = [*prompts, *(self._queued.values() if new and self._admissible() is not None else ())]
        decodes_max = self._decodes_max(bool(coming))
        decoding = len(self.running) - len(prompts)  # also those whose last token is on its way
        useful = max(1, -(-len(self.running) // self.limits.rows_min), -(-decoding // max(1, decodes_max)))
        worth = self.microbatches if short else min(self.microbatches, useful)
        at_once = bool(prompts) or new or 2 * len(decodes) > len(self.running)
        most = self.microbatches if at_once else worth
        rows: list[Chunk] = []
        preempted: list[Request] = []
        if in_flight >= most:
            return rows, preempted
        self._turn += 1
        self._scored_left = self.limits.scored_rows
        # Decodes first: they are one row each, and somebody reads along.
        share = min(-(-decoding // worth), decodes_max)
        if share < len(decodes):  # who waits longest is next
            decodes.sort(key=lambda r: r.turn)
        for request in decodes[:share]:
            self._take(request, 1, rows, preempted)
        pending = sum(r.total - r.issued for r in prompts) + (
            sum(r.total for r in self._queued.values()) if new else 0
        )
        chunk = max(CHUNK_ROWS * self.limits.rows_min, -(-pending // (most - in_flight)))
        if rows and short:
            chunk = self._spread(prompts)
        room = min(self.rows_max - len(rows), chunk)
        reading = any(r.output for r in self.running.values()) or any(r.output for r in coming)
        budget = 0
        if pending:
            budget = _even(pending, self._paced(room, len(rows), in_flight, reading))
        if lost := sum(r.total - r.issued for r in coming if r.lost):
            tails = _even(lost, self._paced(room, len(rows), in_flight, reading, lost=True))
            budget = max(budget, min(lost, tails))
        # Who has been reading already goes before who waits for a first token: after a recovery that is all who were
        # interrupted, those with the least to recompute first.
        prompts.sort(key=lambda r: (0, r.total - r.issued) if r.output else (1, 0))
        for request in prompts:
            budget -= self._take(request, budget, rows, preempted)
        if new and not preempted:
            self._admit(rows, budget)
        return rows, preempted

    def _decodes_max(self, beside_prompts: bool) -> int:
        """Rows of a step for decodes; a quarter of it is for prompts, if there are any, however many decode."""
        rows = self.rows_max
        if not beside_prompts:
            return rows
        if rows == 1:
            self._prompts_turn = not self._prompts_turn
            return 0 if self._prompts_turn else 1
        return rows - max(1, rows // 4)

    def _paced(self, room: int, decodes: int, in_flight: int, reading: bool, *, lost: bool = False) -> int:
        """How many tokens of prompts a step with so many decodes may have, out of `room`: while somebody reads along,
        what keeps the step short. Readers of other pipelines wait for it, too, where they share a node. Whose whole
        prompt is in flight soon reads along, and waits for all steps in front of its second token: one of whole prompts
        is worth the others' first tokens, three were not."""
        reading = reading or self.shared > 1
        started = any(request.issued >= request.total for request in self.running.values())
        if room <= 0 or not (reading or (in_flight > 1 and started)):
            return room
        multiple = STEP_MULTIPLE if reading and not lost else ONCE_MULTIPLE
        tokens = self.speed.chunk_tokens(decodes, room, multiple, lost=lost)
        if self.speed.unproved and (decodes or started):  # otherwise there is nothing to measure
            tokens = 0
        return tokens if decodes or in_flight else max(tokens, min(room, CHUNK_MIN))

    def _admissible(self) -> Request | None:
        """Who waits and is next, if there is a place and there are blocks for the whole prompt and one more token: a
        prompt is not begun to be preempted half-way."""
        while self._waiting and self._waiting[0][2] not in self._queued:
            heapq.heappop(self._waiting)
        if not self._waiting or len(self.running) >= self.limits.max_running:
            return None
        request = self._queued[self._waiting[0][2]]
        need = self.account.needed(request.shareable, self.limits.blocks_for(request.total + 1))
        return request if need <= self.account.available else None

    def _spread(self, prompts: list[Request]) -> int:
        """Tokens of prompts for a step where each prompt goes with the decodes of all microbatches in turn, not with
        those of one, which the others would wait for."""
        tokens = sum(r.total for r in prompts)
        if len(self.running) < self.limits.max_running:
            head = self._queued.get(self._waiting[0][2])
            tokens += head.total if head is not None else 0
        return max(1, -(-tokens // self.microbatches))

    def _take(self, request: Request, budget: int, rows: list[Chunk], preempted: list[Request]) -> int:
        """Add up to `budget` tokens of a running request to the rows of a step; returns how many."""
        count = self._chunk_of(request, budget)
        if count <= 0 or request.rid not in self.running:  # preempted a moment ago
            return 0
        while not self._reserve(request, request.issued + count):
            victim = self._preempt_youngest()
            preempted.append(victim)
            rows[:] = [row for row in rows if row[0] is not victim]
            if victim is request:
                return 0
        request.turn = self._turn
        self._add(request, count, rows)
        return count

    def _admit(self, rows: list[Chunk], budget: int) -> None:
        while budget > 0 and (request := self._admissible()) is not None:
            if request.scoring and not self._scored_left:
                break
            if self._computed_beside(request, rows):
                break  # the next step finds these blocks
            found = self.account.begin(request.rid, request.shareable)
            self._reserve(request, request.total + 1)
            heapq.heappop(self._waiting)
            del self._queued[request.rid]
            request.phase = Phase.RUNNING
            request.issued = request.cached = found * self.limits.block_size
            self.running[request.rid] = request
            count = self._chunk_of(request, budget)
            request.turn = self._turn
            self._add(request, count, rows)
            budget -= count

    def _chunk_of(self, request: Request, budget: int) -> int:
        """How many tokens of a running request a step has that may have so many."""
        count = min(request.total - request.issued, budget)
        return min(count, self._scored_left) if request.scoring else count

    def _add(self, request: Request, count: int, rows: list[Chunk]) -> None:
        rows.append((request, count))
        if request.scoring:
            self._scored_left -= count

    def _computed_beside(self, request: Request, rows: list[Chunk]) -> bool:
        """Whether this step's rows compute what is at least half of the work that a request has: choices of one prompt
        come together. In the next step it begins with those blocks."""
        names, size = request.shareable, self.limits.block_size
        if not self.limits.prefix_caching or 2 * size > request.total:
            return False
        found = self.account.found(names)
        if found == len(names):
            return False
        for other, count in rows:
            if count == 1 or other.hasher.block_size != size:
                continue
            first, last = other.issued // size, (other.issued + count - 1) // size
            if first <= found <= last and other.names[found : found + 1] == [names[found]]:
                shared = _alike(names, other.names) - found
                return 2 * shared * size >= request.total - found * size
        return False

    def _reserve(self, request: Request, tokens: int) -> bool:
        return self.account.grow(request.rid, self.limits.blocks_for(tokens))

    def _release(self, request: Request) -> None:
        self.running.pop(request.rid, None)
        self.account.release(request.rid)

    def _preempt_youngest(self) -> Request:
        victim = max(self.running.values(), key=lambda r: (r.priority, r.order))
        self._release(victim)
        return victim
