"""A checkpoint's weights as values, or as the quantised ones that they are (see schemes.py)."""

from __future__ import annotations

import importlib

import torch

from dataplane.model.blocks import KERNELS, from_blocks
from dataplane.model.config import ModelConfig
from dataplane.model.schemes import AWQ_ORDER, PER_WORD, Scheme
from kernels.quantised import GROUP, Format, Plane, Quantised, Weight

Tensors = dict[str, torch.Tensor]

ROTATED = ("q_proj", "k_proj")  # whose outputs GGUF has in another order
PERMUTED = ("llama", "mistral")  # in these families


class UnsupportedWeight(ValueError):
    """A tensor whose values no kernel reads and nothing installed here turns into others."""


def weight_of(config: ModelConfig, name: str, weights: Tensors) -> Weight:
    """The weight `name`, [n, k]. Raises UnsupportedWeight."""
    scheme = config.scheme
    base = name.removesuffix(".weight")
    match scheme.method if scheme else None:
        case "gguf":
            weight = _from_gguf(name, weights)
            order = _order(config, base)
            if order is None:
                return weight
            return weight.rows(order) if isinstance(weight, Quantised) else weight[order]
        case "gptq" | "awq" if f"{base}.qweight" in weights:
            assert scheme is not None
            return _from_columns(scheme, base, weights)
        case "compressed-tensors" if f"{base}.weight_scale" in weights:
            assert scheme is not None
            return _from_compressed(scheme, base, weights)
        case _:
            return weights[name]


def values_of(config: ModelConfig, name: str, weights: Tensors) -> torch.Tensor:
    """The tensor `name` as values."""
    weight = weight_of(config, name, weights)
    return weight.dense() if isinstance(weight, Quantised) else weight


def _from_gguf(name: str, weights: Tensors) -> Weight:
    if name in weights:
        return weights[name]
    found = next(key for key in weights if key.startswith(f"{name}."))
    kind, raw = found.removeprefix(f"{name}."), weights[found]
    if kind in KERNELS:
        return from_blocks(kind, raw)
    try:
        quants, gguf = importlib.import_module("gguf.quants"), importlib.import_module("gguf")
    except ImportError as error:
        raise UnsupportedWeight(
            f"{found}: there are kernels for {', '.join(KERNELS)}; the others need the gguf package: "
            "pip install 'kevlarflow[gguf]'"
        ) from error
    values = quants.dequantize(raw.numpy(), getattr(gguf.GGMLQuantizationType, kind.upper()))
    return torch.from_numpy(values)


def _order(config: ModelConfig, base: str) -> torch.Tensor | None:
    """Where the outputs of queries and keys are: converters put the two that are rotated together side by side."""
    module = base.removesuffix(".bias").rpartition(".")[2]
    if config.family not in PERMUTED or module not in ROTATED:
        return None
    heads = config.num_heads if module == "q_proj" else config.num_kv_heads
    rows = torch.arange(heads * config.head_dim)
    return rows.view(heads, config.head_dim // 2, 2).transpose(1, 2).flatten()


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8 m] of int32 [..., m]: four bits each, the lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def _from_columns(scheme: Scheme, base: str, weights: Tensors) -> Quantised:
    """GPTQ and AWQ keep a weight as [k, n]."""
    words, zero_words = weights[f"{base}.qweight"], weights[f"{base}.qzeros"]
    scales = weights[f"{base}.scales"].float().T
    if scheme.method == "gptq":
        q, zeros = _unpacked(words.T.contiguous()), _unpacked(zero_words).T
        k = q.shape[1]
        group = scheme.group or k
        if not torch.equal(weights[f"{base}.g_idx"], torch.arange(k, dtype=torch.int32) // group):
            raise UnsupportedWeight(
                f"{base}.g_idx: groups of inputs that are not in order (desc_act) have no kernel"
            )
    else:
        place = torch.tensor(AWQ_ORDER).argsort()
        q, zeros = (
            _unpacked(values).view(len(values), -1, PER_WORD)[..., place].flatten(1).T
            for values in (words, zero_words)
        )
    # Of four bits, as it is kept: one more than 15 is 16.
    offset = zeros.float() + (1.0 if scheme.one_less else 0.0)
    return _four_bits(q.contiguous(), scales, -(scales * offset), scheme.group)


def _from_compressed(scheme: Scheme, base: str, weights: Tensors) -> Quantised:
    scales = weights[f"{base}.weight_scale"].float()
    if scheme.bits == 8:
        weight = weights[f"{base}.weight"]
        n, k = weight.shape
        q = torch.full((n, -(-k // GROUP) * GROUP), Format.INT8_ROW.offset, dtype=torch.uint8)
        q[:, :k] = weight.view(torch.uint8) ^ 0x80
        return Quantised(Format.INT8_ROW, q, (Plane(scales, q.shape[1] // GROUP),), k)
    q = _unpacked(weights[f"{base}.weight_packed"])
    offset: torch.Tensor | float = 8.0
    if not scheme.symmetric:
        offset = _unpacked(weights[f"{base}.weight_zero_point"].T.contiguous()).T[: len(q)].float()
    return _four_bits(q, scales, -(scales * offset), scheme.group)


def _four_bits(q: torch.Tensor, scales: torch.Tensor, least: torch.Tensor, group: int) -> Quantised:
    """q uint8 [n, k]; scales, least float32 [n, groups of `group` inputs]."""
    n, k = q.shape
    padded = torch.zeros(n, -(-k // GROUP) * GROUP, dtype=torch.uint8)
    padded[:, :k] = q
    every = (group or padded.shape[1]) // GROUP
    planes = Plane(scales.contiguous(), every), Plane(least.contiguous(), every)
    return Quantised(Format.INT4_F32_MIN, padded, planes, k)
