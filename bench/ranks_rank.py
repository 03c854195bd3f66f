"""One rank of `bench decode`: python -m bench.ranks_rank MODEL EXCHANGE_FD LOGITS_FD RANK. It reads lines "BATCH STEPS"
and answers each with the seconds of a step."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.quantised import BLOCK, CONTEXT
from bench.ranks import BATCHES, NUMBERS_MAX, RANKS, VOCABULARY, prompts, tokens_of
from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.kvcache import KVCache
from dataplane.model.config import load_config
from dataplane.model.layers import build_spec
from dataplane.model.weights import load_weights
from kernels.cpu.rank import CpuRank, SharedHeads
from kernels.ranks.exchange import Exchange
from kernels.ranks.layout import first_layout
from kernels.ranks.own import shape_of

LIMIT_S = 60.0


def main() -> None:
    path, (exchange_fd, logits_fd, rank) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    config = load_config(path, 0)
    layers = range(config.num_layers)
    with torch.inference_mode():
        spec = build_spec(config, layers, load_weights(path, config, layers), torch.bfloat16)
        layout = first_layout(shape_of(spec, config.num_kv_heads), RANKS)
        texts, each = max(BATCHES), -(-(CONTEXT + 1) // BLOCK)
        kv = KVCache(texts * each, config.num_layers, config.num_kv_heads, BLOCK, config.head_dim, "bfloat16")
        own = CpuRank(
            spec,
            layout,
            rank,
            SharedHeads(kv),
            Exchange(exchange_fd, RANKS, rank, NUMBERS_MAX),
            timeout_s=LIMIT_S,
        )
    shared = np.frombuffer(mmap.mmap(logits_fd, texts * VOCABULARY * 4), np.float32)
    table = BlockTable(texts, each, BLOCK)
    rows = np.array([table.new_row() for _ in range(texts)], np.int32)
    for row in rows.tolist():
        table.extend(row, list(range(row * each, (row + 1) * each)))

    def step(tokens: np.ndarray, start: int) -> None:
        batch, count = tokens.shape
        starts, counts = (np.full(batch, value, np.int32) for value in (start, count))
        arrays = table.fill(rows[:batch], starts, counts, StepArrays())
        picked = np.arange(count - 1, tokens.size, count, dtype=np.int32)
        part = own.forward(tokens.reshape(-1), arrays, picked)
        whole = shared[: batch * VOCABULARY].reshape(batch, VOCABULARY)
        whole[:, own.vocabulary.start : own.vocabulary.stop] = part

    step(prompts(), 0)
    for line in sys.stdin:
        batch, steps = map(int, line.split())
        tokens = tokens_of(batch)
        begun = time.perf_counter()
        for _ in range(steps):
            step(tokens, CONTEXT)
        print((time.perf_counter() - begun) / steps, flush=True)


if __name__ == "__main__":
    main()
