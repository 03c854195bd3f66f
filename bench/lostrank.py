"""The pause of a stage whose rank is killed: ranks in service (dataplane/ranks) decode contexts of 16K tokens, and one
of them is killed at a random moment. The pause is how much longer the step took in which it was lost: until the others
know, have agreed and have their weights, and for what had to be computed again. Weights are random, KV zeros.

In two sizes of weights, since they are what survivors have to bring: small ones show all the rest."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.contract import Result, percentile, progress
from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.kvcache import KVCache
from dataplane.ranks.stage import RankedStage
from kernels.base import Head, Layer, Linear, Mlp, StageSpec

RANKS, CONTEXT, CONTEXTS, BLOCK = 4, 16_384, 4, 16
SEED = 7
LIMIT_S = 60.0  # for the ranks to be whole again


@dataclass(frozen=True, slots=True)
class Size:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int


SIZES = {"small": Size(512, 1536, 8, 8, 64, 4, 8000), "large": Size(2048, 5632, 16, 8, 128, 4, 32000)}
KILLS = {"small": (20, 100), "large": (10, 100)}  # with --quick and without


class Rotary:
    """See kernels.base.Rotary."""

    def __init__(self, head_dim: int) -> None:
        angles = torch.arange(CONTEXT)[:, None] * 0.7 ** torch.arange(head_dim // 2)
        self.cos, self.sin, self.max_positions = angles.cos(), angles.sin(), CONTEXT

    def cover(self, positions: int) -> None:
        assert positions <= self.max_positions


def random_spec(size: Size) -> StageSpec:
    values = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(SEED)) * 0.02).bfloat16()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return values.repeat(-(-rows * columns // len(values)))[: rows * columns].view(rows, columns)

    hidden, norm = size.hidden, torch.ones(size.hidden)
    outputs = (size.heads + 2 * size.kv_heads) * size.head_dim
    layers = tuple(
        Layer(
            norm,
            Linear(matrix(outputs, hidden)),
            None,
            None,
            Linear(matrix(hidden, size.heads * size.head_dim)),
            norm,
            Mlp(Linear(matrix(2 * size.intermediate, hidden)), Linear(matrix(hidden, size.intermediate))),
            None,
            None,
            None,
        )
        for _ in range(size.layers)
    )
    embed = matrix(size.vocabulary, hidden)
    rotary = (Rotary(size.head_dim),)
    return StageSpec(hidden, size.intermediate, size.heads, 1e-5, rotary, layers, embed, Head(norm, embed))


def weights_bytes(spec: StageSpec) -> int:
    """Of what ranks pack."""
    assert spec.head is not None
    weights = [spec.head.tensor]
    for layer in spec.layers:
        assert isinstance(layer.mlp, Mlp)
        weights += [each.tensor for each in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down)]
    return sum(each.nbytes for each in weights)


class Decoding:
    """Ranks that compute the last position of all contexts again and again."""

    def __init__(self, size: Size) -> None:
        each = CONTEXT // BLOCK
        spec = random_spec(size)
        self.weights_bytes = weights_bytes(spec)
        kv = KVCache(
            CONTEXTS * each, size.layers, size.kv_heads, BLOCK, size.head_dim, "bfloat16", shared=True
        )
        self.stage = RankedStage(spec, kv, RANKS, threads=1, rows_max=CONTEXTS, context_max=CONTEXT)
        self._table = BlockTable(CONTEXTS, CONTEXTS * each, BLOCK)
        rows = np.array([self._table.new_row() for _ in range(CONTEXTS)], np.int32)
        for row in rows.tolist():
            self._table.extend(row, list(range(row * each, (row + 1) * each)))
        starts = np.full(CONTEXTS, CONTEXT - 1, np.int32)
        self._step = self._table.fill(rows, starts, np.ones(CONTEXTS, np.int32), StepArrays())
        self._picked = np.arange(CONTEXTS, dtype=np.int32)
        self.logits: npt.NDArray[np.generic] = np.zeros(0)

    def step_s(self) -> float:
        begun = time.monotonic()
        self.logits = self.stage.forward(np.arange(CONTEXTS), self._step, self._picked)
        return time.monotonic() - begun


def lose_one(decoding: Decoding, rank: int, after_s: float) -> tuple[float, float]:
    """Seconds of the step in which it was lost, and of the longest one until all ranks compute again."""
    stage = decoding.stage
    lost, deadline = stage.lost, time.monotonic() + LIMIT_S
    timer = threading.Timer(after_s, os.kill, (stage.pid(rank), signal.SIGKILL))
    timer.start()
    took = decoding.step_s()
    while stage.lost == lost:
        took = decoding.step_s()
    timer.join()
    longest = 0.0
    while len(stage.ranks) < RANKS:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(stage.ranks)} of {RANKS} ranks compute after {LIMIT_S} s")
        longest = max(longest, decoding.step_s())
    return took, max(longest, decoding.step_s())


def run(quick: bool) -> Result:
    torch.set_num_threads(1)
    settings = {"ranks": RANKS, "context": CONTEXT, "contexts": CONTEXTS, "kills": KILLS, "quick": quick}
    result = Result("lostrank", dict(settings))
    for name, size in SIZES.items():
        with torch.inference_mode():
            measure(result, name, size, KILLS[name][not quick])
    return result


def measure(result: Result, name: str, size: Size, kills: int) -> None:
    """Raises RuntimeError for logits that differ."""
    decoding, chance = Decoding(size), random.Random(SEED)
    try:
        for _ in range(3):
            decoding.step_s()
        want, usual, pauses, intake = decoding.logits.tobytes(), [], [], []
        for _ in range(kills):
            usual.append(statistics.median(decoding.step_s() for _ in range(5)))
            took, longest = lose_one(decoding, chance.randrange(RANKS), chance.uniform(0, 2 * usual[-1]))
            pauses.append(took - usual[-1])
            intake.append(longest - usual[-1])
            if decoding.logits.tobytes() != want:
                raise RuntimeError("another number of ranks has other logits")
    finally:
        decoding.stage.close()
    result.settings[f"{name}_weights_bytes"] = decoding.weights_bytes
    result.measure(f"{name}_step_s", usual)
    result.measure(f"{name}_pause_s", pauses)
    result.metrics[f"{name}_pause_p99_s"] = percentile(pauses, 0.99)
    result.measure(f"{name}_taken_in_s", intake)
    progress(f"  {name}: {kills} kills, pause {statistics.median(pauses):.3f} s, at most {max(pauses):.3f} s")
