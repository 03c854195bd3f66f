"""Where a decode step of one node goes: its kernels one by one, its threads, and its Python.

Three views of model S, bfloat16, context 256, 2 threads:
- *ops*: the kernels of a step alone, in this process, each at the sizes of a batch; `rest` is what a whole forward pass
  takes beyond their sum.
- *threads*: processor seconds that each thread of a serving node uses for a step (as the kernel counts them), beside
  the time of a step as a client sees it. What the main thread uses is Python, gRPC and sampling.
- *Python*: the functions that the main thread was seen in, by py-spy, where that is installed.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.contract import Result, progress
from bench.limits import passes_s
from bench.map import BATCHES, SHARED_STEPS, THREADS, Case
from bench.models import MODELS, Shape, checkpoint
from bench.peers.protocol import Setup
from bench.systems import BLOCK_SIZE, OurSystem, started
from dataplane.executor import StageExecutor
from dataplane.kvcache import KVCache
from kernels.base import Linear
from kernels.cpu import _native, ops
from kernels.cpu.pack import Packed, pack, pack_gate_up
from kernels.memory import Arena

CONTEXT = 256
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
FUNCTIONS_MAX = 12
SAMPLING_S = 4


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A step of one new token for each of `batch` rows (kernels.base.StepArrays); every row has blocks of its own."""

    positions: np.ndarray
    slots: np.ndarray
    cu_q: np.ndarray
    context_lens: np.ndarray
    tables: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @classmethod
    def of(cls, batch: int) -> DecodeStep:
        blocks = -(-CONTEXT // BLOCK_SIZE)
        tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        last = CONTEXT - 1
        return cls(
            positions=np.full(batch, last, np.int64),
            slots=tables[:, last // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + last % BLOCK_SIZE,
            cu_q=np.arange(batch + 1, dtype=np.int32),
            context_lens=np.full(batch, CONTEXT, np.int32),
            tables=tables,
        )


def run(quick: bool) -> Result:
    result = Result(
        "profile", settings={"threads": THREADS, "context": CONTEXT, "model": "S bfloat16", "quick": quick}
    )
    path = checkpoint("S", "bfloat16")
    executor = StageExecutor(
        path,
        0,
        1,
        num_blocks=max(BATCHES) * -(-CONTEXT // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        threads=THREADS,
    )
    for batch in BATCHES:
        _ops(result, executor, MODELS["S"], batch)
    del executor
    context_max = max(CONTEXT + Case("decode", batch, CONTEXT).tokens for batch in BATCHES) + 1
    setup = Setup(str(path), "bfloat16", THREADS, max(BATCHES), context_max, "")
    with started(setup, lambda name: name == "node", result.absent) as systems:
        node = systems["node"]
        assert isinstance(node, OurSystem)
        for batch in BATCHES:
            _threads(result, node, batch)
        _functions(result, node)
    return result


def _ops(result: Result, executor: StageExecutor, shape: Shape, batch: int) -> None:
    """Seconds of a step in each kind of kernel, all layers together."""
    progress(f"  kernels, batch {batch}")
    step, team, arena = DecodeStep.of(batch), _native.Team(THREADS), Arena()
    hidden, layers, kind = shape.hidden_size, shape.num_hidden_layers, torch.bfloat16
    kv_width = shape.num_key_value_heads * shape.head_dim
    seconds: dict[str, float] = {}
    for name, outputs, inputs, times, epilogue in (
        ("qkv", hidden + 2 * kv_width, hidden, layers, ops.STORE),
        ("o", hidden, hidden, layers, ops.ADD),
        ("gate_up", shape.intermediate_size, hidden, layers, ops.SILU_MUL),
        ("down", hidden, shape.intermediate_size, layers, ops.ADD),
        ("head", shape.vocab_size, hidden, 1, ops.FLOAT),
    ):
        gated = epilogue == ops.SILU_MUL
        # As many weights as there are layers: one alone would stay in a cache.
        weights = [
            (pack_gate_up if gated else pack)(
                Linear(torch.randn(outputs * (2 if gated else 1), inputs).to(kind)), arena
            )
            for _ in range(times)
        ]
        x = torch.randn(batch, inputs).to(kind)
        out = torch.zeros(batch, outputs, dtype=torch.float32 if epilogue == ops.FLOAT else kind)
        seconds[name] = _median_s(partial(_products, team, x, weights, out, epilogue))
    q = torch.randn(batch, shape.num_attention_heads, shape.head_dim).to(kind)
    attended, kv = torch.empty_like(q), executor.kv
    assert isinstance(kv, KVCache)
    scale = shape.head_dim**-0.5

    def attention() -> None:
        for layer in range(layers):
            ops.attention(team, kv, layer, step, q, scale, None, attended)

    seconds["attention"] = _median_s(attention)
    tokens, rows = np.arange(3, batch + 3), np.arange(batch, dtype=np.int32)
    # A kernels.base.StepArrays is all that is read of the data plane's StepArrays, whose maker needs a scheduler.
    forward = _median_s(lambda: executor.forward(tokens, None, step, rows))  # type: ignore[arg-type]
    for name, value in seconds.items():
        result.metrics[f"op_{name}_s_b{batch}"] = value
    result.metrics[f"op_rest_s_b{batch}"] = forward - sum(seconds.values())
    result.metrics[f"forward_s_b{batch}"] = forward


def _median_s(work: Callable[[], object]) -> float:
    return statistics.median(passes_s(work, THREADS))


def _products(
    team: _native.Team, x: torch.Tensor, weights: list[Packed], out: torch.Tensor, epilogue: int
) -> None:
    for weight in weights:
        ops.linear(team, x, weight, out, epilogue)


def _threads(result: Result, node: OurSystem, batch: int) -> None:
    """Step time as a client sees it, and processor seconds a step of the node's threads."""
    progress(f"  threads, batch {batch}")
    numbers, case = random.Random(batch), Case("decode", batch, CONTEXT)
    prompts = [[numbers.randrange(3, MODELS["S"].vocab_size) for _ in range(CONTEXT)] for _ in range(batch)]
    (pid,) = node.cluster.node_pids().values()
    before_prompt = _thread_ticks(pid)
    node.generate(prompts, 1)
    before = _thread_ticks(pid)
    answer = node.generate([prompt[::-1] for prompt in prompts], case.tokens)
    # Counters drop what is not positive; other prompts of the same length took the same prefill.
    spent = _thread_ticks(pid) - before - (before - before_prompt)
    steps = case.tokens - 1
    result.metrics[f"step_s_b{batch}"] = batch / case.rate(answer)
    main = spent.pop(str(pid), 0) * TICK_S
    result.metrics[f"main_thread_cpu_s_b{batch}"] = main / steps
    for rank, (_, ticks) in enumerate(spent.most_common(THREADS)):
        result.metrics[f"compute_thread{rank}_cpu_s_b{batch}"] = ticks * TICK_S / steps


def _thread_ticks(pid: int) -> Counter[str]:
    """Clock ticks that each thread of a process has used."""
    ticks: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        ticks[task.name] = int(fields[11]) + int(fields[12])
    return ticks


def _functions(result: Result, node: OurSystem) -> None:
    """Shares of the main thread's samples by function, under a decode of the largest batch."""
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if spy is None:
        result.absent["python_functions"] = "py-spy is not installed"
        return
    (pid,) = node.cluster.node_pids().values()
    numbers, batch = random.Random(0), max(BATCHES)
    prompts = [[numbers.randrange(3, MODELS["S"].vocab_size) for _ in range(16)] for _ in range(batch)]
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder) / "stacks"
        command = [spy, "record", "--pid", str(pid), "--format", "raw", "--rate", "200", "--threads"]
        with subprocess.Popen(
            [*command, "--duration", str(SAMPLING_S), "--output", str(stacks)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as recording:
            while recording.poll() is None:
                node.generate(prompts, SHARED_STEPS)
        if recording.returncode or not stacks.exists():
            result.absent["python_functions"] = f"py-spy ended with {recording.returncode}"
            return
        counts: Counter[str] = Counter()
        for line in stacks.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            if "MainThread" in stack:
                counts[stack.rsplit(";", 1)[-1]] += int(count)
    total = sum(counts.values())
    result.settings["python_functions"] = {
        name: round(count / total, 4) for name, count in counts.most_common(FUNCTIONS_MAX)
    }
