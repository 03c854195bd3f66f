"""Junk in a checkpoint becomes a ModelError that names the file and the key; stages map what is theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataplane._fast.blocktable import BlockTable
from dataplane.core.finite import nonfinite_rows
from dataplane.executor import StageExecutor
from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from dataplane.model.split import split_layers
from dataplane.model.weights import INDEX, load_weights, stage_shapes, weights_digest
from tests.parity.chain import Chain, i32
from tests.parity.conftest import MODELS, Build


@pytest.fixture
def copy(build: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(build("llama"), tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in values.items():
        if value is ...:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("architectures", ["GPT2LMHeadModel"], "architectures"),
        ("architectures", ..., "architectures"),
        ("hidden_size", "48", "hidden_size"),
        ("hidden_size", True, "hidden_size"),
        ("hidden_size", ..., "hidden_size"),
        ("num_hidden_layers", -1, "num_hidden_layers"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_key_value_heads", 4, "num_key_value_heads"),
        ("head_dim", 7, "head_dim"),
        ("head_dim", 1024, "head_dim"),
        ("rms_norm_eps", 0, "rms_norm_eps"),
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", "yes", "attention_bias"),
        ("rope_parameters", {"rope_type": "proportional"}, "rope_parameters.rope_type"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters.factor"),
        ("rope_parameters", {"rope_type": "longrope", "factor": 2.0}, "rope_parameters.short_factor"),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1.0]}, "rope_parameters.short_factor"),
        ("rope_parameters", {"rope_type": "linear"}, "rope_parameters.factor"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rope_parameters", [1], "rope_parameters"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("dtype", "int8", "dtype"),
        ("eos_token_id", "x", "eos_token_id"),
    ],
)
def test_junk_in_config(copy: Path, key: str, value: Any, named: str) -> None:
    change(copy / "config.json", **{key: value})
    (copy / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=rf"config\.json: .*{named}") as caught:
        load_config(copy)
    assert caught.value.path == copy / "config.json"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_object(copy: Path, text: bytes) -> None:
    (copy / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match="is not"):
        load_config(copy)


def test_older_rope_keys(copy: Path) -> None:
    change(
        copy / "config.json",
        rope_parameters=...,
        rope_theta=7.0,
        rope_scaling={"type": "linear", "factor": 2},
    )
    rope = load_config(copy).rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 7.0, 2.0)


def test_end_tokens_come_from_generation_config(copy: Path) -> None:
    change(copy / "config.json", eos_token_id=3)
    assert load_config(copy).eos_token_ids == (3,)
    change(copy / "generation_config.json", eos_token_id=[4, 5])
    assert load_config(copy).eos_token_ids == (4, 5)


@pytest.mark.parametrize("target", ["../x.safetensors", "/etc/passwd", "x.bin", 3])
def test_index_cannot_leave_the_directory(copy: Path, target: Any) -> None:
    data = json.loads((copy / INDEX).read_text())
    data["weight_map"]["model.norm.weight"] = target
    (copy / INDEX).write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        StageExecutor(copy, 1, 2, num_blocks=2)


def test_missing_and_broken_weights(copy: Path) -> None:
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 2, "the checkpoint should have several files"
    shards[0].write_bytes(b"no tensors here")
    with pytest.raises(ModelError, match="cannot be read"):
        load_weights(copy, load_config(copy), range(4))
    shards[0].unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_weights(copy, load_config(copy), range(4))
    (copy / INDEX).unlink()
    with pytest.raises(ModelError, match="has neither"):
        load_weights(copy, load_config(copy), range(4))


def test_wrong_shape(copy: Path) -> None:
    change(copy / "config.json", intermediate_size=90)
    with pytest.raises(ModelError, match="expected shape"):
        StageExecutor(copy, 0, 1, num_blocks=2)


@pytest.mark.parametrize("name", MODELS)
def test_stages_share_out_the_tensors(build: Build, name: str) -> None:
    path = build(name)
    config = load_config(path)
    parts = [set(stage_shapes(config, r)) for r in split_layers(config.num_layers, 3)]
    every = set(stage_shapes(config, range(config.num_layers)))
    assert set().union(*parts) == every
    shared = {t for i, p in enumerate(parts) for q in parts[i + 1 :] for t in p & q}
    assert shared == ({"model.embed_tokens.weight"} if config.tie_embeddings else set())


def test_digest_tells_weights_apart(build: Build, copy: Path) -> None:
    config = load_config(copy)
    whole = weights_digest(load_weights(copy, config, range(4)))
    assert whole == weights_digest(load_weights(build("llama"), config, range(4)))
    parts = {weights_digest(load_weights(copy, config, r)) for r in split_layers(4, 4)}
    assert len(parts | {whole}) == 5
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert weights_digest(load_weights(copy, config, range(4))) != whole


@pytest.mark.parametrize("layers", range(1, 40))
def test_split(layers: int) -> None:
    for stages in range(1, layers + 1):
        parts = split_layers(layers, stages)
        assert [i for r in parts for i in r] == list(range(layers))
        sizes = [len(r) for r in parts]
        assert len(parts) == stages
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
        assert sizes[-1] == min(sizes), "the last stage also has the output head"
    for bad in (0, -1, layers + 1):
        with pytest.raises(ValueError, match="cannot be split"):
            split_layers(layers, bad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_that_are_not_finite_are_suspect(build: Build, dtype: Any) -> None:
    """One such number among the activations of the stage before is seen in what this one hands on."""
    chain = Chain(build("llama"), 3, dtype)
    middle, table, row = chain.stages[1], chain.tables[1], chain.new()
    table.extend(row, range(4))
    step = table.fill(i32(row), i32(0), i32(20))
    bits, nan = (np.uint16, 0x7FC0) if dtype == "bfloat16" else (np.uint32, 0x7FC00000)
    hidden = np.zeros((20, middle.hidden_size), bits)
    middle.forward(None, hidden.data.cast("B"), step, i32())
    assert not middle.suspect
    hidden[17, 5] = nan
    out = middle.forward(None, hidden.data.cast("B"), step, i32())
    assert middle.suspect
    assert 17 in nonfinite_rows(out)


def test_bad_inputs_of_a_step(build: Build) -> None:
    first = Chain(build("llama"), 2).stages[0]
    second = Chain(build("llama"), 2).stages[1]
    table = BlockTable(1, 64, 16)
    row = table.new_row()
    table.extend(row, range(40))
    step = table.fill(i32(row), i32(0), i32(2))
    none = i32()
    for tokens in (None, np.array([1], np.int64), np.array([1, 2], np.int32)):
        with pytest.raises(ValueError, match=r"tokens|dtype"):
            first.forward(tokens, None, step, none)
    for token in (-1, 211):
        with pytest.raises(IndexError, match="vocabulary"):
            first.forward(np.array([1, token]), None, step, none)
    for hidden in (None, b"", b"x" * (2 * 48 * 4 - 1)):
        with pytest.raises(ValueError, match="activations"):
            second.forward(None, hidden, step, none)
    with pytest.raises(IndexError, match="a row that this step does not have"):
        second.forward(None, bytes(2 * 48 * 4), step, i32(2))
    with pytest.raises(ValueError, match="beyond"):
        first.forward(np.array([1]), None, table.fill(i32(row), i32(512), i32(1)), none)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        StageExecutor(build("llama"), 0, 5, num_blocks=2)
    assert second.forward(None, bytes(2 * 48 * 4), table.fill(i32(row), i32(0), i32(2)), none).shape == (
        0,
        211,
    )
