"""What quantised weights cost in accuracy, with the demo model: perplexity, and how often the likeliest token is that
of float32. The text is what the float32 model itself draws at temperature 1: it knows nothing better, so that whatever
is lost is the quantisation's. The corpus that it was trained on is not part of the project."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.contract import Result, progress
from bench.models import write_four_bits
from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.demo import model_dir
from dataplane.executor import StageExecutor

TEXTS, TOKENS = 16, 256
GROUP = 64  # inputs of the demo model that share a scale of four bits
BLOCK = 16
SEED = 5

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


class Model:
    """All layers in one stage, for TEXTS texts at once."""

    def __init__(
        self, path: Path, dtype: Literal["float32", "bfloat16"], weights: Literal["model", "int8"]
    ) -> None:
        blocks = TEXTS * -(-TOKENS // BLOCK)
        self._stage = StageExecutor(
            path, 0, 1, num_blocks=blocks, block_size=BLOCK, dtype=dtype, weights=weights
        )
        self._table = BlockTable(TEXTS, blocks // TEXTS, BLOCK)
        self._rows = np.array([self._table.new_row() for _ in range(TEXTS)], np.int32)
        each = blocks // TEXTS
        for row in self._rows.tolist():
            self._table.extend(row, list(range(row * each, (row + 1) * each)))
        self._length = 0

    def step(self, tokens: Tokens) -> Logits:
        """Logits [TEXTS, n, vocab] of n more tokens of each text [TEXTS, n]."""
        count = tokens.shape[1]
        starts, counts = (np.full(TEXTS, value, np.int32) for value in (self._length, count))
        arrays = self._table.fill(self._rows, starts, counts, StepArrays())
        picked = np.arange(tokens.size, dtype=np.int32)
        out = self._stage.forward(tokens.reshape(-1), None, arrays, picked)
        self._length += count
        return np.array(out, np.float32).reshape(TEXTS, count, -1)


def measure(result: Result) -> None:
    """perplexity_KIND and agreement_KIND, a share of 1, into the metrics."""
    demo = model_dir()
    texts = drawn(Model(demo, "float32", "model"))
    with tempfile.TemporaryDirectory(prefix="kf-bench-int4-") as scratch:
        four = Path(scratch)
        write_four_bits(demo, four, GROUP)
        kinds: dict[str, tuple[Path, Literal["float32", "bfloat16"], Literal["model", "int8"]]] = {
            "float32": (demo, "float32", "model"),
            "bfloat16": (demo, "bfloat16", "model"),
            "int8": (demo, "bfloat16", "int8"),
            "int4": (four, "bfloat16", "int8"),
        }
        reference: Tokens | None = None
        for kind, (path, dtype, weights) in kinds.items():
            logits = Model(path, dtype, weights).step(texts)
            likeliest = logits.argmax(-1)
            reference = likeliest if reference is None else reference
            perplexity, agreement = perplexity_of(logits, texts), float((likeliest == reference).mean())
            result.metrics[f"demo_perplexity_{kind}"] = perplexity
            result.metrics[f"demo_agreement_{kind}"] = agreement
            progress(f"  demo model in {kind}: perplexity {perplexity:.3f}, agreement {agreement:.4f}")


def drawn(model: Model) -> Tokens:
    """[TEXTS, TOKENS]: texts of the model's own, from its first token on."""
    random = np.random.default_rng(SEED)
    tokens: list[Tokens] = [np.zeros((TEXTS, 1), np.int64)]
    while len(tokens) < TOKENS:
        # The largest of the logits plus Gumbel noise is a draw at temperature 1.
        logits = model.step(tokens[-1])[:, -1]
        tokens.append((logits + random.gumbel(size=logits.shape)).argmax(-1)[:, None])
    return np.concatenate(tokens, 1)


def perplexity_of(logits: Logits, texts: Tokens) -> float:
    """Of each token but the first, by the logits before it."""
    shifted = logits[:, :-1].astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1))
    chosen = np.take_along_axis(shifted, texts[:, 1:, None], -1)[..., 0]
    return float(np.exp((total - chosen).mean()))
