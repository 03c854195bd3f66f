"""Which requests of a step get drafts, and how many: only so many as make the step bring more tokens a second.

A draft costs a row of the step and brings a token if all drafts before it and itself are what is drawn. How often that
happens is measured for each request, what rows cost for the pipeline; both from what has run, so that nobody has to
know the hardware, the model or the text. Where a step is full already, rows cost as much as they bring, and there are
no drafts.

Drafts decide how fast tokens come and never which: the last stage draws at each position as if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dataplane.core.batching import Batcher, Chunk, Limits
from dataplane.core.request import Request
from dataplane.core.stats import SchedulerStats
from dataplane.core.steps import NO_DRAFTS, InFlight

# What a step has to bring more than without drafts, for it to have any: estimates err, and drafts cost time that no
# step shows.
GAIN_MIN = 1.05
# Of one more row, as a share of a step of one row, while nothing has been measured: weights are read once a step.
ROW_SHARE = 1 / 24
BRINGS_MIN = 0.02  # tokens; a draft of which less is expected is not weighed up
ROW_SHARE_WEIGHT = 8.0  # of that guess, against measurements: rows, squared
COST_DECAY = 0.98  # of a measurement with each later one
LATE = 3.0  # times as long as expected: something else was the reason, and it counts as no more
RATE_DECAY = 0.9  # of what was seen of a request's drafts, with each later step
RATE_START, RATE_WEIGHT = (
    0.6,
    2.0,
)  # how often the first drafts of a request are right, and drafts that this counts as
# Of a step's time: what a draft model may take for the prompts of requests, until it is as far as they are.
CATCH_UP_SHARE = 0.2
# A draft model that was wrong is asked again for a request after so many of its tokens, as if little were known.
RETRY_AFTER = 32
RETRY_WEIGHT = 1.0
# After a step of so many rows without drafts nobody weighs them up for so many steps, twice as many the next time, and
# so on; in so many of these a request's would-be draft is compared. With many rows each of the two would take a part of
# a step that is not small. With far fewer rows than then they may pay: they are weighed up at once.
IDLE_ROWS, IDLE_STEPS, IDLE_STEPS_MAX, IDLE_PROBES = 8, 16, 64, 4
IDLE_ROWS_PART = 0.75


class Proposer(Protocol):
    """Drafts for requests. What it keeps of them is a cache of their logs."""

    def pass_s(self, requests: int) -> float:
        """Seconds that one more draft for each of so many takes; 0: next to nothing."""
        ...

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        """For each request up to `count` tokens that may come after its log. May be less, or none. `within_s`: how long
        it may take to get as far as the logs are, about; who is not there then has none."""
        ...

    def forget(self, rid: int) -> None:
        """The request has ended, or its log is another one."""
        ...


@dataclass(slots=True)
class Rate:
    """How often a request's drafts are right, the newest ones counting most."""

    right: float = RATE_START * RATE_WEIGHT
    tried: float = RATE_WEIGHT
    tried_at: int = 0  # length of its log when it last had drafts, or was to have some again

    @property
    def value(self) -> float:
        return self.right / self.tried

    def saw(self, right: int, tried: int) -> None:
        """Of drafts in a row so many were right. Those behind a wrong one were not tried."""
        if tried <= 0:
            return
        self.right = RATE_DECAY * self.right + right
        self.tried = RATE_DECAY * self.tried + min(tried, right + 1)


