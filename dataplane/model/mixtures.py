"""Mixtures of experts, as config.json describes them and checkpoints name their tensors. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from dataplane.model.fields import Fields

EXPERTS_MAX = 1024  # KF_EXPERTS_MAX of kernels/cpu/kernels.h


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """`layers` are mixtures of `count` experts, of which a row takes `chosen`. normalised: their weights add up to 1.
    module: what the checkpoint calls the mixture."""

    count: int
    chosen: int
    intermediate: int
    normalised: bool
    layers: tuple[int, ...]
    module: Literal["mlp", "block_sparse_moe"]

    @property
    def router(self) -> str:
        return f"{self.module}.gate"

    def names(self, expert: int) -> tuple[str, str, str]:
        """Gate, up and down of an expert."""
        parts = ("gate_proj", "up_proj", "down_proj") if self.module == "mlp" else ("w1", "w3", "w2")
        gate, up, down = (f"{self.module}.experts.{expert}.{part}" for part in parts)
        return gate, up, down


def read_experts(f: Fields, family: str, layers: int) -> ExpertsConfig | None:
    """None: a family without. Raises ModelError."""
    match family:
        case "mixtral":
            count = f.integer("num_local_experts", 8, high=EXPERTS_MAX)
            chosen = f.integer("num_experts_per_tok", 2, high=count)
            intermediate = f.integer("intermediate_size")
            return ExpertsConfig(count, chosen, intermediate, True, tuple(range(layers)), "block_sparse_moe")
        case "qwen3_moe":
            key, other = "num_experts", "num_local_experts"  # two names of one number
            if f.values.get(key) is None:
                key, other = other, key
            count = f.integer(key, 128, high=EXPERTS_MAX)
            if f.integer(other, count) != count:
                raise f.error(other, f"{f.values[other]} does not fit {key} ({count})")
            chosen = f.integer("num_experts_per_tok", 8, high=count)
            intermediate = f.integer("moe_intermediate_size", 768)
            mixed = _mixed_layers(f, layers)
            return ExpertsConfig(count, chosen, intermediate, f.flag("norm_topk_prob"), mixed, "mlp")
        case _:
            return None


def _mixed_layers(f: Fields, layers: int) -> tuple[int, ...]:
    plain = f.values.get("mlp_only_layers")
    if plain is None:
        plain = []
    if not isinstance(plain, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in plain):
        raise f.error("mlp_only_layers", f"expected a list of layers, found {plain!r:.80}")
    step = f.integer("decoder_sparse_step", 1)
    return tuple(i for i in range(layers) if i not in plain and (i + 1) % step == 0)
