"""Mixtures of experts: what configurations ask for, quantised experts, and rows that do not know of each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dataplane._fast.blocktable import BlockTable
from dataplane.kvcache import KVCache
from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from dataplane.model.layers import build_layer, stage_spec
from dataplane.model.weights import LINEAR, load_weights
from kernels import reference
from kernels.base import Experts, Linear
from kernels.cpu import _native
from kernels.cpu.stage import CpuStage
from kernels.quantised import int8_rows
from tests.parity.chain import Chain, i32
from tests.parity.conftest import Build

TEXT = np.random.default_rng(7).integers(0, 200, 40).tolist()


def config_at(path: Path, **values: Any) -> Path:
    base = {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 211, "hidden_size": 48, "intermediate_size": 88,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(base | values))
    return path


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 2000}, "num_experts"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_local_experts"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError) as error:
        load_config(config_at(tmp_path, **values))
    assert error.value.key == key


def test_which_layers_are_mixtures(tmp_path: Path) -> None:
    config = load_config(config_at(tmp_path, num_experts=4, decoder_sparse_step=2, num_experts_per_tok=2))
    assert config.experts is not None
    assert config.experts.layers == (1, 3)
    other = load_config(config_at(tmp_path, num_experts=16, mlp_only_layers=[0, 3]))
    assert other.experts is not None
    assert (other.experts.layers, other.experts.chosen, other.experts.normalised) == ((1, 2), 8, False)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_quantised_experts(build: Build, tmp_path: Path, name: str) -> None:
    """Eight bits that are made when a stage is loaded: in float32, the bits that a checkpoint of the values has."""
    path = build(name)
    for file in path.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    values = {
        key: int8_rows(value).dense() if LINEAR.search(key) or key == "lm_head.weight" else value
        for key, value in load_file(path / "model.safetensors").items()
    }
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    quantised, dense = Chain(path, 2, weights="int8"), Chain(tmp_path, 1)
    want = dense.step([(dense.new(), TEXT)])[0]
    assert np.array_equal(quantised.step([(quantised.new(), TEXT)])[0], want)


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_company_threads_and_instruction_set(build: Build, dtype: Any, weights: Any) -> None:
    """A row's bits do not depend on what its neighbours chose, nor on who computes them."""
    path = build("mixtral")
    chain = Chain(path, 1, dtype, weights=weights)
    want = chain.step([(chain.new(), TEXT)])[0]
    try:
        for isa in (0, 1, 2, 3):
            _native.set_isa(isa)
            other = Chain(path, 2, dtype, threads=2 if isa == 3 else 1, weights=weights)
            a, b = other.new(), other.new()
            got = [other.step([(a, TEXT[:1]), (b, TEXT[20:39])])[a]]
            for at in range(1, 40, 13):
                got.append(other.step([(b, TEXT[at : at + 3]), (a, TEXT[at : at + 13])])[a])
            assert np.array_equal(np.concatenate(got), want), isa
    finally:
        _native.set_isa(-1)


@pytest.mark.parametrize(
    ("dtype", "weights"), [("float32", "model"), ("float32", "int8"), ("bfloat16", "int8")]
)
def test_long_steps_are_cut_by_rows(build: Build, dtype: Any, weights: Any) -> None:
    """An expert with hundreds of rows gives them to several threads."""
    text = np.random.default_rng(9).integers(0, 200, 500).tolist()
    chain = Chain(build("mixtral"), 1, dtype, threads=2, weights=weights)
    whole = chain.step([(row := chain.new(), text)])[row]
    chain.release(row)
    row = chain.new()
    parts = [chain.step([(row, text[at : at + 90])])[row] for at in range(0, 500, 90)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_those_of_the_reference(build: Build, name: str) -> None:
    """A stage of one layer, whose attention adds nothing, against float64."""
    path = build(name)
    config = load_config(path)
    layer = build_layer(config, 2, load_weights(path, config, range(4)), torch.float32)
    assert isinstance(layer.mlp, Experts)
    nothing = Linear(torch.zeros(config.hidden_size, config.num_heads * config.head_dim))
    kv = KVCache(2, 1, config.num_kv_heads, 16, config.head_dim, "float32")
    stage = CpuStage(stage_spec(config, (replace(layer, o=nothing),), None, None), kv)
    table = BlockTable(1, 2, 16)
    row = table.new_row()
    table.extend(row, [1])
    step = table.fill(i32(row), i32(0), i32(9))
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(1))
    out = torch.from_numpy(stage.forward(memoryview(x.numpy()).cast("B"), step, i32()))
    normed = reference.rms_norm(x.double(), layer.mlp_norm, config.rms_norm_eps)
    want = x + reference.experts(normed, layer.mlp)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert (want - x).abs().mean() > 0.1
