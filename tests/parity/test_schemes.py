"""Checkpoints of GPTQ, AWQ and compressed-tensors: what each stands for, written here from the formats' descriptions,
and stages that compute with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dataplane.executor import StageExecutor
from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from dataplane.model.quantised import values_of, weight_of
from dataplane.model.weights import LINEAR, load_weights
from kernels.quantised import Format, Quantised
from tests.parity.chain import Chain

GROUP = 32
TEXT = np.random.default_rng(5).integers(0, 200, 40).tolist()
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that groups divide; biases on the way."""
    path = tmp_path_factory.mktemp("original")
    torch.manual_seed(11)
    config = transformers.Qwen2Config(
        vocab_size=211, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def packed(values: torch.Tensor) -> torch.Tensor:
    """int32 [..., m / 8] of four bits each [..., m], the first in the lowest."""
    wide = values.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    words = wide.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def rounded(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [n, k] of 0 .. 15, scale and zero point [n, groups] of half precision."""
    groups = weight.unflatten(1, (-1, GROUP))
    if symmetric:
        scale = (groups.abs().amax(-1) / 7).half().float()
        zero = torch.full_like(scale, 8)
    else:
        scale = ((groups.amax(-1) - groups.amin(-1)) / 15).half().float()
        zero = (-groups.amin(-1) / scale).round().clamp(1, 15)
    q = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return q.flatten(1), scale, zero


def gptq(weight: torch.Tensor, base: str) -> tuple[Tensors, torch.Tensor]:
    q, scale, zero = rounded(weight, False)
    return {
        f"{base}.qweight": packed(q).T.contiguous(),
        f"{base}.qzeros": packed((zero - 1).T.contiguous()),
        f"{base}.scales": scale.T.half().contiguous(),
        f"{base}.g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }, dense(q, scale, zero)


def awq(weight: torch.Tensor, base: str) -> tuple[Tensors, torch.Tensor]:
    q, scale, zero = rounded(weight, False)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def ordered(values: torch.Tensor) -> torch.Tensor:
        return packed(values.unflatten(-1, (-1, 8))[..., order].flatten(-2))

    return {
        f"{base}.qweight": ordered(q.T),
        f"{base}.qzeros": ordered(zero.T),
        f"{base}.scales": scale.T.half().contiguous(),
    }, dense(q, scale, zero)


def compressed(symmetric: bool) -> Callable[[torch.Tensor, str], tuple[Tensors, torch.Tensor]]:
    def make(weight: torch.Tensor, base: str) -> tuple[Tensors, torch.Tensor]:
        q, scale, zero = rounded(weight, symmetric)
        tensors = {f"{base}.weight_packed": packed(q), f"{base}.weight_scale": scale.bfloat16()}
        tensors[f"{base}.weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            tensors[f"{base}.weight_zero_point"] = packed(zero.T.contiguous()).T.contiguous()
        return tensors, dense(q, scale.bfloat16().float(), zero)

    return make


def compressed_int8(weight: torch.Tensor, base: str) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (weight / scale.float()).round().clamp(-128, 127)
    return {f"{base}.weight": q.to(torch.int8), f"{base}.weight_scale": scale}, q * scale.float()


def dense(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((q.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale[..., None]).flatten(1)


def groups_of(**weights: Any) -> dict[str, Any]:
    kind = "pack-quantized" if weights["num_bits"] == 4 else "int-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}},
        "ignore": ["lm_head"],
    }


FOUR = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    ),
    "symmetric": (compressed(True), groups_of(**FOUR, symmetric=True)),
    "asymmetric": (compressed(False), groups_of(**FOUR, symmetric=False)),
    "int8": (compressed_int8, groups_of(num_bits=8, strategy="channel", symmetric=True)),
}


def made(original: Path, name: str, into: Path) -> tuple[Path, Path]:
    """A checkpoint of the scheme, and one of the values that it stands for."""
    make, settings = SCHEMES[name]
    there, plain = into / name, into / f"{name}-plain"
    for folder in (there, plain):
        shutil.copytree(original, folder)
    tensors = load_file(original / "model.safetensors")
    kept, values = dict(tensors), dict(tensors)
    for key, weight in tensors.items():
        if LINEAR.search(key):
            del kept[key]
            more, values[key] = make(weight, key.removesuffix(".weight"))
            kept |= more
    save_file(kept, there / "model.safetensors")
    save_file({key: value.contiguous() for key, value in values.items()}, plain / "model.safetensors")
    change(there, quantization_config=settings)
    return there, plain


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("name", SCHEMES)
def test_values_and_logits(original: Path, tmp_path: Path, name: str) -> None:
    """Every value is exact, and float32 computes with it as with a checkpoint of the values."""
    there, plain = made(original, name, tmp_path)
    config = load_config(there)
    tensors, wanted = load_weights(there, config, range(3)), load_file(plain / "model.safetensors")
    for key, value in wanted.items():
        assert torch.equal(values_of(config, key, tensors).float(), value)
    weight = weight_of(config, "model.layers.0.mlp.up_proj.weight", tensors)
    assert isinstance(weight, Quantised)
    assert weight.format is (Format.INT8_ROW if name == "int8" else Format.INT4_F32_MIN)
    got, want = (
        next(iter(chain.step([(chain.new(), TEXT)]).values())) for chain in (Chain(there, 3), Chain(plain))
    )
    assert np.array_equal(got, want)


@pytest.mark.parametrize("name", ["gptq", "awq", "symmetric", "int8"])
def test_experts(tmp_path: Path, name: str) -> None:
    """Quantised as any weight is, but for the router."""
    torch.manual_seed(12)
    config = transformers.MixtralConfig(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, num_local_experts=4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    there, plain = made(tmp_path / "mixtral", name, tmp_path)
    if name in ("gptq", "awq"):
        change(there, quantization_config=SCHEMES[name][1] | {"modules_to_not_convert": ["gate"]})
    got, want = (chain.step([(chain.new(), TEXT)])[0] for chain in (Chain(there, 2), Chain(plain)))
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "weights"), [("float32", "model"), ("bfloat16", "model"), ("bfloat16", "int8")]
)
def test_equal_bits_however_it_is_cut(original: Path, tmp_path: Path, dtype: Any, weights: Any) -> None:
    there, _ = made(original, "gptq", tmp_path)
    chain = Chain(there, 1, dtype, weights=weights)
    want = chain.step([(chain.new(), TEXT)])[0]
    for stages in (2, 3):
        chain = Chain(there, stages, dtype, threads=2, weights=weights)
        row = chain.new()
        parts = [chain.step([(row, TEXT[at : at + 7])])[row] for at in range(0, len(TEXT), 7)]
        assert np.array_equal(np.concatenate(parts), want)


def test_int8_at_load_is_near_the_model(original: Path) -> None:
    """And it is another model: nodes of one do not stand in for nodes of the other."""
    eight, full = Chain(original, 1, weights="int8"), Chain(original, 1)
    got, want = (chain.step([(chain.new(), TEXT)])[0] for chain in (eight, full))
    assert not np.array_equal(got, want)
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
    one, other = (
        StageExecutor(original, 0, 2, num_blocks=4, weights=weights) for weights in ("model", "int8")
    )
    assert one.weights_digest != other.weights_digest
    assert len(one.weights_digest) == len(other.weights_digest)
    assert one.numerics != other.numerics


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gptq", {"bits": 3}, "bits 3 is not supported"),
        ("gptq", {"group_size": 48}, "group_size 48 is not supported"),
        ("gptq", {"group_size": 128}, "64 inputs are no multiple of 128"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("symmetric", {"format": "marlin-24"}, "format 'marlin-24'"),
        ("symmetric", {"ignore": ["re:.*gate"]}, "regular expressions"),
        ("symmetric", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    original: Path, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    change(folder, quantization_config=SCHEMES[name][1] | changes)
    with pytest.raises(ModelError, match=reason):
        load_config(folder)


def test_groups_that_are_not_in_order_are_refused(original: Path, tmp_path: Path) -> None:
    there, _ = made(original, "gptq", tmp_path)
    tensors = load_file(there / "model.safetensors")
    key = "model.layers.2.mlp.down_proj.g_idx"
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, there / "model.safetensors")
    with pytest.raises(ModelError, match="desc_act"):
        StageExecutor(there, 1, 2, num_blocks=4)


def test_integers_that_no_scheme_speaks_of_are_refused(original: Path, tmp_path: Path) -> None:
    """Without their scales they would be served as if they were the values."""
    there, _ = made(original, "int8", tmp_path)
    config = json.loads((there / "config.json").read_text())
    del config["quantization_config"]
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="int8 is not supported"):
        StageExecutor(there, 0, 2, num_blocks=4)


def test_tensors_of_another_type_or_size_are_refused(original: Path, tmp_path: Path) -> None:
    there, _ = made(original, "awq", tmp_path)
    good = load_file(there / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.qweight"
    for bad, reason in (
        (good[key].float(), "float32 is not supported"),
        (good[key][1:].clone(), "expected shape"),
    ):
        save_file(good | {key: bad}, there / "model.safetensors")
        with pytest.raises(ModelError, match=reason):
            StageExecutor(there, 0, 2, num_blocks=4)
