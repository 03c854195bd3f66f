"""Train the demo model and its draft: `python -m dataplane.demo.train --packages DIR --out DIR`.

Deterministic for a seed on one machine, resumable (an interrupted run goes on from the last state saved in
`OUT/state`), one thread. Progress, loss and samples go to stderr. See CORPUS.md for the corpus.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dataplane.demo import corpus, tokens
from dataplane.demo.export import write_model
from dataplane.demo.net import CONTEXT, Llama, Shape

VOCAB = 2048
WORDS = 4_000  # in words.txt, by which tests judge whether an answer is words
BATCH_TOKENS = 4096
SHORT, LONG_EVERY = 256, 6  # one batch in LONG_EVERY has windows of CONTEXT tokens, the others of SHORT
IGNORED = -100  # torch's "no loss here": BOS follows a cut in the text, not the text
SHAPES = {
    "kevlar-demo": Shape(vocab=VOCAB, hidden=256, layers=8, heads=8, kv_heads=4, ffn=320),
    "kevlar-demo-draft": Shape(vocab=VOCAB, hidden=128, layers=2, heads=4, kv_heads=2, ffn=256),
}
PROMPTS = (
    "<|bos|>It was a fine morning, and",
    '<|bos|>"My dear sister,"',
    "<|bos|><|user|>Tell me a story.<|end|><|assistant|>",
    "<|bos|><|user|>What is love?<|end|><|assistant|>",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """One run: `steps` optimizer steps of BATCH_TOKENS tokens, a checkpoint every `save_every` steps."""

    name: str
    out: Path
    steps: int
    seed: int
    save_every: int
    peak: float = 0.02  # Muon's; the embedding and the norms have AdamW with a fraction of it
    warmup: int = 50


def log(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


class Data:
    """Batches as a pure function of (seed, step), so that a resumed run sees what the first would have."""

    def __init__(self, texts: list[corpus.Chapter], tokenizer: Tokenizer, seed: int) -> None:
        self._texts, self._tokenizer, self._seed = texts, tokenizer, seed
        self.epoch_steps = len(self._stream(0)) // BATCH_TOKENS

    @lru_cache(maxsize=2)  # noqa: B019 - one Data a run
    def _stream(self, epoch: int) -> npt.NDArray[np.int64]:
        """All documents of an epoch end to end, token ids."""
        texts = corpus.documents(self._texts, self._seed * 1_000 + epoch)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return np.concatenate([np.asarray(e.ids, dtype=np.int64) for e in encoded])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [rows, length] int64, rows * length = BATCH_TOKENS."""
        length = CONTEXT if step % LONG_EVERY == LONG_EVERY - 1 else SHORT
        stream = self._stream(step // self.epoch_steps)
        rng = np.random.default_rng((self._seed, step))
        starts = rng.integers(0, len(stream) - length - 1, size=BATCH_TOKENS // length)
        rows = np.stack([stream[s : s + length + 1] for s in starts])
        targets = rows[:, 1:].copy()
        targets[targets == tokens.SPECIAL.index(tokens.BOS)] = IGNORED
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)


class Optimizer:
    """Muon for the matrices, AdamW for the tied embedding and the norms; state kept as named tensors."""

    def __init__(self, model: Llama, settings: Settings) -> None:
        named = list(model.named_parameters())
        self._matrices = [(n, p) for n, p in named if p.ndim == 2 and "embed" not in n]
        self._others = [(n, p) for n, p in named if p.ndim != 2 or "embed" in n]
        self._settings = settings
        matrices, others = [p for _, p in self._matrices], [p for _, p in self._others]
        self._muon: torch.optim.Optimizer = torch.optim.Muon(
            matrices, lr=0.0, weight_decay=0.01, momentum=0.95
        )
        self._adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from the peak to 1 % of it."""
        s = self._settings
        if step < s.warmup:
            return s.peak * (step + 1) / s.warmup
        turn = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, turn))))

    def step(self, step: int) -> None:
        """Apply the gradients and clear them."""
        rate = self.rate(step)
        for group in self._muon.param_groups:
            group["lr"] = rate
        for group in self._adam.param_groups:
            group["lr"] = rate * 0.15
        for optimizer in (self._muon, self._adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor, named `parameter|key`."""
        out: dict[str, Tensor] = {}
        for optimizer, named in ((self._muon, self._matrices), (self._adam, self._others)):
            for name, weight in named:
                for key, value in optimizer.state[weight].items():
                    out[f"{name}|{key}"] = value
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        for optimizer, named in ((self._muon, self._matrices), (self._adam, self._others)):
            for name, weight in named:
                keys = [k for k in state if k.startswith(name + "|")]
                optimizer.state[weight] = {k.rsplit("|", 1)[1]: state[k].clone() for k in keys}


def loss_of(model: torch.nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats a token; matrix products in bfloat16, the loss in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED)


@torch.no_grad()
def sample(model: Llama, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """Prompt and up to `count` tokens sampled at temperature 0.8, as text, special tokens shown."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1].float()
        token = int(torch.multinomial(torch.softmax(logits / 0.8, -1), 1, generator=generator))
        ids.append(token)
        if token in (tokens.SPECIAL.index(tokens.EOS), tokens.SPECIAL.index(tokens.END)):
            break
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def save_state(path: Path, model: Llama, optimizer: Optimizer, step: int) -> None:
    """Write the resumable state, atomically: one file, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {f"model|{k}": v.contiguous() for k, v in model.state_dict().items()}
    held |= {f"opt|{k}": v.contiguous() for k, v in optimizer.state().items()}
    held["step"] = torch.tensor(step)
    new = path.with_suffix(".new")
    save_file(held, new)
    os.replace(new, path)


def load_state(path: Path, model: Llama, optimizer: Optimizer) -> int:
    """Load the state if there is one; the step to go on from."""
    if not path.exists():
        return 0
    held = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in held.items() if k.startswith("model|")})
    optimizer.load({k[4:]: v for k, v in held.items() if k.startswith("opt|")})
    return int(held["step"])


