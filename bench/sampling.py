"""What sampling costs at Llama-3's vocabulary: the sampler alone, and a node that decodes with it."""

from __future__ import annotations

import random
import time

import numpy as np

from bench.contract import Result
from bench.map import SHARED_STEPS, THREADS
from bench.models import LLAMA3_VOCAB, checkpoint
from bench.peers.protocol import Setup
from bench.systems import OurSystem, started
from controlplane.contract.requests import Sampling
from dataplane.model.sampler import SamplingTable
from kernels.cpu import _native

ROWS = 32
PASSES = 25
ROUNDS = 3
PROMPT = 16  # short: all streams decode together most of the time
INSTRUCTION_SETS = {"avx2": 1, "best": -1}
KINDS = {
    "t1": Sampling(max_tokens=1, seed=1, temperature=1.0),
    "t1_p95_5logprobs": Sampling(max_tokens=1, seed=1, temperature=1.0, top_p=0.95, logprobs=5),
}


def measure(result: Result) -> None:
    """Milliseconds of a batch, by instruction set and threads; tokens/s of a node, greedy and sampled, in turns."""
    _alone(result)
    _node(result)


def _alone(result: Result) -> None:
    logits = (np.random.default_rng(0).standard_normal((ROWS, LLAMA3_VOCAB)) * 3).astype(np.float32)
    for kind, sampling in KINDS.items():
        for name, isa in INSTRUCTION_SETS.items():
            for threads in (1, THREADS):
                table = SamplingTable(ROWS, LLAMA3_VOCAB, _native.Team(threads))
                slots = np.array([table.admit(sampling, [3], []) for _ in range(ROWS)], np.int32)
                try:
                    _native.set_isa(isa)
                    passes = [_ms(table, logits, slots) for _ in range(PASSES)]
                finally:
                    _native.set_isa(-1)
                result.measure(f"sampler_{kind}_ms_b{ROWS}_{name}_t{threads}", passes)


def _ms(table: SamplingTable, logits: np.ndarray, slots: np.ndarray) -> float:
    begun = time.perf_counter()
    table.sample(logits, slots)
    return (time.perf_counter() - begun) * 1000


def _node(result: Result) -> None:
    path = checkpoint("V", "bfloat16")
    tokens = 4 * SHARED_STEPS
    setup = Setup(str(path), "bfloat16", THREADS, ROWS, PROMPT + tokens + 1, "")
    sampled = Sampling(max_tokens=tokens, seed=1, temperature=1.0, top_p=0.95, logprobs=5)
    rates: dict[str, list[float]] = {"greedy": [], "t1_p95_5logprobs": []}
    numbers = random.Random(7)
    with started(setup, lambda name: name == "node", result.absent) as systems:
        node = systems["node"]
        assert isinstance(node, OurSystem)
        for _ in range(ROUNDS):
            prompts = [[numbers.randrange(3, LLAMA3_VOCAB) for _ in range(PROMPT)] for _ in range(ROWS)]
            for name, sampling in (("greedy", None), ("t1_p95_5logprobs", sampled)):
                times = node.generate(prompts, tokens, sampling).times
                begun, ended = max(row[0] for row in times), min(row[-1] for row in times)
                rates[name].append(sum(begun < at <= ended for row in times for at in row) / (ended - begun))
    for name, values in rates.items():
        result.measure(f"node_tokens_per_s_b{ROWS}_V_bfloat16_{name}", values)
