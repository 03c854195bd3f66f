"""The decoder layers of one stage, from a checkpoint's tensors to what kernels/ builds a stage of.

The rule of equal bits (a token's numbers are the same in any chunk, step and batch) is kept by construction:
every operation on rows is a kernel of ours whose arithmetic for a row does not look at the row count."""

import torch

from dataplane.model.config import ModelConfig
from kernels.base import Layer, Linear


def build_layer(
    config: ModelConfig, index: int, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> Layer:
    """Layer `index` from the checkpoint's tensors (see weights.stage_shapes)."""
    prefix = f"model.layers.{index}."

    def vector(name: str) -> torch.Tensor:
        return weights[prefix + name].to(dtype)

    def merged(*names: str) -> Linear:
        biases = [b for b in (weights.get(f"{prefix}{name}.bias") for name in names) if b is not None]
        weight = torch.cat([weights[f"{prefix}{name}.weight"] for name in names])
        return Linear(weight.to(dtype), torch.cat(biases).to(dtype) if biases else None)

    return Layer(
        attention_norm=vector("input_layernorm.weight"),
        qkv=merged("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=vector("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=vector("self_attn.k_norm.weight") if config.qk_norm else None,
        o=merged("self_attn.o_proj"),
        mlp_norm=vector("post_attention_layernorm.weight"),
        gate_up=merged("mlp.gate_proj", "mlp.up_proj"),
        down=merged("mlp.down_proj"),
        window=config.windows[index],
    )
