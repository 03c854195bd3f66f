"""What the oracle's tokens ought to be, from its definition and without a cluster: no block, no batch, no stage.

All requests are computed side by side, one position at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.kevlarflow_load import Outcome, Request
from controlplane.contract.requests import Sampling
from dataplane.model.sampler import SamplingTable
from dataplane.oracle import Hashes, Logits, first_hashes, kv_hashes, out_hashes, position_weights

ROWS_MAX = 256  # requests computed at a time: their logits stay in the caches


@dataclass(slots=True)
class Comparison:
    """Tokens, over all requests that ended without an error."""

    lost: int = 0
    duplicated: int = 0
    different: int = 0
    failed: int = 0  # requests


def compare(outcomes: Sequence[Outcome], stages: int, vocab_size: int) -> Comparison:
    result = Comparison()
    sound = [outcome for outcome in outcomes if not outcome.error]
    result.failed = len(outcomes) - len(sound)
    wanted = expected_tokens([outcome.request for outcome in sound], stages, vocab_size)
    for outcome, expected in zip(sound, wanted, strict=True):
        missing = len(expected) - len(outcome.tokens)
        result.lost += max(0, missing)
        result.duplicated += max(0, -missing)
        result.different += sum(a != b for a, b in zip(outcome.tokens, expected, strict=False))
    return result


def expected_tokens(requests: Sequence[Request], stages: int, vocab_size: int) -> list[list[int]]:
    """The whole output of each request (temperature 1, nothing else)."""
    longest_first = sorted(range(len(requests)), key=lambda i: -requests[i].max_tokens)
    outputs: list[list[int]] = [[] for _ in requests]
    for start in range(0, len(requests), ROWS_MAX):
        group = longest_first[start : start + ROWS_MAX]
        tokens = _outputs([requests[i] for i in group], stages, vocab_size)
        for row, index in enumerate(group):
            outputs[index] = tokens[row, : requests[index].max_tokens].tolist()
    return outputs


def _outputs(requests: Sequence[Request], stages: int, vocab_size: int) -> np.ndarray:
    """int64 [R, longest]: of requests that are sorted, the longest output first."""
    weights = position_weights(max(len(r.prompt) + r.max_tokens for r in requests))
    seen = np.zeros((stages, len(requests)), np.uint64)
    hashes = np.empty(len(requests), np.uint64)  # the last stage's, of each one's last position
    for row, request in enumerate(requests):
        hashes[row] = _prefill(request, weights, seen[:, row])
    table = SamplingTable(len(requests), vocab_size)
    slots = np.array([table.admit(Sampling(r.max_tokens, r.seed), r.prompt) for r in requests], np.int32)
    logits = Logits(vocab_size)
    lengths = np.array([r.max_tokens for r in requests])
    positions = np.array([len(r.prompt) for r in requests])
    tokens = np.zeros((len(requests), int(lengths[0])), np.int64)
    for step in range(int(lengths[0])):
        left = int((lengths > step).sum())
        drawn = table.sample(logits.of(hashes[:left]), slots[:left]).tokens
        table.append_many(slots[:left], drawn)
        tokens[:left, step] = drawn
        now = first_hashes(drawn, positions[:left])
        for stage in range(stages):
            seen[stage, :left] += kv_hashes(now, stage) * weights[positions[:left]]
            now = out_hashes(now, seen[stage, :left])
        hashes[:left] = now
        positions[:left] += 1
    return tokens


def _prefill(request: Request, weights: Hashes, seen: Hashes) -> np.uint64:
    """Fills `seen` [stages] with the sums after the prompt. Returns the last stage's last hash."""
    count = len(request.prompt)
    hashes = first_hashes(np.array(request.prompt, np.int64), np.arange(count))
    for stage in range(len(seen)):
        sums = np.cumsum(kv_hashes(hashes, stage) * weights[:count])
        seen[stage] = sums[-1]
        hashes = out_hashes(hashes, sums)
    return np.uint64(hashes[-1])
