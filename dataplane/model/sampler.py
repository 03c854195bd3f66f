"""From logits to tokens for a whole batch; a row's token depends on nothing but its logits and its token log.

The order is vLLM's: a grammar's mask; logprobs of what it leaves; then min_tokens, logit bias, penalties; then greedy,
or temperature, min-p, top-k, top-p and a draw. So logprobs are of the model's own distribution over the tokens that the
grammar allows, and the others have none. The draw's randomness is a function of (seed, position) alone, and
everything else of the token log, so a request that goes on elsewhere draws the same tokens."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from controlplane.contract.prompt_scores import score_record
from controlplane.contract.requests import Sampling
from dataplane._fast.sampling import NONE_LEFT, POISONED, DrawTable
from kernels.cpu._native import Team

Floats = npt.NDArray[np.float32]
NO_TOKEN = -1  # where a vocabulary has fewer tokens than are asked for
TokenIds = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of one batch. `logprobs` and `top` have the rows that asked for logprobs and have a token."""

    tokens: npt.NDArray[np.int64]  # [K]; below 0 where there is none
    poisoned: tuple[int, ...]  # rows whose logits are not finite
    logprobs: dict[int, float]  # row -> logprob of its token
    top: dict[int, tuple[tuple[int, float], ...]]  # row -> the best (token, logprob), best first
    dead_ends: tuple[int, ...] = ()  # rows whose mask allows no token
    # Of requests with a grammar (core/rules.py): whose mask is not there yet, and who can have no token, and why.
    waiting: tuple[int, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Foresight:
    """What a grammar allows behind drafts: masks int32 [K, vocab / 32 rounded up] of the rows of one step, and which of
    them have been made, uint8 [K]."""

    masks: npt.NDArray[np.int32]
    made: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Log probabilities float64 [S] of tokens, their ranks int32 [S], and the likeliest tokens and their log
    probabilities [S, top], likeliest first. Where logits are not `finite` [S] the rest says nothing."""

    logprobs: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    top: npt.NDArray[np.float64]
    finite: npt.NDArray[np.bool_]

    def records(self, rows: slice, top: int) -> bytes:
        """As they travel (contract/prompt_scores.py), with so many of the likeliest."""
        packed = np.zeros(len(self.logprobs[rows]), score_record(top))
        packed["logprob"], packed["rank"] = self.logprobs[rows], self.ranks[rows]
        count = min(top, self.tokens.shape[1])  # a small vocabulary has fewer
        packed["top"]["token"] = NO_TOKEN
        packed["top"]["token"][:, :count] = self.tokens[rows, :count]
        packed["top"]["logprob"][:, :count] = self.top[rows, :count]
        return packed.tobytes()


class BadWords:
    """Sequences that one output must not contain, and what of it may be the beginning of one."""

    def __init__(self, words: Sequence[tuple[int, ...]], output: Sequence[int]) -> None:
        self._words = [(word[:-1], word[-1]) for word in words]
        longest = max(len(before) for before, _ in self._words)
        self._last: deque[int] = deque(output, maxlen=longest)

    def push(self, token: int) -> None:
        self._last.append(token)

    def banned(self) -> npt.NDArray[np.int32]:
        """Tokens that would complete one, each once."""
        said = tuple(self._last)
        ends = {end for before, end in self._words if said[len(said) - len(before) :] == before}
        return np.array(sorted(ends), np.int32)


class SamplingTable:
    """Sampling state of every running request in one of max_rows slots; the memory of a slot is bounded by the
    distinct tokens of a request that uses penalties. Not for several threads at once.

    `masks` int32 [max_rows, vocab / 32 rounded up]: what the next tokens of requests with a grammar may be, by slot,
    a bit a token, the first in the lowest. Whoever follows the grammar writes a row between two calls of sample(). None
    before the first such request."""

    def __init__(self, max_rows: int, vocab_size: int, team: Team | None = None) -> None:
        """`team`: threads that rows are shared among, idle while sample() runs; none: the caller's only."""
        self._table = DrawTable(max_rows, vocab_size, team)
        self._asked: dict[int, int] = {}  # slot -> how many of the best tokens it wants to see
        self.masks: npt.NDArray[np.int32] | None = None
        self._bad: dict[int, BadWords] = {}  # by slot
        # One greedy request, which scores whatever row it is given.
        self._scorer = DrawTable(1, vocab_size, team)

    @property
    def slots_in_use(self) -> int:
        return self._table.in_use

    def admit(self, spec: Sampling, prompt: TokenIds, output: TokenIds = ()) -> int:
        """A slot for a request with this token log. Raises SlotsFull (a MemoryError), ValueError for a token id
        that is not in the vocabulary."""
        masks = self._make_masks() if spec.grammar else None
        slot = self._table.admit(spec, np.asarray(prompt, np.int32), np.asarray(output, np.int32), masks)
        if spec.logprobs is not None:
            self._asked[slot] = min(spec.logprobs, self._table.vocab_size)
        if spec.bad_words:
            bad = self._bad[slot] = BadWords(spec.bad_words, [int(token) for token in output])
            self._table.ban(slot, bad.banned())
        return slot

    def _make_masks(self) -> npt.NDArray[np.int32]:
        if self.masks is None:
            self.masks = np.zeros((self._table.max_rows, -(-self._table.vocab_size // 32)), np.int32)
        return self.masks

    def append(self, slot: int, token: int) -> None:
        """See append_many."""
        self.append_many(np.array([slot], np.int32), np.array([token], np.int64))

    def append_many(self, slots: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64]) -> None:
        """The output of slots[i] grows by tokens[i]. Raises IndexError for a slot not in use, ValueError for a
        token id that is not in the vocabulary; then nothing has changed."""
        self._table.append(slots, tokens)
        if self._bad:
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                if (bad := self._bad.get(slot)) is not None:
                    bad.push(token)
                    self._table.ban(slot, bad.banned())

    def seek(self, slot: int, length: int) -> None:
        """The output of a slot has so many tokens, whichever they are. Raises IndexError if it is not in use,
        ValueError if its request has penalties, or bad words: its draws depend on the tokens."""
        if slot in self._bad:
            raise ValueError(f"the request of slot {slot} has bad words")
        self._table.seek(slot, length)

    def release(self, slot: int) -> None:
        """Gives a slot back. Raises IndexError if it is not in use."""
        self._table.release(slot)
        self._asked.pop(slot, None)
        self._bad.pop(slot, None)

    def score(self, logits: Floats, tokens: npt.NDArray[np.int32], top: int) -> ScoredRows:
        """How likely tokens [S] are by logits [S, vocab], and which are the likeliest. A row's numbers are those that
        a draw from it would have as log probabilities. Raises ValueError for wrong shapes."""
        values = np.ascontiguousarray(logits, np.float32)
        if len(values) != len(tokens):
            raise ValueError(f"{len(values)} rows of logits for {len(tokens)} tokens")
        slot = self._scorer.admit(
            Sampling(1, 0, temperature=0.0, logprobs=top), np.empty(0, np.int32), np.empty(0, np.int32)
        )
        try:
            best, norms, largest = self._scorer.sample(values, np.full(len(tokens), slot, np.int32))
        finally:
            self._scorer.release(slot)
        chosen = values[np.arange(len(tokens)), tokens]
        ranks = np.empty(len(tokens), np.int32)
        # Equal ones count in order of their ids, as among the largest.
        for row, token in enumerate(tokens.tolist()):
            line, own = values[row], chosen[row]
            ranks[row] = 1 + np.count_nonzero(line > own) + np.count_nonzero(line[:token] == own)
        return ScoredRows(
            chosen - norms, ranks, largest["token"], largest["logit"] - norms[:, None], best != POISONED
        )

    def sample(
        self,
        logits: Floats,
        slots: npt.NDArray[np.int32],
        depths: npt.NDArray[np.int32] | None = None,
        drafts: npt.NDArray[np.int32] | None = None,
        foresight: Foresight | None = None,
    ) -> Drawn:
        """Draws one token a row from logits [K, vocab] for the requests in slots [K]; neither is changed, and no
        state is: `append_many` moves on. Raises IndexError for a slot not in use, ValueError for wrong shapes.

        `depths` [K], `drafts` [K]: rows of one request follow one another, row r behind `depths[r]` drafts, the last
        of which is `drafts[r]`. It is drawn as if these were in the log, and has no token if one of them is not what
        the row before it drew: so what is drawn is what would be without drafts. `foresight`: of requests with a
        grammar; what it does not have is not drawn."""
        values = np.ascontiguousarray(logits, np.float32)
        tokens, norms, largest = self._table.sample(
            values,
            slots,
            depths,
            drafts,
            None if foresight is None else foresight.masks,
            None if foresight is None else foresight.made,
        )
        poisoned, dead_ends = (tuple(np.flatnonzero(tokens == why).tolist()) for why in (POISONED, NONE_LEFT))
        drawn = Drawn(tokens, poisoned, {}, {}, dead_ends)
        if not self._asked:
            return drawn
        for row, slot in enumerate(slots.tolist()):
            if slot in self._asked and tokens[row] >= 0:
                norm, best = norms[row], largest[row, : self._asked[slot]]
                best = best[best["logit"] > -np.inf]  # what a mask leaves may be fewer
                drawn.logprobs[row] = float(values[row, tokens[row]] - norm)
                logprobs = best["logit"] - norm  # float64
                drawn.top[row] = tuple(zip(best["token"].tolist(), logprobs.tolist(), strict=True))
        return drawn
