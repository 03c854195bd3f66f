"""One digest names a checkpoint at all of its stages, on every host, by every version of the code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlplane.kfadmin.up import demo_model
from dataplane.model import checkpoint, digests
from dataplane.model.checkpoint import checkpoint_of
from dataplane.model.config import load_config
from dataplane.model.weights import INDEX, SINGLE, stage_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rope_theta": 10000.0, "torch_dtype": "float32", "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
# Registered by nodes of earlier code: those of later code stand beside them.
DIGEST = "0fdf5d498749876963485fe06f23da69"


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        parsed = load_config(folder)
        shapes = stage_shapes(parsed, range(parsed.num_layers))
        tensors = {
            name: torch.arange(torch.Size(shape).numel()).reshape(shape) / 512
            for name, shape in shapes.items()
        }
    save_file(tensors, folder / SINGLE)
    return folder


def of(folder: Path) -> str:
    return checkpoint_of(folder, None)


def test_it_is_what_earlier_code_says(tmp_path: Path) -> None:
    assert of(write(tmp_path / "m", CONFIG)) == DIGEST


def test_how_files_are_written_and_cut_does_not_matter(tmp_path: Path) -> None:
    one = write(tmp_path / "one", CONFIG)
    config = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "use_cache": False}
    config |= {
        "eos_token_id": [2, 3],
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "_name_or_path": "x",
    }
    del config["rope_theta"]
    two, tensors = tmp_path / "two", load_file(one / SINGLE)
    write(two, config, tensors)
    assert of(two) == of(one)
    (two / SINGLE).unlink()
    where = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file(
            {name: tensors[name] for name in tensors if where[name] == file}, two / file, {"format": "pt"}
        )
    (two / INDEX).write_text(json.dumps({"weight_map": where}))
    assert of(two) == of(one)
    # Only some of it is here, as on a host that has one stage's files.
    (two / "part-1.safetensors").unlink()
    assert of(two) == ""


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}, {"tie_word_embeddings": False}, {"sliding_window": 8}],
)
def test_another_config_is_another_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert of(write(tmp_path / "a", config)) != of(write(tmp_path / "b", {**config, **changes}))


def test_a_fine_tune_of_equal_shape_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", CONFIG)
    tensors = load_file(one / SINGLE)
    for number, name in enumerate(tensors):
        tuned = write(tmp_path / f"{number}", CONFIG, {**tensors, name: tensors[name] + 0.25})
        assert of(tuned) != of(one), name
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert of(write(tmp_path / "half", CONFIG, half)) != of(one)
    # With very many tensors, too.
    monkeypatch.setattr(checkpoint, "SAMPLED_MAX", 4)
    assert of(tmp_path / "1") != of(one)


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert of(tmp_path / "nothing") == ""
    one = write(tmp_path / "one", CONFIG)
    whole = (one / SINGLE).read_bytes()
    tensors = load_file(one / SINGLE)
    save_file({name: tensors[name] for name in list(tensors)[1:]}, one / SINGLE)
    assert of(one) == ""
    for junk in (
        b"",
        b"\xff" * 64,
        whole[:4000],
        whole[:-1],
        whole.replace(b"data_offsets", b"data_0ffsets"),
    ):
        (one / SINGLE).write_bytes(junk)
        assert of(one) == ""


def test_a_start_does_not_read_what_was_read_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 0.0)
    model, kept = tmp_path / "model", tmp_path / "run" / "checkpoint.json"
    shutil.copytree(demo_model(), model)
    read: list[int] = []
    original = checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda c, t: read.append(len(t)) or original(c, t))
    first = checkpoint_of(model, kept)
    assert first == of(demo_model()) != ""
    read.clear()
    assert checkpoint_of(model, kept) == first
    assert not read
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 0.5}))
    assert checkpoint_of(model, kept) != first
