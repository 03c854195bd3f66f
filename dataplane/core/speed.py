"""How long steps take, and so how many tokens of prompts one may have while somebody reads along.

A step is taken to last a fixed time and a time for each of its tokens, decoded ones and those of prompts alike. The
fixed part is seen in steps that only decode, the part for a token in those with a chunk of a prompt. Both are medians,
since other work on the same cores makes single steps late. Times are those that the scheduler sees, from the launch of
a step to its result: all stages, links and the sampler are in them.

Chunks are rare, and decode steps are not: a chunk was often measured minutes ago, on cores that had more or less to do.
So what a token costs is kept as a share of a decode step of that time, which changes little: many are kept. A chunk
counts by its tokens, since of a short one on a busy machine only the lateness is seen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

from controlplane.contract.repair import middle

# Of a step that only decodes: what a step with a chunk may take, where no time is set. Readers are to wait at most 2.5
# times as long as usual (p99), and steps come late without any chunk, too.
STEP_MULTIPLE = 1.5
# The same where it happens to a reader once: before its second token, and in a step that computes again what was lost
# in a failure. There all wait, and the last one waits for the fixed part of every step before its own, so few long
# steps are over sooner than many short ones.
ONCE_MULTIPLE = 3.0
CHUNK_START = 32  # tokens, while nothing is known: on a slow node that is four decode steps
# Fewer tokens cost little more than the step does without any, and a prompt has to end.
CHUNK_MIN = 16
DECODES_KEPT, CHUNKS_KEPT = 33, 63  # measurements
# No chunk is more times as long as one that was measured: half of the short ones may seem to have cost nothing.
GROWTH_MAX = 2
LOST_GROWTH = 4  # the same for what was lost in a failure, where no time is set
# What was lost is computed while everybody else on these cores has to do with the failure, too. That makes steps late,
# and what they had of a prompt seem dear; no step is early. Too long a step costs the last reader nothing, and each
# step too many its fixed part: so the chunks count that were least disturbed.
LOST_QUANTILE = 0.25
# So many steps with chunks and none that only decodes: the next ones have no prompt until one has been measured.
# Nothing else would tell that decoding has become slower, and chunks would shrink for it.
CHUNKS_UNPROVED_MAX = 100
CHUNKS_UNKNOWN_MAX = 15  # the same while no step that only decodes has been measured at all


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A step with a chunk of a prompt, and what a decode step was like then (zeros: unknown)."""

    tokens: int  # of prompts
    decodes: int
    took_s: float
    rows: float
    rows_s: float

    def token_share(self, rows: float, rows_s: float) -> float:
        """What a token adds, as a share of a decode step of `rows` rows, which takes `rows_s` now."""
        then, then_s = (self.rows, self.rows_s) if self.rows_s > 0 else (rows, rows_s)
        if then_s <= 0:
            return 0.0
        share = max(0.0, self.took_s - then_s) / max(1.0, self.tokens + self.decodes - then) / then_s
        # A step takes at least as long as one token adds.
        return share / max(1.0 + share * (rows - then), share)


