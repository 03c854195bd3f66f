"""A stage's weights on the device, each of them once."""

from dataclasses import dataclass, replace

import torch

from kernels.base import Head, Layer, Linear, Mlp, StageSpec


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """cos, sin: float32 [positions, rotated / 2], of each of the spec's rotary tables. embed and head.weight are one
    tensor where the spec's are."""

    layers: tuple[Layer, ...]
    embed: torch.Tensor | None
    head: Head | None
    cos: tuple[torch.Tensor, ...]
    sin: tuple[torch.Tensor, ...]

    @classmethod
    def load(
        cls, spec: StageSpec, device: torch.device, positions: int, dtype: torch.dtype
    ) -> "DeviceWeights":
        """`positions`: as many as a context may have; graphs need the tables where they are."""
        embed = None if spec.embed is None else spec.embed.to(device)
        head = None
        if spec.head is not None:
            tied = embed if spec.head.weight is spec.embed else None
            norm = spec.head.norm.to(device)
            output = Linear(spec.head.weight).dense(dtype).to(device) if tied is None else tied
            head = Head(norm, output, spec.head.softcap)
        for rotary in spec.rotary:
            rotary.cover(min(rotary.max_positions, positions))
        layers = tuple(to_device(layer, device, dtype) for layer in spec.layers)
        cos, sin = (tuple(getattr(r, name).to(device) for r in spec.rotary) for name in ("cos", "sin"))
        return cls(layers, embed, head, cos, sin)


def to_device(layer: Layer, device: torch.device, dtype: torch.dtype) -> Layer:
    """The same layer with its tensors on `device`. There are no kernels for quantised weights there: they become the
    values that they stand for. Raises ValueError for what has no kernels."""
    if not isinstance(layer.mlp, Mlp):
        raise ValueError("mixtures of experts have no kernels for GPUs: engine.device must be 'cpu'")

    def matrix(m: Linear) -> Linear:
        bias = None if m.bias is None else m.bias.to(device)
        return Linear(m.dense(dtype).to(device).contiguous(), bias)

    def norm(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else weight.to(device)

    return replace(
        layer,
        attention_norm=layer.attention_norm.to(device),
        qkv=matrix(layer.qkv),
        q_norm=norm(layer.q_norm),
        k_norm=norm(layer.k_norm),
        o=matrix(layer.o),
        mlp_norm=layer.mlp_norm.to(device),
        mlp=Mlp(matrix(layer.mlp.gate_up), matrix(layer.mlp.down)),
        attention_out_norm=norm(layer.attention_out_norm),
        mlp_out_norm=norm(layer.mlp_out_norm),
    )
