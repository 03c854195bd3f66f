"""The decoder layers of one stage, from a checkpoint's tensors to what kernels/ builds a stage of.

The rule of equal bits (a token's numbers are the same in any chunk, step and batch) is kept by construction:
every operation on rows is a kernel of ours whose arithmetic for a row does not look at the row count."""

from typing import Literal

import torch

from dataplane.model.config import ModelConfig
from dataplane.model.quantised import values_of, weight_of
from kernels.base import Layer, Linear
from kernels.quantised import Quantised, Weight, int8_rows, joined

Weights = Literal["model", "int8"]


def matrix(
    config: ModelConfig, names: list[str], weights: dict[str, torch.Tensor], dtype: torch.dtype, kind: Weights
) -> Weight:
    """The checkpoint's weights of these names, their outputs one after another. Of kind "int8", those that are not
    quantised yet become so."""
    found = [weight_of(config, name, weights) for name in names]
    if kind == "model":
        return joined(found, dtype)
    whole = joined(found, torch.float32)
    return whole if isinstance(whole, Quantised) else int8_rows(whole)


def build_layer(
    config: ModelConfig,
    index: int,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    kind: Weights = "model",
) -> Layer:
    """Layer `index` from the checkpoint's tensors (see weights.stage_shapes)."""
    prefix = f"model.layers.{index}."

    def vector(name: str) -> torch.Tensor:
        return weights[prefix + name].to(dtype)

    def merged(*names: str) -> Linear:
        given = [f"{prefix}{name}.bias" for name in names if f"{prefix}{name}.bias" in weights]
        bias = torch.cat([values_of(config, name, weights) for name in given]).to(dtype) if given else None
        return Linear(
            matrix(config, [f"{prefix}{name}.weight" for name in names], weights, dtype, kind), bias
        )

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
