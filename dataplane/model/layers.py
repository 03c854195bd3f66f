"""The transformer layers of one stage, on merged and packed weights.

The rule of equal bits (a token's numbers are the same in any chunk, step and batch) is kept by construction:
every operation on rows is a kernel of ours whose arithmetic for a row does not look at the row count.

Measured before writing our own matrix product (torch 2.13 CPU, MKL and oneDNN, one thread, 1 to 512 rows, 19
shapes, float32 and bfloat16, with and without bias): `linear` gives a row the same bits for any count of 4 or
more rows; 1 to 3 rows differ in float32, 1 row in some bfloat16 shapes. So padding to 4 rows would do, on this
processor and this version. But a decode step of one row then computes four; and torch's silu and sigmoid break the
rule by themselves for sizes like 45, 50 or 88 (not 64), as they use other code for the tail of a tensor.

Our kernels need no rule, were typically twice as fast at 1 to 8 rows in float32 and about
as fast or faster at 512 (on a busy machine), and give the same bits with AVX2 as with AVX-512, so the nodes of a
cluster may differ. In bfloat16 they are faster at 1 to 4 rows, but take two to three times as long in prefills of
512 rows as oneDNN, which has dot-product instructions for it: that is the price."""

from dataclasses import dataclass

import torch

from dataplane.model.config import ModelConfig
from kernels import Kernels, PackedWeight, pack_weight


@dataclass(frozen=True, slots=True)
class Linear:
    """Packed weight [n, k] and optional bias [n]."""

    weight: PackedWeight
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. window: keys a query sees (None = all)."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int | None


def build_layer(
    config: ModelConfig, index: int, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> Layer:
    """Layer `index` from the checkpoint's tensors (see weights.stage_shapes)."""
    prefix = f"model.layers.{index}."

    def vector(name: str) -> torch.Tensor:
        return weights[prefix + name].to(dtype, copy=True)

    def merged(*names: str) -> Linear:
        biases = [b for b in (weights.get(f"{prefix}{name}.bias") for name in names) if b is not None]
        weight = torch.cat([weights[f"{prefix}{name}.weight"] for name in names])
        return Linear(pack_weight(weight, dtype), torch.cat(biases).to(dtype) if biases else None)

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


class Workspace:
    """The activations of one step, kept between steps and grown by doubling: [rows, ...] each."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self.rows = 0
        self.reserve(16)

    def reserve(self, rows: int) -> None:
        if rows <= self.rows:
            return
        c, self.rows = self._config, max(rows, 2 * self.rows)
        heads = c.num_heads * c.head_dim
        self.residual = torch.empty(self.rows, c.hidden_size, dtype=self._dtype)
        self.x = torch.empty_like(self.residual)
        self.normed = torch.empty_like(self.residual)
        self.qkv = torch.empty(self.rows, heads + 2 * c.num_kv_heads * c.head_dim, dtype=self._dtype)
        self.q = torch.empty(self.rows, heads, dtype=self._dtype)
        self.attended = torch.empty_like(self.q)
        self.gate_up = torch.empty(self.rows, 2 * c.intermediate_size, dtype=self._dtype)
        self.activated = torch.empty(self.rows, c.intermediate_size, dtype=self._dtype)


def run_layers(
    layers: list[Layer],
    kernels: Kernels,
    w: Workspace,
    rows: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    config: ModelConfig,
) -> None:
    """Runs the layers over w.residual[:rows]. Before and after, the stream is residual alone (x is added)."""
    eps, scale = config.rms_norm_eps, config.head_dim**-0.5
    x: torch.Tensor | None = None
    for index, layer in enumerate(layers):
        kernels.add_rms_norm(x, w.residual, layer.attention_norm, eps, w.normed, rows)
        kernels.linear(w.normed, layer.qkv.weight, layer.qkv.bias, w.qkv, rows)
        kernels.rope_write(index, w.qkv, cos, sin, layer.q_norm, layer.k_norm, eps, w.q)
        kernels.attention(index, w.q, scale, layer.window, w.attended)
        kernels.linear(w.attended, layer.o.weight, layer.o.bias, w.x, rows)
        kernels.add_rms_norm(w.x, w.residual, layer.mlp_norm, eps, w.normed, rows)
        kernels.linear(w.normed, layer.gate_up.weight, layer.gate_up.bias, w.gate_up, rows)
        kernels.silu_mul(w.gate_up, w.activated, rows)
        kernels.linear(w.activated, layer.down.weight, layer.down.bias, w.x, rows)
        x = w.x
    kernels.add_rms_norm(x, w.residual, None, eps, None, rows)
