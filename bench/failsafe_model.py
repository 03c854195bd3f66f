"""What a stage of several H100s takes for a step, by calculation. Nothing here was measured on a GPU.

Each figure is a data sheet's, times a part that is reached: MATRIX_REACHED and so on are assumptions, the same for
all that is compared. Within a step products, attention, reading and exchanging follow each other; nothing is hidden
behind anything else. All ranks wait for the slowest one in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dataplane.core.ranks.recovery import Bandwidth, Sizes
from kernels.ranks.cuts import ffn_shards
from kernels.ranks.layout import Layout

# NVIDIA H100 SXM5 data sheet: dense bf16, HBM3, NVLink 4 (900 GB/s, both ways together), PCIe 5.0 x16 one way.
H100_FLOPS, H100_MEMORY_BYTES_PER_S, H100_BYTES = 989e12, 3.35e12, 80 * 1024**3
NVLINK_BYTES_PER_S, PCIE_BYTES_PER_S = 450e9, 64e9
MATRIX_REACHED, ATTENTION_REACHED, MEMORY_REACHED, LINK_REACHED = 0.6, 0.4, 0.8, 0.8
MEMORY_USED = 0.9  # for weights and KV; the rest is activations and the libraries' own (vLLM's default)
STEP_FIXED_S = 0.003  # scheduling, sampling, launching
REDUCE_FIXED_S = 10e-6  # an all-reduce of nothing
BLOCK_TOKENS = 16
BYTES = 2  # of a weight, an activation, a number of KV: bf16
# An all-reduce scatters sums and gathers totals. Sums that are exact in any order are 64-bit integers on their way
# (docs/decisions/sums.md), totals are bf16; the usual all-reduce has bf16 both times.
EXACT_SUM_BYTES, FLOAT_SUM_BYTES = 8, 2

BANDWIDTH = Bandwidth(host=PCIE_BYTES_PER_S * LINK_REACHED, peer=NVLINK_BYTES_PER_S * LINK_REACHED)


@dataclass(frozen=True, slots=True)
class Model:
    """Its shape, from its published config.json."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    experts: int = 1
    experts_used: int = 1
    head_size: int = 128

    @property
    def shards(self) -> int:
        """Of the FFN in each layer, as kernels/ranks cuts it."""
        return ffn_shards(self.ffn)

    @property
    def head_weights(self) -> int:
        """Numbers of one KV head's part of q, k, v and o in a layer."""
        queries = self.heads // self.kv_heads
        return self.hidden * self.head_size * (2 * queries + 2)

    @property
    def ffn_weights(self) -> int:
        """Numbers of one layer's FFN, all experts together."""
        return 3 * self.hidden * self.ffn * self.experts

    @property
    def sizes(self) -> Sizes:
        """The embedding and the output matrix are cut like the FFN, and counted with its shards."""
        shard = self.ffn_weights / self.shards + self.vocabulary_weights / (self.shards * self.layers)
        return Sizes(
            block=BLOCK_TOKENS * 2 * self.head_size * BYTES,
            head=self.head_weights * BYTES,
            shard=round(shard * BYTES),
        )

    @property
    def vocabulary_weights(self) -> int:
        return 2 * self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        sizes = self.sizes
        return self.layers * (self.kv_heads * sizes.head + self.shards * sizes.shard)


