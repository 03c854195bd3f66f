"""Decode rate of one node and of a 4-stage pipeline, whole path (gateway to sampler), against transformers.

Every system has the demo model in float32, one compute thread a process, greedy, and produces the same number of tokens
for the same prompts. `transformers` runs `generate` in this process, batched; ours serves as many streams.
The rate is tokens after the first of each stream over the time from the last first token to the end. `share_of_limit`
is the share of the machine's read bandwidth that a batch of one needs to read each weight once a token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.cluster import run_streams, running
from bench.contract import Result, progress
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import sample_prompts
from controlplane.kfadmin.local import LocalCluster
from dataplane.demo import model_dir
from dataplane.executor import StageExecutor

BATCHES = (1, 8, 32)
TOKENS = 128
PROMPT_WORDS = 24


def run(quick: bool) -> Result:
    rounds = 3 if quick else 7
    result = Result(
        "decode",
        settings={"max_tokens": TOKENS, "rounds": rounds, "batches": BATCHES, "threads": 1, "quick": quick},
    )
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        node = stack.enter_context(running(Mode.NONE, instances=1, stages=1))
        pipeline = stack.enter_context(running(Mode.NONE, instances=1, stages=4))
        peer = _transformers()
        result.measure("load_s", [_load_s() for _ in range(rounds)])
        for batch in BATCHES:
            for number in range(rounds):
                progress(f"  batch {batch}, round {number + 1}/{rounds}")
                for name, cluster in (("node", node), ("pipeline4", pipeline)):
                    rates.setdefault(f"{name}_{batch}", []).append(_ours(cluster, batch))
                if peer is not None:
                    rates.setdefault(f"transformers_{batch}", []).append(peer(batch))
        for name, cluster in (("node", node), ("pipeline4", pipeline)):
            result.metrics[f"{name}_peak_bytes"] = sum(map(_peak_bytes, cluster.node_pids().values()))
    weights = (model_dir() / "model.safetensors").stat().st_size
    result.metrics["share_of_limit"] = statistics.median(rates["node_1"]) * weights / _read_bandwidth()
    for batch in BATCHES:
        ours = result.measure(f"node_tokens_per_s_b{batch}", rates[f"node_{batch}"])
        four = result.measure(f"pipeline4_tokens_per_s_b{batch}", rates[f"pipeline4_{batch}"])
        result.ratios[f"b{batch}_pipeline4_node"] = four / ours
        if peer is None:
            result.absent["transformers"] = "not installed: pip install -e '.[bench]'"
            continue
        theirs = result.measure(
            f"transformers_tokens_per_s_b{batch}", rates[f"transformers_{batch}"], "baseline"
        )
        result.ratios[f"b{batch}_transformers"] = ours / theirs
    return result


def _ours(cluster: LocalCluster, batch: int) -> float:
    prompts = [replace(p, temperature=0.0) for p in sample_prompts(batch, TOKENS, words=PROMPT_WORDS)]
    streams = run_streams(cluster, prompts)
    begun = max(stream.times[0] for stream in streams)
    ended = max(stream.times[-1] for stream in streams)
    tokens = sum(sum(at > begun for at in stream.times) for stream in streams)
    return tokens / (ended - begun)


def _load_s() -> float:
    """Seconds from nothing to a stage of the whole model that could run."""
    started = time.perf_counter()
    StageExecutor(model_dir(), 0, 1, num_blocks=64)
    return time.perf_counter() - started


def _peak_bytes(pid: int) -> int:
    """Most resident memory that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmHWM")


def _read_bandwidth() -> float:
    """Bytes a second that one thread reads from memory (median of seven passes over 256 MB)."""
    data = np.ones(1 << 26, np.float32)
    passes = []
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        passes.append(data.nbytes / (time.perf_counter() - started))
    return statistics.median(passes)


def _transformers() -> Callable[[int], float] | None:
    """A function that measures one batch with transformers; None if it is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        return None
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir(), padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)  # in evaluation mode
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def generate(inputs: Mapping[str, Any], count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                **inputs,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        return time.perf_counter() - started

    def measure(batch: int) -> float:
        texts = [p.text for p in sample_prompts(batch, TOKENS, words=PROMPT_WORDS)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        # The prompt and the first token are not decoding: their time is taken off.
        first = generate(inputs, 1)
        return batch * (TOKENS - 1) / max(generate(inputs, TOKENS) - first, 1e-9)

    return measure