def train(settings: Settings, texts: list[corpus.Chapter], until: int | None = None) -> None:
    """Train one model to the end, or only to step `until`, exporting it into `out/NAME` at every checkpoint."""
    tokenizer = tokens.train((p for c in texts for p in c.paragraphs), VOCAB)
    data = Data(texts, tokenizer, settings.seed)
    model = Llama(SHAPES[settings.name], settings.seed)
    optimizer = Optimizer(model, settings)
    state = settings.out / "state" / f"{settings.name}.safetensors"
    first = load_state(state, model, optimizer)
    count = sum(p.numel() for p in model.parameters())
    log(f"{settings.name}: {count} parameters, step {first} of {settings.steps}, {data.epoch_steps} an epoch")
    started, mean = time.monotonic(), math.nan
    last = min(settings.steps, until or settings.steps)
    for step in range(first, last):
        loss = loss_of(model, *data.batch(step))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(step)
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0:
            speed = (step + 1 - first) * BATCH_TOKENS / (time.monotonic() - started)
            log(f"step {step} loss {mean:.3f} rate {optimizer.rate(step):.5f} {speed:.0f} tokens/s")
        if (step + 1) % settings.save_every == 0 or step + 1 == last:
            save_state(state, model, optimizer, step + 1)
            words = corpus.common_words(texts, WORDS)
            write_model(settings.out / settings.name, model, tokenizer, words)
            for prompt in PROMPTS:
                log("  " + repr(sample(model, tokenizer, prompt, 60, settings.seed)))


def main() -> None:
    """Parse the command line and train both models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and the state")
    parser.add_argument("--only", choices=sorted(SHAPES), help="train this one alone")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--until", type=int, help="stop after this step, to be resumed later")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    texts = corpus.load(args.packages)
    for name in [args.only] if args.only else SHAPES:
        train(Settings(name, args.out, args.steps, args.seed, args.save_every), texts, args.until)


if __name__ == "__main__":
    main()