class StepSpeed:
    def __init__(self, target_s: float = 0.0) -> None:
        """`target_s`: what a step may take; 0: a multiple of what one that only decodes takes."""
        self._target_s = target_s
        self._decodes: deque[tuple[int, float]] = deque(maxlen=DECODES_KEPT)  # rows, seconds
        self._chunks: deque[_Chunk] = deque(maxlen=CHUNKS_KEPT)
        # Tokens of a chunk, and how long it came behind another that was in the stages with it.
        self._paces: deque[tuple[int, float]] = deque(maxlen=CHUNKS_KEPT)
        self._chunk_at = 0.0  # when the last step with a chunk came back
        self._unproved = 0  # steps with chunks since the last one that only decoded

    def learn(self, other: StepSpeed) -> None:
        """Begin with what another scheduler has measured on nodes of the same kind; what is known already stays."""
        if not self._decodes and not self._chunks:
            self._decodes.extend(other._decodes)
            self._chunks.extend(other._chunks)
            self._paces.extend(other._paces)

    def ran(self, decodes: int, prompt_tokens: int, took_s: float, *, beside_chunk: bool) -> None:
        """A step has come back. `beside_chunk`: another one in flight meanwhile had tokens of a prompt."""
        if prompt_tokens:
            self._unproved += 1
            if prompt_tokens >= CHUNK_MIN:
                self._chunks.append(_Chunk(prompt_tokens, decodes, took_s, *self._decode_step()))
        elif decodes and not beside_chunk:
            self._unproved = 0
            self._decodes.append((decodes, took_s))

    def passed(self, prompt_tokens: int, since: float, now: float) -> None:
        """A step with a chunk, launched at `since`, has come back: how long after another one that was in the stages
        with it."""
        if prompt_tokens >= CHUNK_MIN and since < self._chunk_at:
            self._paces.append((prompt_tokens, now - self._chunk_at))
        self._chunk_at = now

    @property
    def pace_s(self) -> float:
        """For each token of a long prompt, whose chunks follow one another through the stages; 0: not measured yet."""
        return middle((took_s / count, count) for count, took_s in self._paces)

    @property
    def token_s(self) -> float:
        """What a token of a prompt adds to a step; 0: not measured yet."""
        rows, rows_s = self._decode_step()
        return rows_s * self._token_share(rows, rows_s) if self._chunks and rows_s else 0.0

    @property
    def step_s(self) -> float:
        """How long a step without prompts takes, lately; 0: not measured yet."""
        return self._decode_step()[1]

    def expected_s(self, tokens: int) -> float:
        """How long a step of so many tokens takes; 0: not measured yet."""
        return self.step_s + self.token_s * tokens

    @property
    def unproved(self) -> bool:
        """The next steps are to have no prompt, until one that only decodes has been measured."""
        return self._unproved >= (CHUNKS_UNPROVED_MAX if self._decodes else CHUNKS_UNKNOWN_MAX)

    def chunk_tokens(
        self, decodes: int, tokens_max: int, multiple: float = STEP_MULTIPLE, *, lost: bool = False
    ) -> int:
        """Tokens of prompts, at most `tokens_max`, for a step beside which so many rows decode, so that it takes
        `multiple` times a decode step, or the time that was set. `lost`: they are computed again, and all wait for
        them."""
        if not self._decodes or not self._chunks:
            return min(2 * CHUNK_START if lost else CHUNK_START, tokens_max)
        growth = LOST_GROWTH if lost and not self._target_s else GROWTH_MAX
        tokens_max = min(tokens_max, growth * max(chunk.tokens for chunk in self._chunks))
        rows, rows_s = self._decode_step()
        token_s = rows_s * self._token_share(rows, rows_s, LOST_QUANTILE if lost else 0.5)
        decode_s = max(0.0, rows_s + token_s * (decodes - rows))
        left_s = (self._target_s or multiple * decode_s) - decode_s
        if left_s >= tokens_max * token_s:
            return tokens_max
        # What is asked for cannot be kept, even where tokens seem to cost nothing.
        if left_s <= CHUNK_MIN * token_s:
            return min(tokens_max, CHUNK_MIN)
        return int(left_s / token_s)

    def _token_share(self, rows: float, rows_s: float, quantile: float = 0.5) -> float:
        """The median, or another quantile, over tokens, not over chunks."""
        shares = sorted((chunk.token_share(rows, rows_s), chunk.tokens) for chunk in self._chunks)
        part = sum(tokens for _, tokens in shares) * quantile
        sums = accumulate(tokens for _, tokens in shares)
        return next(share for (share, _), below in zip(shares, sums, strict=True) if below >= part)

    def _decode_step(self) -> tuple[float, float]:
        """Rows and seconds of one, lately; zeros if none has been measured."""
        if not self._decodes:
            return 0.0, 0.0
        return median(rows for rows, _ in self._decodes), median(took_s for _, took_s in self._decodes)
