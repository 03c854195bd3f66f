"""How long steps take, and so how many tokens of prompts one may have while somebody reads along.

A step is taken to last a fixed time and a time for each of its tokens, decoded ones and those of prompts alike. The
fixed part is seen in steps that only decode, the part for a token in those with a chunk of a prompt. Both are medians,
since other work on the same cores makes single steps late. Times are those that the scheduler sees, from the launch of
a step to its result: all stages, links and the sampler are in them.
"""

from __future__ import annotations

from collections import deque
from statistics import median

# Of a step that only decodes: what a step with a chunk may take, where no time is set. Readers are to wait at most 2.5
# times as long as usual (p99), and steps come late without any chunk, too.
STEP_MULTIPLE = 1.5
CHUNK_START = 64  # tokens, while nothing is known
# Fewer tokens cost little more than the step does without any, and a prompt has to end.
CHUNK_MIN = 16
DECODES_KEPT, CHUNKS_KEPT = 33, 15  # measurements
# So many steps with chunks and none that only decodes: the next ones have no prompt until one has been measured.
# Nothing else would tell that decoding has become slower, and chunks would shrink for it.
CHUNKS_UNPROVED_MAX = 100


class StepSpeed:
    def __init__(self, target_s: float = 0.0) -> None:
        """`target_s`: what a step may take; 0: STEP_MULTIPLE times one that only decodes."""
        self._target_s = target_s
        self._decodes: deque[tuple[int, float]] = deque(maxlen=DECODES_KEPT)  # rows, seconds
        self._chunks: deque[tuple[int, float]] = deque(maxlen=CHUNKS_KEPT)
        self._unproved = 0  # steps with chunks since the last one that only decoded

    def ran(self, decodes: int, prompt_tokens: int, took_s: float, *, beside_chunk: bool) -> None:
        """A step has come back. `beside_chunk`: another one in flight meanwhile had tokens of a prompt."""
        if prompt_tokens:
            self._unproved += 1
            if prompt_tokens >= CHUNK_MIN:
                self._chunks.append((decodes + prompt_tokens, took_s))
        elif decodes and not beside_chunk:
            self._unproved = 0
            self._decodes.append((decodes, took_s))

    def chunk_tokens(self, decodes: int, tokens_max: int) -> int:
        """Tokens of prompts, at most `tokens_max`, for a step beside which so many rows decode: 0 to measure anew."""
        if self._unproved >= (CHUNKS_UNPROVED_MAX if self._decodes else CHUNKS_KEPT):
            return 0
        if not self._decodes or not self._chunks:
            return min(CHUNK_START, tokens_max)
        rows = median(rows for rows, _ in self._decodes)
        rows_s = median(took_s for _, took_s in self._decodes)
        token_s = median(max(0.0, took_s - rows_s) / max(1.0, more - rows) for more, took_s in self._chunks)
        decode_s = max(0.0, rows_s + token_s * (decodes - rows))
        left_s = (self._target_s or STEP_MULTIPLE * decode_s) - decode_s
        if left_s >= tokens_max * token_s:
            return tokens_max
        return min(tokens_max, max(CHUNK_MIN, int(left_s / token_s)))
