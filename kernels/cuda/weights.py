"""A stage's weights on the device, each of them once."""

from dataclasses import dataclass, replace

import torch

from kernels.base import Head, Layer, Linear, StageSpec


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """cos, sin: float32 [positions, head_dim / 2]. embed and head.weight are one tensor where the spec's are."""

    layers: tuple[Layer, ...]
    embed: torch.Tensor | None
    head: Head | None
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def load(cls, spec: StageSpec, device: torch.device, positions: int) -> "DeviceWeights":
        """`positions`: as many as a context may have; graphs need the tables where they are."""
        embed = None if spec.embed is None else spec.embed.to(device)
        head = None
        if spec.head is not None:
            tied = embed if spec.head.weight is spec.embed else None
            norm = spec.head.norm.to(device)
            output = Linear(spec.head.weight).dense(norm.dtype).to(device) if tied is None else tied
            head = Head(norm, output)
        spec.rotary.cover(min(spec.rotary.max_positions, positions))
        layers = tuple(to_device(layer, device) for layer in spec.layers)
        return cls(layers, embed, head, spec.rotary.cos.to(device), spec.rotary.sin.to(device))


def to_device(layer: Layer, device: torch.device) -> Layer:
    """The same layer with its tensors on `device`. There are no kernels for quantised weights there: they become the
    values that they stand for."""
    dtype = layer.attention_norm.dtype

    def matrix(m: Linear) -> Linear:
        bias = None if m.bias is None else m.bias.to(device)
        return Linear(m.dense(dtype).to(device).contiguous(), bias)

    return replace(
        layer,
        attention_norm=layer.attention_norm.to(device),
        qkv=matrix(layer.qkv),
        q_norm=None if layer.q_norm is None else layer.q_norm.to(device),
        k_norm=None if layer.k_norm is None else layer.k_norm.to(device),
        o=matrix(layer.o),
        mlp_norm=layer.mlp_norm.to(device),
        gate_up=matrix(layer.gate_up),
        down=matrix(layer.down),
    )
