"""What SamplingTable must equal: the definition of a draw in plain numpy, slow and obvious."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from controlplane.contract.requests import Sampling
from dataplane.model.sampler import SamplingTable

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """A request: the position of its next token is the length of its output."""

    spec: Sampling
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    allowed: tuple[int, ...] | None = None  # by a grammar's mask


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def draw(table: SamplingTable, logits: Floats, slots: list[int]) -> list[Sampled]:
    """What the table draws; no row may be poisoned."""
    drawn = table.sample(logits, np.array(slots, np.int32))
    assert drawn.poisoned == ()
    return [Sampled(int(t), drawn.logprobs.get(i), drawn.top.get(i, ())) for i, t in enumerate(drawn.tokens)]


def oracle(raw: Floats, row: Row) -> Sampled:
    raw = masked(raw, row.allowed)
    logits = processed(raw, row)
    if row.spec.temperature < 1e-5:
        token = int(logits.argmax())
    else:
        token = chosen(logits, row.spec, uniform(row.spec.seed, len(row.output)))
    if row.spec.logprobs is None:
        return Sampled(token, None, ())
    wide = raw.astype(np.float64)
    logprobs = wide - (wide.max() + math.log(np.exp(wide - wide.max()).sum()))
    best = [t for t in np.argsort(-raw, kind="stable")[: row.spec.logprobs] if raw[t] > -np.inf]
    return Sampled(token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in best))


def masked(raw: Floats, allowed: tuple[int, ...] | None) -> Floats:
    if allowed is None:
        return raw
    left = np.full_like(raw, -np.inf)
    left[list(allowed)] = raw[list(allowed)]
    return left


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides position `position` of a request with this seed (Philox4x64)."""
    bits = np.random.Philox(key=seed % 2**64, counter=position)
    return (int(bits.random_raw()) >> 11) * 2.0**-53


def processed(raw: Floats, row: Row) -> Floats:
    """Logits after min_tokens, bias and penalties."""
    spec, logits = row.spec, raw.copy()
    ends = row.allowed is not None and set(row.allowed) <= set(spec.stop_token_ids)
    if len(row.output) < spec.min_tokens and not ends:
        logits[list(spec.stop_token_ids)] = -np.inf
    for token, bias in spec.logit_bias:
        logits[token] += np.float32(bias)
    if spec.repetition_penalty != 1.0:
        seen = np.array(sorted({*row.prompt, *row.output}), np.int64)
        penalty = np.float32(spec.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    tokens, counts = np.unique(np.array(row.output, np.int64), return_counts=True)
    logits[tokens] -= np.float32(spec.frequency_penalty) * counts.astype(np.float32)
    logits[tokens] -= np.float32(spec.presence_penalty)
    return logits


def chosen(logits: Floats, spec: Sampling, u: float) -> int:
    """Inverts the cumulative distribution of what min-p, top-k and top-p leave, in order of token id."""
    scaled = logits.astype(np.float64) / spec.temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < spec.min_p] = 0.0  # relative to the best, whose weight is 1
    if 0 < spec.top_k < weights.size:
        weights[weights < np.sort(weights)[-spec.top_k]] = 0.0
    if spec.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order]) >= spec.top_p * weights.sum()
        weights[order[int(reached.argmax()) + 1 :]] = 0.0
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


# ---- the arithmetic of weights.h, operation for operation: a machine that differs has another idea of IEEE 754


def integer_weights(logits: Floats, temperature: float) -> npt.NDArray[np.int64]:
    """exp((logit - best) / temperature) in units of 2^-44, the same bits as kf_weigh."""
    wide = logits.astype(np.float64)
    y = np.maximum((wide - wide.max()) * (math.log2(math.e) / temperature), -64.0)
    whole = np.rint(y)
    f = y - whole
    p = np.zeros_like(f)
    for k in range(11, -1, -1):
        p = p * f + TAYLOR[k]
    weights: npt.NDArray[np.float64] = np.rint(np.ldexp(p, whole.astype(np.int64) + 44))
    return weights.astype(np.int64)


# log(2)^k / k!
TAYLOR = (
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.0001540353039338161,
    1.5252733804059841e-05,
    1.321548679014431e-06,
    1.01780860092397e-07,
    7.054911620801123e-09,
    4.4455382718708116e-10,
)
