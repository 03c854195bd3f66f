"""What quantised weights bring in speed: a stage of all layers of model S, alone in this process, so that no scheduler
divides its steps. And what they cost in accuracy: the demo model's perplexity, and how often its likeliest token is
that of float32.

The text is what the float32 model itself draws at temperature 1: it knows nothing better, so that whatever is lost is
the quantisation's. The corpus that it was trained on is not part of the project."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.contract import Result, progress
from bench.map import PROMPT, THREADS
from bench.models import MODELS, checkpoint, four_bits, write_four_bits
from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.demo import model_dir
from dataplane.executor import StageExecutor
from kernels.base import Sums

TEXTS, TOKENS = 16, 256
GROUP = 64  # inputs of the demo model that share a scale of four bits
BLOCK = 16
SEED = 5
CONTEXT = 64  # of the streams that decode
BATCHES = {1: 12, 8: 6, 32: 4}  # streams: steps a round
ROUNDS = 9

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Kind = tuple[Path, Literal["float32", "bfloat16"], Literal["model", "int8"]]


class Model:
    """All layers in one stage, with room for so many texts of so many tokens."""

    def __init__(self, kind: Kind, texts: int, tokens: int, threads: int = 1, sums: Sums = "float") -> None:
        path, dtype, weights = kind
        each = -(-tokens // BLOCK)
        self._stage = StageExecutor(
            path,
            0,
            1,
            num_blocks=texts * each,
            block_size=BLOCK,
            dtype=dtype,
            weights=weights,
            threads=threads,
            sums=sums,
        )
        self._table = BlockTable(texts, each, BLOCK)
        self._rows = np.array([self._table.new_row() for _ in range(texts)], np.int32)
        for row in self._rows.tolist():
            self._table.extend(row, list(range(row * each, (row + 1) * each)))

    def step(self, tokens: Tokens, start: int, last: bool = False) -> Logits:
        """Logits [texts, n, vocab] of n more tokens of the first texts [texts, n], which have `start` tokens; with
        `last` only those of the last one."""
        texts, count = tokens.shape
        starts, counts = (np.full(texts, value, np.int32) for value in (start, count))
        arrays = self._table.fill(self._rows[:texts], starts, counts, StepArrays())
        picked = np.arange(count - 1 if last else 0, tokens.size, count if last else 1, dtype=np.int32)
        out = self._stage.forward(tokens.reshape(-1), None, arrays, picked)
        return np.asarray(out, np.float32).reshape(texts, 1 if last else count, -1)


def measure(result: Result) -> None:
    """stage_tokens_per_s_..., demo_perplexity_KIND and demo_agreement_KIND (a share of 1) into the metrics; how much
    faster than bfloat16 into the ratios."""
    _speed(result)
    _accuracy(result)


def _speed(result: Result) -> None:
    main = checkpoint("S", "bfloat16")
    kinds: dict[str, Kind] = {
        "bfloat16": (main, "bfloat16", "model"),
        "int8": (main, "bfloat16", "int8"),
        "int4": (four_bits(main), "bfloat16", "int8"),
    }
    random = np.random.default_rng(SEED)
    most = max(BATCHES)
    models = {name: Model(kind, most, PROMPT, THREADS) for name, kind in kinds.items()}
    for model in models.values():
        model.step(random.integers(3, MODELS["S"].vocab_size, (most, CONTEXT)), 0, last=True)
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for batch, steps in BATCHES.items():
            tokens = random.integers(3, MODELS["S"].vocab_size, (batch, 1))
            for name, model in models.items():
                begun = time.perf_counter()
                for _ in range(steps):
                    model.step(tokens, CONTEXT)
                took = (time.perf_counter() - begun) / steps / batch
                seconds.setdefault(f"b{batch}", {}).setdefault(name, []).append(took)
        prompt = random.integers(3, MODELS["S"].vocab_size, (1, PROMPT))
        for name, model in models.items():
            begun = time.perf_counter()
            model.step(prompt, 0, last=True)
            took = (time.perf_counter() - begun) / PROMPT
            seconds.setdefault("prefill", {}).setdefault(name, []).append(took)
        for model in models.values():  # the prompt took the first text's place
            model.step(random.integers(3, MODELS["S"].vocab_size, (1, CONTEXT)), 0, last=True)
    for case, by_kind in seconds.items():
        for name, spent in by_kind.items():
            result.measure(f"stage_tokens_per_s_{case}_{name}", [1 / one for one in spent])
            if name != "bfloat16":
                pairs = zip(by_kind["bfloat16"], spent, strict=True)
                result.measure(f"stage_{case}_{name}_bfloat16", [a / b for a, b in pairs], "ratios")
        best = ", ".join(f"{name} {1 / min(spent):.0f}" for name, spent in by_kind.items())
        progress(f"  stage alone, {case}: {best} tokens/s")


def _accuracy(result: Result) -> None:
    demo = model_dir()
    texts = drawn(Model((demo, "float32", "model"), TEXTS, TOKENS))
    with tempfile.TemporaryDirectory(prefix="kf-bench-int4-") as scratch:
        four = Path(scratch)
        write_four_bits(demo, four, GROUP)
        kinds: dict[str, Kind] = {
            "float32": (demo, "float32", "model"),
            "bfloat16": (demo, "bfloat16", "model"),
            "int8": (demo, "bfloat16", "int8"),
            "int4": (four, "bfloat16", "int8"),
        }
        reference: Tokens | None = None
        for name, kind in kinds.items():
            logits = Model(kind, TEXTS, TOKENS).step(texts, 0)
            likeliest = logits.argmax(-1)
            reference = likeliest if reference is None else reference
            perplexity, agreement = perplexity_of(logits, texts), float((likeliest == reference).mean())
            result.metrics[f"demo_perplexity_{name}"] = perplexity
            result.metrics[f"demo_agreement_{name}"] = agreement
            progress(f"  demo model in {name}: perplexity {perplexity:.3f}, agreement {agreement:.4f}")


def drawn(model: Model) -> Tokens:
    """[TEXTS, TOKENS]: texts of the model's own, from its first token on."""
    random = np.random.default_rng(SEED)
    tokens: list[Tokens] = [np.zeros((TEXTS, 1), np.int64)]
    while len(tokens) < TOKENS:
        # The largest of the logits plus Gumbel noise is a draw at temperature 1.
        logits = model.step(tokens[-1], len(tokens) - 1)[:, -1]
        tokens.append((logits + random.gumbel(size=logits.shape)).argmax(-1)[:, None])
    return np.concatenate(tokens, 1)


def perplexity_of(logits: Logits, texts: Tokens) -> float:
    """Of each token but the first, by the logits before it."""
    shifted = logits[:, :-1].astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1))
    chosen = np.take_along_axis(shifted, texts[:, 1:, None], -1)[..., 0]
    return float(np.exp((total - chosen).mean()))
