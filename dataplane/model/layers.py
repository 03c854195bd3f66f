"""The decoder layers of one stage, from a checkpoint's tensors to what kernels/ builds a stage of.

The rule of equal bits (a token's numbers are the same in any chunk, step and batch) is kept by construction:
every operation on rows is a kernel of ours whose arithmetic for a row does not look at the row count."""

import math
from typing import Literal

import torch

from dataplane.model.config import ModelConfig
from dataplane.model.quantised import values_of, weight_of
from dataplane.model.rotary import RotaryTable
from dataplane.model.weights import EMBED, HEAD, NORM
from kernels.base import Experts, Head, Layer, Linear, Mlp, StageSpec
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


def norm_of(config: ModelConfig, weight: torch.Tensor) -> torch.Tensor:
    """float32. Gemma keeps what a norm's weight is more than 1."""
    return weight.float() + 1.0 if config.norm_offset else weight.float()


def stage_spec(
    config: ModelConfig, layers: tuple[Layer, ...], embed: torch.Tensor | None, head: Head | None
) -> StageSpec:
    """The stage of these layers."""
    c = config
    ropes = (c.rope,) if c.local_rope is None else (c.rope, c.local_rope)
    scale = 1.0
    if c.scaled_embeddings:  # rounded as the embeddings are
        dtype = torch.float32 if embed is None else embed.dtype
        scale = torch.tensor(math.sqrt(c.hidden_size)).to(dtype).item()
    return StageSpec(
        c.hidden_size,
        c.intermediate_size,
        c.num_heads,
        c.rms_norm_eps,
        tuple(RotaryTable(rope, c.head_dim, c.max_positions) for rope in ropes),
        layers,
        embed,
        head,
        scale=c.attention_scale,
        activation=c.activation,
        embed_scale=scale,
        norm_wide=c.norm_offset,
    )


def build_spec(
    config: ModelConfig,
    layers: range,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    kind: Weights = "model",
) -> StageSpec:
    """The stage of these layers from the tensors (see weights.stage_shapes), with the embedding where it has
    the first layer and the head where it has the last. Raises UnsupportedWeight."""
    embed = values_of(config, EMBED, weights).to(dtype) if layers.start == 0 else None
    head = _head(config, weights, embed, dtype, kind) if layers.stop == config.num_layers else None
    built = tuple(build_layer(config, index, weights, dtype, kind) for index in layers)
    return stage_spec(config, built, embed, head)


def _head(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    embed: torch.Tensor | None,
    dtype: torch.dtype,
    kind: Weights,
) -> Head:
    name = EMBED if config.tie_embeddings else HEAD
    tied = embed if config.tie_embeddings and kind == "model" else None
    output: Weight
    if tied is not None and isinstance(weight_of(config, name, weights), torch.Tensor):
        output = tied  # one tensor, so that a device has it once
    else:
        output = matrix(config, [name], weights, dtype, kind)
    return Head(norm_of(config, weights[NORM]), output, config.logit_softcap)


def build_layer(
    config: ModelConfig,
    index: int,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    kind: Weights = "model",
) -> Layer:
    """Layer `index` from the checkpoint's tensors (see weights.stage_shapes)."""
    prefix = f"model.layers.{index}."
    windowed = config.windows[index] is not None

    def norm(name: str) -> torch.Tensor:
        return norm_of(config, weights[f"{prefix}{name}.weight"])

    def merged(*names: str) -> Linear:
        given = [f"{prefix}{name}.bias" for name in names if f"{prefix}{name}.bias" in weights]
        bias = torch.cat([values_of(config, name, weights) for name in given]).to(dtype) if given else None
        return Linear(
            matrix(config, [f"{prefix}{name}.weight" for name in names], weights, dtype, kind), bias
        )

    def mlp() -> Mlp | Experts:
        if (experts := config.experts) is None or index not in experts.layers:
            parts = ("gate_up",) if config.fused else ("gate", "up")
            return Mlp(merged(*(f"mlp.{part}_proj" for part in parts)), merged("mlp.down_proj"))
        made = []
        for gate, up, down in map(experts.names, range(experts.count)):
            made.append(Mlp(merged(gate, up), merged(down)))
        router = values_of(config, f"{prefix}{experts.router}.weight", weights).to(dtype)
        return Experts(router, tuple(made), experts.chosen, experts.normalised)

    around = config.norms_around
    return Layer(
        attention_norm=norm("input_layernorm"),
        qkv=merged(*(f"self_attn.{name}_proj" for name in (("qkv",) if config.fused else "qkv"))),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        o=merged("self_attn.o_proj"),
        mlp_norm=norm("pre_feedforward_layernorm" if around else "post_attention_layernorm"),
        mlp=mlp(),
        window=config.windows[index],
        attention_out_norm=norm("post_attention_layernorm") if around else None,
        mlp_out_norm=norm("post_feedforward_layernorm") if around else None,
        rotary=1 if windowed and config.local_rope is not None else 0,
    )
