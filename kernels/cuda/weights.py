"""A stage's weights on the device, each of them once."""

from dataclasses import dataclass, replace

import torch

from kernels.base import Experts, Head, Layer, Linear, Mlp, StageSpec
from kernels.cuda.experts import DeviceExperts


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """cos, sin: float32 [positions, rotated / 2], of each of the spec's rotary tables. embed and head.weight are one
    tensor where the spec's are."""

    layers: tuple[Layer, ...]
    mixtures: tuple[DeviceExperts | None, ...]  # of layers whose mlp is one
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
        mixtures = tuple(
            DeviceExperts.load(layer.mlp, device, dtype) if isinstance(layer.mlp, Experts) else None
            for layer in spec.layers
        )
        cos, sin = (tuple(getattr(r, name).to(device) for r in spec.rotary) for name in ("cos", "sin"))
        return cls(layers, mixtures, embed, head, cos, sin)


def to_device(layer: Layer, device: torch.device, dtype: torch.dtype) -> Layer:
    """The same layer with its tensors on `device`, experts left out. There are no kernels for quantised weights there:
    they become the values that they stand for."""

    def matrix(m: Linear) -> Linear:
        bias = None if m.bias is None else m.bias.to(device)
        return Linear(m.dense(dtype).to(device).contiguous(), bias)

    def norm(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else weight.to(device)

    mlp = layer.mlp
    if isinstance(mlp, Mlp):
        mlp = Mlp(matrix(mlp.gate_up), matrix(mlp.down))
    else:
        mlp = replace(mlp, experts=())
    return replace(
        layer,
        attention_norm=layer.attention_norm.to(device),
        qkv=matrix(layer.qkv),
        q_norm=norm(layer.q_norm),
        k_norm=norm(layer.k_norm),
        o=matrix(layer.o),
        mlp_norm=layer.mlp_norm.to(device),
        mlp=mlp,
        attention_out_norm=norm(layer.attention_out_norm),
        mlp_out_norm=norm(layer.mlp_out_norm),
    )