LLAMA_70B = Model("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256)
MIXTRAL_8X22B = Model("mixtral-8x22b", 56, 6144, 48, 8, 16384, 32768, experts=8, experts_used=2)


@dataclass(slots=True)
class Work:
    """What a step has for one rank. For data-parallel heads: of requests that the rank owns."""

    tokens: int = 0
    pairs: float = 0.0  # of a prompt's tokens with those before them, each computed once
    read: int = 0  # positions whose KV decoding tokens read

    def add(self, tokens: int, pairs: float, read: int = 0) -> None:
        self.tokens += tokens
        self.pairs += pairs
        self.read += read


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    compute_s: float  # products and attention, of the slowest rank in each layer ...
    compute_mean_s: float  # ... and of all ranks in the mean


class Cost:
    """Of steps of one model in one layout. `sum_bytes`: of a number of a partial sum on its way."""

    def __init__(self, model: Model, layout: Layout, sum_bytes: int) -> None:
        self.model, self.ranks = model, layout.ranks
        count = len(layout.ranks)
        self._for_all, self._for_owned = layout.heads_per_rank, layout.heads_data_parallel
        shards = [
            [len(layout.shards_of(rank, layer)) for rank in layout.ranks] for layer in range(model.layers)
        ]
        self._ffn_max = sum(max(row) for row in shards) / model.shards / model.layers
        self._reduce_bytes = (count - 1) / count * (sum_bytes + BYTES) if count > 1 else 0.0
        self._reduce_fixed_s = 2 * model.layers * REDUCE_FIXED_S if count > 1 else 0.0
        sizes = model.sizes
        heads = self._for_all + self._for_owned
        most = max(sum(row[place] for row in shards) for place in range(count))
        self.rank_weight_bytes = model.layers * heads * sizes.head + most * sizes.shard
        self.kv_room_bytes = max(0.0, H100_BYTES * MEMORY_USED - self.rank_weight_bytes)

    @property
    def token_pairs(self) -> int:
        """A token's products of a head, in pairs of positions that take as long: for the router."""
        queries = self.model.heads // self.model.kv_heads
        pair = 4 * queries * self.model.head_size / ATTENTION_REACHED
        return round(2 * self.model.head_weights / MATRIX_REACHED / pair)

    @property
    def fits(self) -> bool:
        """Whether the weights do, with room for one long request."""
        return self.kv_room_bytes > H100_BYTES * 0.01

    def moved_bytes(self, tokens: int) -> int:
        """KV of a request's data-parallel heads, which goes to another owner."""
        return self.model.layers * self._for_owned * tokens * 2 * self.model.head_size * BYTES

    def blocks(self) -> int:
        """Blocks of planes that a rank has room for."""
        return int(self.kv_room_bytes // self.model.sizes.block)

    def step(self, owned: Mapping[int, Work], sampled: int) -> Step:
        """One step; `sampled`: rows of which a token is drawn."""
        model, count = self.model, len(self.ranks)
        total = Work()
        for work in owned.values():
            total.add(work.tokens, work.pairs, work.read)
        layers = model.layers
        # The FFN (experts that a token takes) and the output matrix, cut into shards.
        active = model.ffn_weights * model.experts_used / model.experts
        ffn_s = (layers * active * total.tokens + model.vocabulary_weights / 2 * sampled) * 2
        ffn_s /= H100_FLOPS * MATRIX_REACHED
        attention = [self._attention_s(total, owned.get(rank, Work())) for rank in self.ranks]
        slowest = max(attention) + ffn_s * self._ffn_max
        mean = sum(attention) / count + ffn_s / count
        # A step reads each weight once; where few tokens come, products wait for that.
        touched = 1 - (1 - model.experts_used / model.experts) ** total.tokens if model.experts > 1 else 1.0
        read_s = self.rank_weight_bytes * touched / (H100_MEMORY_BYTES_PER_S * MEMORY_REACHED)
        kv_bytes = layers * 2 * model.head_size * BYTES
        kv_read = max(
            self._for_all * total.read + self._for_owned * owned.get(rank, Work()).read for rank in self.ranks
        )
        kv_s = kv_bytes * kv_read / (H100_MEMORY_BYTES_PER_S * MEMORY_REACHED)
        exchange_s = 2 * layers * total.tokens * model.hidden * self._reduce_bytes / BANDWIDTH.peer
        seconds = STEP_FIXED_S + max(slowest, read_s) + kv_s + self._reduce_fixed_s + exchange_s
        return Step(seconds, slowest, mean)

    def _attention_s(self, total: Work, own: Work) -> float:
        model = self.model
        tokens = self._for_all * total.tokens + self._for_owned * own.tokens
        pairs = self._for_all * total.pairs + self._for_owned * own.pairs
        products = 2 * model.layers * model.head_weights * tokens / (H100_FLOPS * MATRIX_REACHED)
        queries = model.heads // model.kv_heads
        scores = 4 * model.layers * queries * model.head_size * pairs / (H100_FLOPS * ATTENTION_REACHED)
        return products + scores
