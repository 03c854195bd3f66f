"""Log probabilities of a prompt's tokens as they travel: packed, since there are as many as the prompt has tokens.

A record for each token but the first, which nothing comes before: its own log probability, its rank among all tokens
(1: the likeliest), and the `top` most likely tokens in its place, likeliest first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Of one request. The scheduler keeps them until its client has them, and they leave with the first token.
PROMPT_SCORES_BYTES_MAX = 8 << 20


def score_record(top: int) -> np.dtype[np.void]:
    """Of one token, with so many of the most likely ones."""
    best = np.dtype([("token", "<i4"), ("logprob", "<f8")])
    return np.dtype([("logprob", "<f8"), ("rank", "<i4"), ("top", best, (top,))])


def scores_bytes(prompt_len: int, top: int) -> int:
    """Of a prompt of so many tokens."""
    return (prompt_len - 1) * (12 + 12 * top)


def unpack_scores(data: bytes, top: int) -> npt.NDArray[np.void]:
    """Raises ValueError for what is no whole number of records."""
    return np.frombuffer(data, score_record(top))