class StepCost:
    """What a step of decodes takes, by its rows: a line through what was measured lately."""

    def __init__(self) -> None:
        self._weight = self._rows = self._took = self._rows_rows = self._rows_took = 0.0

    def ran(self, rows: int, took_s: float) -> None:
        """A step of so many rows, drafts included, and no prompt took so long from its launch to its result."""
        if rows < 1 or took_s <= 0:
            return
        if self._weight > 4:
            took_s = min(took_s, LATE * self.seconds(rows))
        for name in ("_weight", "_rows", "_took", "_rows_rows", "_rows_took"):
            setattr(self, name, COST_DECAY * getattr(self, name))
        self._weight += 1
        self._rows += rows
        self._took += took_s
        self._rows_rows += rows * rows
        self._rows_took += rows * took_s

    def seconds(self, rows: float) -> float:
        """Of a step of so many rows; in units of one of a single row while nothing is known."""
        fixed, of_row = self.line()
        return fixed + of_row * rows

    def line(self) -> tuple[float, float]:
        """The fixed part of a step, and what a row adds."""
        if self._weight <= 0:
            return 1.0 - ROW_SHARE, ROW_SHARE
        mean_rows, mean_took = self._rows / self._weight, self._took / self._weight
        spread = max(0.0, self._rows_rows - self._weight * mean_rows**2)
        together = self._rows_took - self._weight * mean_rows * mean_took
        guess = ROW_SHARE * mean_took / (1.0 + ROW_SHARE * (mean_rows - 1.0))
        of_row = (together + ROW_SHARE_WEIGHT * guess) / (spread + ROW_SHARE_WEIGHT)
        of_row = min(max(of_row, 0.0), mean_took / mean_rows)
        return mean_took - of_row * mean_rows, of_row


def draft_counts(
    rates: Sequence[float], draft_max: Sequence[int], rows: int, cost: StepCost, pass_s: float = 0.0
) -> list[int]:
    """How many drafts each of a step's requests is to have: as many as bring the most tokens a second.

    `rates`: how often a draft of each is right; `draft_max`: how many each may have; `rows`: of the step without
    drafts, each of which brings a token; `pass_s`: of making the k-th draft of all.

    The k-th draft brings rate**k tokens, and all cost a row, so the best ones are taken first, and as many of them as
    the step is fastest with."""
    counts = [0] * len(rates)
    likeliest = max((rate for rate, most in zip(rates, draft_max, strict=True) if most > 0), default=0.0)
    fixed, of_row = cost.line()
    least = fixed + of_row * rows
    plain = rows / least
    # Each row costs the same: if the first does not pay, none does.
    if (rows + likeliest) / (least + of_row) <= plain:
        return counts
    wanted = sorted(
        (
            (rate**depth, -depth, i)
            for i, rate in enumerate(rates)
            for depth in range(1, draft_max[i] + 1)
            if rate**depth >= BRINGS_MIN
        ),
        reverse=True,
    )
    tokens, depth_max, best, taken = float(rows), 0, GAIN_MIN * plain, 0
    for number, (brings, depth, _) in enumerate(wanted, 1):
        tokens, depth_max = tokens + brings, max(depth_max, -depth)
        speed = tokens / (least + of_row * number + pass_s * depth_max)
        if speed > best:
            best, taken = speed, number
        elif brings < speed * of_row:
            break  # it brings less for its row than all so far do, and those behind it still less
    for _, _, i in wanted[:taken]:
        counts[i] += 1
    return counts


