"""An executor without tensors: a token is a hash of everything that it ought to depend on.

Each position has a running hash that travels from stage to stage in the place of activations. A stage mixes it with
what it reads back from the KV blocks of all positions before, which it wrote there itself as hashes. So a block that is
stale, swapped, cut off or restored wrongly gives another hash, and another token; and as the weights of the sum depend
on absolute positions alone, chunks, batches and peers make no difference. Time is a device profile's (`devices.py`).

Everything is modulo 2**64. For position p of stage s, with h[p] the hash from the stage before (of token and position
at the first one):

    kv[p] = mix(h[p] + salt[s])                          written to the block, 8 bytes a position
    seen[p] = sum of kv[q] * weight[q] over q <= p       read from the blocks
    out[p] = mix(h[p] ^ seen[p] * ODD)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import StepArrays
from dataplane._fast.hashing import stage_hashes
from dataplane.core import activations
from dataplane.devices import DeviceProfile
from dataplane.kvcache import KVCache
from dataplane.model.config import ModelConfig
from dataplane.transport.frames import Buffer

Hashes = npt.NDArray[np.uint64]

HASH_BYTES = 8  # of a position, in a KV block and on a link
CANDIDATES = 4  # tokens that a position may be followed by: which one it is, the request's seed says
LOGIT_GAP = 0.5  # between one candidate and the next
LOGIT_OTHERS = -1e4  # finite, and its probability is 0

ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31))
_RANKS = np.arange(0, 16 * CANDIDATES, 16, dtype=np.uint64)[:, None]
_TOKEN, _POSITION = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)


def mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al., 2014): a bijection in which every bit depends on every bit."""
    values = (values ^ (values >> _SHIFTS[0])) * _MIX_1
    values = (values ^ (values >> _SHIFTS[1])) * _MIX_2
    return values ^ (values >> _SHIFTS[2])


def first_hashes(tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Hashes:
    """What the first stage begins with, for tokens [T] at absolute positions [T]."""
    return mix(tokens.astype(np.uint64) * _TOKEN + positions.astype(np.uint64) * _POSITION)


def kv_hashes(hashes: Hashes, stage: int) -> Hashes:
    return mix(hashes + np.uint64((stage + 1) * int(ODD) % 2**64))


def position_weights(count: int) -> Hashes:
    """Odd, so that no change of one position is lost. A longer table begins with a shorter one."""
    return mix(np.arange(count, dtype=np.uint64) + np.uint64(1)) | np.uint64(1)


def out_hashes(hashes: Hashes, seen: Hashes) -> Hashes:
    return mix(hashes ^ seen * ODD)


class Logits:
    """The logits of a batch, in one buffer from which only what was set last has to be cleared."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._values = np.empty((0, vocab_size), np.float32)
        self._set = (np.empty(0, np.intp), np.empty((CANDIDATES, 0), np.intp))

    def of(self, hashes: Hashes) -> npt.NDArray[np.float32]:
        """[K, vocab_size] for the last stage's hashes [K]: a few candidates, the likeliest first.

        Valid until the next call."""
        count = len(hashes)
        if count > len(self._values):
            self._values = np.full((2 * count, self._vocab_size), LOGIT_OTHERS, np.float32)
        else:
            self._values[self._set] = LOGIT_OTHERS
        rows = np.arange(count)
        tokens = ((hashes >> _RANKS) % np.uint64(self._vocab_size)).astype(np.intp)
        for rank in reversed(range(CANDIDATES)):  # where two are the same token the likelier one stays
            self._values[rows, tokens[rank]] = -LOGIT_GAP * rank
        self._set = (rows, tokens)
        return self._values[:count]


class OracleExecutor:
    """One stage. The interface is `executor.StageExecutor`'s; beside it `step_s`, which that one leaves at 0.
    Nothing is ever suspect: hashes are no numbers.

    Not thread-safe. Raises ValueError for a stage that does not exist. `time_scale`: the device is faster than its
    profile by that factor."""

    def __init__(
        self,
        config: ModelConfig,
        stage: int,
        num_stages: int,
        *,
        num_blocks: int,
        block_size: int = 16,
        profile: DeviceProfile,
        time_scale: float = 1.0,
    ) -> None:
        self.config = config
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage {stage} is not one of {num_stages}")
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.kv = KVCache(num_blocks, 1, 1, block_size, 1, "float32")
        assert self.kv.block_bytes == HASH_BYTES * block_size
        self.block_wire_bytes = profile.kv_bytes_per_token * block_size
        self.weights_digest = f"oracle-{stage}-of-{num_stages}"
        self.numerics = f"oracle-{block_size}"
        self.light_tokens = profile.light_tokens
        self.suspect = self.may_wait = False
        self.ranks_lost = 0
        self.team = None  # see dataplane/executor.py
        self.step_s = 0.0  # how long the device is busy with what forward() got last
        self._stage = stage
        self._profile = profile
        self._time_scale = time_scale
        self._blocks: Hashes = self.kv.array.reshape(num_blocks, -1).view(np.uint64)
        self._logits = Logits(self.config.vocab_size)
        self._weights = position_weights(block_size)

    def troubles(self) -> tuple[str, ...]:
        return ()

    def warm_up(self) -> None:
        """A hash is as fast the first time."""

    def adopt(self, hidden: activations.Buffer, tokens: int) -> activations.Buffer:
        """See `StageExecutor.adopt`: hashes have one form."""
        return hidden

    def forward(
        self,
        tokens: npt.NDArray[np.int64] | None,
        hidden: Buffer | None,
        step: StepArrays,
        sample_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.generic]:
        """See `StageExecutor.forward`; activations are hashes uint64 [T]."""
        rows = step.num_tokens
        if rows < 1:
            raise ValueError("a step needs at least one token")
        hashes = self._load(tokens, hidden, step)
        positions = step.tables.shape[1] * self.kv.block_size
        if positions > len(self._weights):
            self._weights = position_weights(2 * positions)
        out = stage_hashes(hashes, self._blocks, step, self._stage, self._weights)
        result: npt.NDArray[np.generic] = out
        if self.is_last:
            result = self._logits.of(out[sample_rows])
        self.step_s = self._profile.step_s(rows, int(step.context_lens.sum())) / self._time_scale
        return result

    def beats(self) -> int:
        return -1  # over before anybody could look

    def _load(self, tokens: npt.NDArray[np.int64] | None, hidden: Buffer | None, step: StepArrays) -> Hashes:
        rows = step.num_tokens
        if self.is_first:
            if tokens is None or tokens.shape != (rows,) or tokens.dtype != np.int64:
                raise ValueError(f"the first stage needs {rows} tokens as int64")
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
                raise IndexError(f"a token is outside the vocabulary of {self.config.vocab_size}")
            return first_hashes(tokens, step.positions)
        data = memoryview(b"" if hidden is None else hidden)
        if data.nbytes != rows * HASH_BYTES:
            raise ValueError(f"expected {rows * HASH_BYTES} bytes of activations, got {data.nbytes}")
        return np.frombuffer(data.cast("B"), np.uint64)
