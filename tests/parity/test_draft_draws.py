"""Draws behind drafts equal those that are made one after the other, whatever a draw depends on, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from controlplane.contract.requests import Sampling
from dataplane._fast.sampling import POISONED, REJECTED
from dataplane.model.sampler import SamplingTable

VOCAB = 700
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.7},
    "plain": {},
    "nucleus": {"top_p": 0.8, "top_k": 40, "min_p": 0.01, "temperature": 1.3},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.9, "temperature": 0.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.0},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": (3, 4, 5), "logit_bias": ((3, 9.0), (6, 2.0))},
    "logprobs": {"logprobs": 3, "frequency_penalty": 0.8},
}


def one_by_one(sampling: Sampling, prompt: list[int], logits: np.ndarray) -> tuple[list[int], list[object]]:
    """A token for each row of logits, each drawn when those before it are in the log."""
    table = SamplingTable(1, VOCAB)
    slot = np.array([table.admit(sampling, prompt)], np.int32)
    tokens, seen = [], []
    for row in logits:
        drawn = table.sample(row[None], slot)
        tokens.append(int(drawn.tokens[0]))
        seen.append((drawn.logprobs.get(0), drawn.top.get(0)))
        table.append_many(slot, drawn.tokens)
    return tokens, seen


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("wrong_at", [0, 1, 3, 5])
def test_drafts_change_no_draw(name: str, wrong_at: int) -> None:
    """Three requests in one batch, the middle one with five drafts, of which those from `wrong_at` on are wrong."""
    rng = np.random.default_rng(wrong_at)
    count, tried = 5, 0
    for seed in range(6):
        sampling = Sampling(100, seed=seed, **SAMPLINGS[name])  # type: ignore[arg-type]
        # Few tokens are likely, so that drafts and prompts repeat each other.
        logits = rng.standard_normal((count + 3, VOCAB)).astype(np.float32) * 2
        logits[:, :8] += 6
        prompt = rng.integers(0, 8, 4).tolist()
        right, seen = one_by_one(sampling, prompt, logits[1:-1])
        drafts = right[:count]
        if wrong_at < count:
            drafts[wrong_at] = (drafts[wrong_at] + 1) % VOCAB
        table = SamplingTable(3, VOCAB)
        first, middle, last = (table.admit(sampling, prompt) for _ in range(3))
        slots = np.array([first, *[middle] * (count + 1), last], np.int32)
        depths = np.array([0, *range(count + 1), 0], np.int32)
        before = np.array([0, 0, *drafts, 0], np.int32)
        drawn = table.sample(logits, slots, depths, before)
        kept = min(wrong_at, count) + 1
        assert drawn.tokens[1:-1].tolist() == right[:kept] + [REJECTED] * (count + 1 - kept)
        assert drawn.tokens[0] == one_by_one(sampling, prompt, logits[:1])[0][0]
        assert drawn.tokens[-1] == one_by_one(sampling, prompt, logits[-1:])[0][0]
        for row in range(kept):
            assert (drawn.logprobs.get(row + 1), drawn.top.get(row + 1)) == seen[row]
        assert all(row + 1 not in drawn.logprobs for row in range(kept, count + 1))
        assert not drawn.poisoned
        # Nothing has changed: the same rows without drafts are the first draws.
        assert table.sample(logits[1:2], slots[1:2]).tokens[0] == right[0]
        tried += 1
    assert tried == 6


def test_numbers_that_are_not_finite_count_where_a_draw_counts() -> None:
    table = SamplingTable(1, VOCAB)
    slots = np.array([table.admit(Sampling(9, seed=1, temperature=0.0), [1])] * 3, np.int32)
    depths = np.array([0, 1, 2], np.int32)
    logits = np.zeros((3, VOCAB), np.float32)
    logits[[0, 1, 2], [7, 8, 9]] = 5.0
    logits[2, 3] = np.nan
    assert table.sample(logits, slots, depths, np.array([0, 7, 8], np.int32)).poisoned == (2,)
    drawn = table.sample(logits, slots, depths, np.array([0, 7, 1], np.int32))
    assert (drawn.tokens.tolist(), drawn.poisoned) == ([7, 8, REJECTED], ())
    logits[0, 0] = np.inf
    drawn = table.sample(logits, slots, depths, np.array([0, 7, 8], np.int32))
    assert (drawn.tokens.tolist(), drawn.poisoned) == ([POISONED, REJECTED, REJECTED], (0,))


def test_rows_that_are_no_drafts_of_one_request_are_refused() -> None:
    table = SamplingTable(2, VOCAB)
    a, b = (table.admit(Sampling(9, seed=1), [1]) for _ in range(2))
    logits = np.zeros((2, VOCAB), np.float32)
    for slots, depths, drafts in (
        ([a, b], [0, 1], [0, 1]),
        ([a, a], [1, 2], [1, 1]),
        ([a, a], [0, 2], [0, 1]),
        ([a, a], [0, 1], [0, VOCAB]),
        ([a, a], [0, 1], [0, -1]),
        ([a, a], [0, 1], [0]),
    ):
        with pytest.raises(ValueError, match=r"follow one another|vocabulary|do not fit"):
            table.sample(logits, *(np.array(x, np.int32) for x in (slots, depths, drafts)))
    with pytest.raises(ValueError, match="do not fit"):
        table.sample(logits, np.array([a, a], np.int32), np.array([0, 1], np.int32))
