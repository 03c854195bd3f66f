"""A Llama checkpoint as an OpenVINO model, stateful, in the form whose attention OpenVINO turns into paged attention.

It is the graph that optimum-intel exports: inputs input_ids, attention_mask, position_ids [batch, length] and beam_idx
[batch]; keys and values of all positions as two states a layer; weights in the checkpoint's dtype.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from safetensors.torch import load_file

Node = Any  # openvino has no types


def convert(model: Path, into: Path) -> None:
    """Writes openvino_model.xml and .bin, and the config, into a directory."""
    config = json.loads((model / "config.json").read_bytes())
    into.mkdir(parents=True, exist_ok=True)
    ov.save_model(
        _Llama(config, load_file(model / "model.safetensors")).build(), into / "openvino_model.xml", False
    )
    (into / "config.json").write_text(json.dumps(config))


def _ints(*values: int) -> Node:
    return op.constant(np.array(values, np.int64))


class _Llama:
    """Builds the graph. Everything between weights is float32 here; the compiled precision is a hint."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.layers = config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.hidden = config["head_dim"], config["hidden_size"]
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.sinks: list[Node] = []

    def build(self) -> ov.Model:
        ids, mask, positions = (
            op.parameter(ov.PartialShape([-1, -1]), ov.Type.i64, name=name)
            for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.beam = op.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam_idx")
        parameters = [ids, mask, positions, self.beam]
        for node in parameters:
            node.output(0).set_names({node.get_friendly_name()})
        self.batch = op.gather(op.shape_of(ids, ov.Type.i64), _ints(0), _ints(0))
        self._rotary(positions)
        self._mask(ids, mask)
        embed = self._weight("model.embed_tokens")
        x = op.gather(embed, op.convert(ids, ov.Type.i32), op.constant(np.int32(0)))
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            x = op.add(
                x, self._attention(self._norm(x, f"{prefix}input_layernorm"), f"{prefix}self_attn.", layer)
            )
            h = self._norm(x, f"{prefix}post_attention_layernorm")
            gate = op.swish(self._linear(h, f"{prefix}mlp.gate_proj"))
            x = op.add(
                x,
                self._linear(
                    op.multiply(gate, self._linear(h, f"{prefix}mlp.up_proj")), f"{prefix}mlp.down_proj"
                ),
            )
        logits = op.matmul(self._norm(x, "model.norm"), embed, False, True)
        logits.output(0).set_names({"logits"})
        result = op.result(logits)
        return ov.Model([result], self.sinks, parameters, "llama")

    def _weight(self, name: str) -> Node:
        tensor = self.weights[f"{name}.weight"].contiguous()
        if tensor.dtype == torch.bfloat16:
            raw = ov.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), ov.Type.bf16)
            return op.convert(op.constant(raw, shared_memory=False), ov.Type.f32)
        return op.constant(tensor.numpy())

    def _linear(self, x: Node, name: str) -> Node:
        return op.matmul(x, self._weight(name), False, True)

    def _norm(self, x: Node, name: str) -> Node:
        square = op.power(x, op.constant(np.array([[[2.0]]], np.float32)))
        mean = op.reduce_mean(square, _ints(-1), True)
        root = op.sqrt(op.add(mean, op.constant(np.array([[[self.eps]]], np.float32))))
        scaled = op.multiply(x, op.divide(op.constant(np.array([[[1.0]]], np.float32)), root))
        weight = op.constant(self.weights[f"{name}.weight"].float().numpy()[None, None])
        return op.multiply(weight, scaled)

    def _rotary(self, positions: Node) -> None:
        half = self.head_dim // 2
        rates = self.theta ** -(np.arange(half, dtype=np.float32) / half)
        column = op.broadcast(
            op.constant(rates[None, :, None]),
            op.concat([self.batch, _ints(1), _ints(1)], 0),
            broadcast_spec="BIDIRECTIONAL",
        )
        row = op.convert(op.unsqueeze(positions, _ints(1)), ov.Type.f32)
        angles = op.transpose(op.matmul(column, row, False, False), _ints(0, 2, 1))
        both = op.concat([angles, angles], -1)
        self.cos, self.sin = op.unsqueeze(op.cos(both), _ints(1)), op.unsqueeze(op.sin(both), _ints(1))

    def _rotate(self, x: Node) -> Node:
        half = self.head_dim // 2
        first = op.slice(x, _ints(0), _ints(half), _ints(1), _ints(3))
        second = op.slice(x, _ints(half), _ints(2**63 - 1), _ints(1), _ints(3))
        negated = op.multiply(second, op.constant(np.array([[[[-1.0]]]], np.float32)))
        return op.add(op.multiply(x, self.cos), op.multiply(op.concat([negated, first], -1), self.sin))

    def _mask(self, ids: Node, mask: Node) -> None:
        """0 where a position may be looked at, the least float elsewhere: [batch, 1, new, all]."""
        new = op.gather(op.shape_of(ids, ov.Type.i64), _ints(1), _ints(0))
        total = op.gather(op.shape_of(mask, ov.Type.i64), _ints(1), _ints(0))
        scalar, one, zero = op.squeeze(total, _ints(0)), op.constant(np.int64(1)), op.constant(np.int64(0))
        columns = op.range(zero, scalar, one, ov.Type.i64)
        rows = op.unsqueeze(
            op.add(op.range(zero, op.squeeze(new, _ints(0)), one, ov.Type.i64), op.subtract(total, new)),
            _ints(1),
        )
        seen = op.logical_and(
            op.less_equal(columns, rows), op.convert(op.unsqueeze(mask, _ints(1, 2)), ov.Type.boolean)
        )
        self.mask = op.select(
            seen, op.constant(np.float32(0)), op.constant(np.finfo(np.float32).min.astype(np.float32))
        )

    def _heads(self, x: Node, heads: int) -> Node:
        return op.transpose(op.reshape(x, _ints(0, 0, heads, self.head_dim), True), _ints(0, 2, 1, 3))

    def _cached(self, x: Node, name: str) -> Node:
        """Keys or values of all positions, repeated for every head of their group."""
        shape = op.concat([self.batch, _ints(self.kv_heads), _ints(0), _ints(self.head_dim)], 0)
        empty = op.broadcast(op.constant(np.float32(0)), shape)
        static = ov.PartialShape([-1, self.kv_heads, -1, self.head_dim])
        past = op.read_value(empty, name, ov.Type.f32, static)
        whole = op.concat([op.gather(past, self.beam, op.constant(np.int64(0))), x], 2)
        self.sinks.append(op.assign(whole, name))
        groups = self.heads // self.kv_heads
        if groups == 1:
            return whole
        length = op.gather(op.shape_of(whole, ov.Type.i64), _ints(2), _ints(0))
        shape = op.concat([self.batch, _ints(self.kv_heads), _ints(groups), length, _ints(self.head_dim)], 0)
        wide = op.broadcast(op.unsqueeze(whole, _ints(2)), shape, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, _ints(0, self.heads, -1, self.head_dim), True)

    def _attention(self, x: Node, prefix: str, layer: int) -> Node:
        q = self._rotate(self._heads(self._linear(x, f"{prefix}q_proj"), self.heads))
        k = self._rotate(self._heads(self._linear(x, f"{prefix}k_proj"), self.kv_heads))
        v = self._heads(self._linear(x, f"{prefix}v_proj"), self.kv_heads)
        state = f"past_key_values.{layer}.{{0}}present.{layer}.{{0}}"
        k, v = self._cached(k, state.format("key")), self._cached(v, state.format("value"))
        out = op.scaled_dot_product_attention(q, k, v, self.mask, causal=False)
        out = op.reshape(op.transpose(out, _ints(0, 2, 1, 3)), _ints(0, 0, self.heads * self.head_dim), True)
        return self._linear(out, f"{prefix}o_proj")
