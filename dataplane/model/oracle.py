"""An executor without tensors, for real processes without real compute. Needs no torch.

Each stage keeps one 64-bit word for each position in its KV blocks and passes on, for each token, a hash of the
words of all positions up to it. The last stage's hash is the next token. So a token depends on the whole prompt, on
every position, and on what the blocks of every stage hold: a wrongly restored block shows as a wrong token."""

import hashlib

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from dataplane._fast.blocktable import StepArrays
from dataplane.kvcache import KVCache
from dataplane.model.config import ModelConfig, ModelDtype, RopeConfig
from dataplane.model.split import split_layers

Words = npt.NDArray[np.uint64]
WORD_FLOATS = 2  # a word travels as the bits of two float32 values


def mix(x: Words) -> Words:
    """The finalizer of SplitMix64, on each word."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class OracleExecutor:
    """Same interface as executor.StageExecutor. `name` stands for the checkpoint: it seeds every hash."""

    def __init__(
        self,
        name: str,
        stage: int,
        num_stages: int,
        *,
        num_blocks: int,
        block_size: int = 16,
        num_layers: int = 8,
        vocab_size: int = 4096,
        max_positions: int = 2048,
    ) -> None:
        self.layers: range = split_layers(num_layers, num_stages)[stage]
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.hidden_size = WORD_FLOATS
        self.dtype: ModelDtype = "float32"
        self.config = ModelConfig(
            family="oracle",
            vocab_size=vocab_size,
            hidden_size=WORD_FLOATS,
            intermediate_size=1,
            num_layers=num_layers,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            max_positions=max_positions,
            rms_norm_eps=1e-6,
            rope=RopeConfig("default", 10000.0),
            tie_embeddings=False,
            qkv_bias=False,
            o_bias=False,
            mlp_bias=False,
            qk_norm=False,
            windows=(None,) * num_layers,
            dtype="float32",
            eos_token_ids=(),
        )
        digest = hashlib.blake2b(f"{name}|{self.layers}".encode(), digest_size=32)
        self.weights_digest = digest.hexdigest()
        self._seed = np.frombuffer(digest.digest()[:8], np.uint64)
        # One layer whose K and V together are one word a position.
        self.kv = KVCache(num_blocks, 1, 1, block_size, 1, "float32")
        self._words = self.kv.array.reshape(-1).view(np.uint64)

    def forward(
        self,
        tokens: npt.NDArray[np.int64] | None,
        hidden: Buffer | None,
        step: StepArrays,
        sample_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.generic]:
        """See StageExecutor.forward: activations float32 [T, 2], or logits float32 [K, vocab] with one peak."""
        rows = step.num_tokens
        if rows < 1 or (int(step.slots.max()) >= self._words.size):
            raise IndexError("a step needs at least one token, and slots inside the KV cache")
        if self.is_first:
            if tokens is None or tokens.shape != (rows,):
                raise ValueError(f"the first stage needs {rows} tokens")
            entering = mix(tokens.astype(np.uint64) + self._seed)
        else:
            data = memoryview(b"" if hidden is None else hidden).cast("B")
            if data.nbytes != rows * 8:
                raise ValueError(f"expected {rows * 8} bytes of activations, got {data.nbytes}")
            entering = np.frombuffer(data, np.uint64)
        positions = step.positions.astype(np.uint64)
        self._words[step.slots] = mix(entering ^ self._seed ^ (positions << np.uint64(32)))
        leaving = np.empty(rows, np.uint64)
        for row in range(step.num_rows):
            begin, end = int(step.cu_q[row]), int(step.cu_q[row + 1])
            leaving[begin:end] = mix(self._prefix(step, row)[-(end - begin) :] ^ self._seed)
        if not self.is_last:
            return leaving.view(np.float32).reshape(rows, WORD_FLOATS)
        logits = np.zeros((len(sample_rows), self.config.vocab_size), np.float32)
        chosen = leaving[np.asarray(sample_rows, np.int64)] % np.uint64(self.config.vocab_size)
        logits[np.arange(len(sample_rows)), chosen.astype(np.int64)] = 16.0
        return logits

    def _prefix(self, step: StepArrays, row: int) -> Words:
        """For each position of the row's context: the sum of the words up to it, each mixed with its position."""
        length, size = int(step.context_lens[row]), self.kv.block_size
        blocks = step.tables[row, : -(-length // size)].astype(np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)[:length]
        at = np.arange(length, dtype=np.uint64)
        return np.cumsum(mix(self._words[slots] + mix(at)), dtype=np.uint64)