class Speculator:
    """The drafts of one pipeline's steps."""

    def __init__(self, limits: Limits, proposer: Proposer | None, stats: SchedulerStats) -> None:
        """`proposer`: where the limits ask for a draft model."""
        self.cost = StepCost()
        self._context_len = limits.context_len
        self._draft_max, self._rows_max = limits.max_draft_tokens, limits.max_batch_tokens
        self._stats = stats
        if proposer is None and limits.speculation == "ngram":
            proposer = NgramProposer()
        self._proposer = proposer if limits.speculation != "off" else None
        self._rates: dict[int, Rate] = {}
        self.probes: dict[int, int] = {}  # request -> the token that would have been drafted
        self._turn = 0  # of probes
        self._idle = 0  # steps for which nothing is weighed up any more
        self._idle_steps = IDLE_STEPS  # of the present such stretch, or the next one
        self._idle_rows = 0  # of the step that began it

    def drafts(self, rows: Sequence[Chunk], batcher: Batcher) -> Mapping[int, Sequence[int]]:
        """What may come after the last tokens of a step's rows, by request; its blocks are reserved. A step with a
        chunk of a prompt has none: it is full already."""
        proposer = self._proposer
        if proposer is None or not rows:
            return NO_DRAFTS
        if self._idle and len(rows) >= max(IDLE_ROWS, IDLE_ROWS_PART * self._idle_rows):
            self._idle -= 1
            if self._idle % (self._idle_steps // IDLE_PROBES) == 0:
                self._probe(proposer, rows)
            return NO_DRAFTS
        if any(request.issued + count < request.total or not request.output for request, count in rows):
            return NO_DRAFTS
        requests = [request for request, _ in rows]
        room = [min(self._draft_max, request.draft_room(self._context_len)) for request in requests]
        rates = [self._rates.setdefault(request.rid, Rate(tried_at=request.total)) for request in requests]
        used, pass_s = sum(count for _, count in rows), proposer.pass_s(len(rows))
        if pass_s:
            for request, rate in zip(requests, rates, strict=True):
                if request.total - rate.tried_at >= RETRY_AFTER:
                    rate.right, rate.tried, rate.tried_at = (
                        RATE_START * RETRY_WEIGHT,
                        RETRY_WEIGHT,
                        request.total,
                    )
        counts = draft_counts([rate.value for rate in rates], room, used, self.cost, pass_s)
        chosen = [i for i, count in enumerate(counts) if count]
        left = max(0, self._rows_max - used)
        if not chosen or not left:
            fewer = len(rows) < IDLE_ROWS_PART * self._idle_rows
            self._idle_steps = IDLE_STEPS if fewer else min(2 * self._idle_steps, IDLE_STEPS_MAX)
            self._idle, self._idle_rows = self._idle_steps, len(rows)
            self._probe(proposer, rows)
            return NO_DRAFTS
        self._idle, self._idle_steps, self._idle_rows = 0, IDLE_STEPS, 0
        found: dict[int, Sequence[int]] = {}
        within_s = CATCH_UP_SHARE * self.cost.seconds(used)
        proposed = proposer.propose([requests[i] for i in chosen], max(counts), within_s)
        for i, tokens in zip(chosen, proposed, strict=True):
            rates[i].tried_at = requests[i].total
            count = batcher.reserve_drafts(requests[i], min(len(tokens), counts[i], left))
            if count:
                found[requests[i].rid] = tokens[:count]
                left -= count
                self._stats.spec_decode_num_drafts += 1
                self._stats.spec_decode_num_draft_tokens += count
        if len(chosen) < len(rows):
            self._probe(proposer, rows, found)
        return found

    def _probe(
        self, proposer: Proposer, rows: Sequence[Chunk], drafted: Mapping[int, Sequence[int]] = NO_DRAFTS
    ) -> None:
        """What one of the others would have had is compared with what comes, so that it is known when drafts pay again.
        Not where that would take a pass of a model."""
        self._turn += 1
        request = rows[self._turn % len(rows)][0]
        if proposer.pass_s(1) or request.rid in drafted or not request.draft_room(self._context_len):
            return
        if tokens := proposer.propose([request], 1, 0.0)[0]:
            self.probes[request.rid] = tokens[0]

    def verified(self, rid: int, drafts: int, tokens: Sequence[int]) -> None:
        """A step has brought these tokens for a request that had so many drafts in it."""
        rate = self._rates.get(rid)
        probe = self.probes.pop(rid, None)
        if rate is None or not tokens:
            return
        if drafts:
            self._stats.spec_decode_num_accepted_tokens += len(tokens) - 1
            rate.saw(len(tokens) - 1, drafts)
        elif probe is not None:
            rate.saw(int(probe == tokens[0]), 1)

    def forget(self, rid: int) -> None:
        self._rates.pop(rid, None)
        self.probes.pop(rid, None)
        if self._proposer is not None:
            self._proposer.forget(rid)

    def ran(self, flight: InFlight, now: float) -> None:
        """A step has come back."""
        if self._proposer is not None and not flight.prompt_tokens and not flight.beside_chunk:
            self.cost.ran(flight.decodes, now - flight.since)


class NgramProposer:
    """Drafts from each request's own log."""

    def pass_s(self, requests: int) -> float:
        return 0.0

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        return [request.ngrams_after(count) for request in requests]

    def forget(self, rid: int) -> None:
        """What it knows of a request is with the request."""
