"""What ranks cost: a stage of all layers of model S, alone, as one node of two threads and as two ranks of one thread
each, which exchange sums in shared memory. And what sums in fixed point cost one node.

A step decodes one token of each stream, and ends when all logits are in one place. The ranks are processes of their own
(ranks_rank.py) and take turns with the stages of this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.contract import Result, progress
from bench.map import THREADS
from bench.models import MODELS, checkpoint
from bench.quantised import CONTEXT, ROUNDS, Model
from kernels.base import Sums
from kernels.ranks.exchange import make_memory

RANKS = 2
BATCHES = {1: 12, 8: 6, 32: 4}  # streams: steps a round
SEED = 6
ROOT = Path(__file__).parents[1]
VOCABULARY, HIDDEN = MODELS["S"].vocab_size, MODELS["S"].hidden_size
NUMBERS_MAX = max(BATCHES) * CONTEXT * HIDDEN  # of the exchange: prompts are one step
KINDS: tuple[Sums, ...] = ("float", "fixed")


class Ranks:
    """The processes. Raises RuntimeError when one of them ends."""

    def __init__(self, path: Path) -> None:
        exchange, self._logits = make_memory(RANKS, NUMBERS_MAX), os.memfd_create("kf-bench-logits")
        shape = (max(BATCHES), VOCABULARY)
        os.ftruncate(self._logits, shape[0] * shape[1] * 4)
        try:
            self._processes = [
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "bench.ranks_rank",
                        str(path),
                        str(exchange),
                        str(self._logits),
                        str(rank),
                    ],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[exchange, self._logits],
                )
                for rank in range(RANKS)
            ]
        finally:
            os.close(exchange)
        try:
            self.step(1, 1)  # until all are there
        except RuntimeError:
            self.close()
            raise

    def step(self, batch: int, steps: int) -> float:
        """Seconds of one of so many steps, of the rank that took the longest."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{batch} {steps}\n".encode())
            process.stdin.flush()
        return max(map(self._answer, self._processes))

    def _answer(self, process: subprocess.Popen[bytes]) -> float:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank has ended with {process.wait()}")
        return float(line)

    def logits(self, batch: int) -> npt.NDArray[np.float32]:
        """[batch, vocabulary] of the last step."""
        count = batch * VOCABULARY
        return np.frombuffer(os.pread(self._logits, count * 4, 0), np.float32).reshape(batch, VOCABULARY)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        os.close(self._logits)


def tokens_of(batch: int) -> npt.NDArray[np.int64]:
    """[batch, 1]: what every step of so many streams decodes."""
    return np.random.default_rng(batch).integers(3, VOCABULARY, (batch, 1))


def prompts() -> npt.NDArray[np.int64]:
    """[streams, CONTEXT]: what they have before."""
    return np.random.default_rng(SEED).integers(3, VOCABULARY, (max(BATCHES), CONTEXT))


def measure(result: Result) -> None:
    """ranks2_tokens_per_s_bN into the metrics; bN_ranks2_node, against a node of as many threads, and bN_fixed_float,
    of a node with fixed-point sums against one without, into the ratios. Raises RuntimeError if the ranks' logits are
    not the node's."""
    path = checkpoint("S", "bfloat16")
    nodes = {
        kind: Model((path, "bfloat16", "model"), max(BATCHES), CONTEXT + 1, THREADS, kind) for kind in KINDS
    }
    for node in nodes.values():
        node.step(prompts(), 0, last=True)
    ranks = Ranks(path)
    seconds: dict[int, dict[str, list[float]]] = {batch: {} for batch in BATCHES}
    try:
        for _ in range(ROUNDS):
            for batch, steps in BATCHES.items():
                took = seconds[batch]
                for name, node in nodes.items():
                    begun = time.perf_counter()
                    for _ in range(steps):
                        logits = node.step(tokens_of(batch), CONTEXT)
                    took.setdefault(name, []).append((time.perf_counter() - begun) / steps)
                took.setdefault("ranks2", []).append(ranks.step(batch, steps))
                if ranks.logits(batch).tobytes() != logits.tobytes():
                    raise RuntimeError(f"the logits of {RANKS} ranks are not those of one node")
    finally:
        ranks.close()
    for batch, took in seconds.items():
        result.measure(f"ranks2_tokens_per_s_b{batch}", [batch / one for one in took["ranks2"]])
        for label, spent in (("ranks2_node", took["ranks2"]), ("fixed_float", took["fixed"])):
            pairs = zip(took["float"], spent, strict=True)
            result.measure(f"b{batch}_{label}", [a / b for a, b in pairs], "ratios")
        best = ", ".join(f"{name} {batch / min(spent):.0f}" for name, spent in took.items())
        progress(f"  stage alone, b{batch}: {best} tokens/s")
