"""From logits to tokens, one row at a time, in numpy: a row's result cannot depend on the batch.

The order is vLLM's: logprobs of the raw logits; then min_tokens, logit bias, penalties; then greedy, or
temperature, min-p, top-k, top-p and a draw. The draw's randomness is a function of (seed, position) alone, and
everything else of the token log, so a request that goes on elsewhere draws the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from controlplane.contract.requests import Sampling

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM
NUCLEUS_GUESS = 1024  # top-p sorts this many candidates first, all only if their mass is too small

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to sample: its token log (prompt and output ids) and the position that the new token will have."""

    spec: Sampling
    prompt: npt.NDArray[np.int32]
    output: npt.NDArray[np.int32] | Sequence[int]
    position: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, its logprob if asked for, and the best (token, logprob), best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class NonFiniteLogits(Exception):
    """Some rows have NaN or infinite logits; `rows` are their indices in the batch."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        super().__init__(f"logits of rows {rows} are not finite")


def sample(logits: Any, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Draws one token a row from logits float32 [K, vocab] (numpy, or a torch tensor on the CPU), which are not
    changed. Raises NonFiniteLogits before anything is drawn, ValueError for a wrong number of rows."""
    values = np.asarray(logits, np.float32)
    if values.ndim != 2 or len(values) != len(rows):
        raise ValueError(f"{len(rows)} rows do not fit logits of shape {values.shape}")
    # A row's sum is finite exactly if its values are (they are far from overflow): one pass, no temporary.
    with np.errstate(invalid="ignore", over="ignore"):
        suspects = np.flatnonzero(~np.isfinite(values.sum(axis=1)))
    poisoned = tuple(int(i) for i in suspects if not np.isfinite(values[i]).all())
    if poisoned:
        raise NonFiniteLogits(poisoned)
    return [_sample_row(values[i], row) for i, row in enumerate(rows)]


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides position `position` of a request with this seed (Philox4x64)."""
    bits = np.random.Philox(key=seed % 2**64, counter=position)
    return (int(bits.random_raw()) >> 11) * 2.0**-53


def _sample_row(raw: Floats, row: SampleRow) -> Sampled:
    spec = row.spec
    logits = _processed(raw, row)
    if spec.temperature < GREEDY_BELOW:
        token = int(logits.argmax())
    else:
        token = _draw(logits, spec, uniform(spec.seed, row.position))
    if spec.logprobs is None:
        return Sampled(token, None, ())
    peak = raw.max()
    norm = float(peak) + float(np.log(np.exp(raw - peak).sum(dtype=np.float64)))
    count = min(spec.logprobs, raw.size)
    best = _best(raw, count)
    return Sampled(token, float(raw[token]) - norm, tuple((int(t), float(raw[t]) - norm) for t in best))


def _best(values: Floats, count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest values, largest first, equal ones by index."""
    if count == 0:
        return np.empty(0, np.intp)
    if count >= values.size:
        return np.argsort(-values, kind="stable")
    bound = np.partition(values, values.size - count)[values.size - count]
    candidates = np.flatnonzero(values >= bound)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _processed(raw: Floats, row: SampleRow) -> Floats:
    """Logits after min_tokens, bias and penalties; `raw` itself where none of them applies."""
    spec = row.spec
    mask_stops = len(row.output) < spec.min_tokens and bool(spec.stop_token_ids)
    additive = spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0
    if not (mask_stops or spec.logit_bias or additive or spec.repetition_penalty != 1.0):
        return raw
    logits = raw.copy()
    if mask_stops:
        logits[list(spec.stop_token_ids)] = -np.inf
    for token, bias in spec.logit_bias:
        logits[token] += np.float32(bias)
    output = np.asarray(row.output, np.int64)
    if spec.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([np.asarray(row.prompt, np.int64), output]))
        penalty = np.float32(spec.repetition_penalty)
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if additive and output.size:
        tokens, counts = np.unique(output, return_counts=True)
        logits[tokens] -= np.float32(spec.frequency_penalty) * counts.astype(np.float32)
        logits[tokens] -= np.float32(spec.presence_penalty)
    return logits


def _draw(logits: Floats, spec: Sampling, u: float) -> int:
    """Inverts the cumulative distribution of what min-p, top-k and top-p leave, in order of token id."""
    scaled = logits.astype(np.float64) / spec.temperature
    weights = np.exp(scaled - scaled.max())
    if spec.min_p > 0.0:
        weights[weights < spec.min_p] = 0.0  # relative to the best, whose weight is 1
    if 0 < spec.top_k < weights.size:
        bound = np.partition(weights, weights.size - spec.top_k)[weights.size - spec.top_k]
        weights[weights < bound] = 0.0
    if spec.top_p < 1.0:
        keep = _nucleus(weights, spec.top_p)
        kept = np.zeros_like(weights)
        kept[keep] = weights[keep]
        weights = kept
    cumulative = np.cumsum(weights)
    chosen = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # Rounding may put the target on the total: then the last token with any weight is meant.
    return chosen if chosen < weights.size else int(np.flatnonzero(weights)[-1])


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """The most likely tokens, fewest first, whose mass reaches top_p; at least one."""
    target = top_p * weights.sum()
    for count in (min(NUCLEUS_GUESS, weights.size), weights.size):
        order = np.argpartition(-weights, count - 1)[:count] if count < weights.size else np.arange(count)
        order = np.sort(order)
        order = order[np.argsort(-weights[order], kind="stable")]
        reached = np.cumsum(weights[order]) >= target
        if reached.any():
            return order[: int(reached.argmax()) + 1]
    return np.arange(weights.size)
