"""Two keys for one thing in config.json: what transformers makes of them, or refused by name; never something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from dataplane.model.config import ModelConfig, load_config
from dataplane.model.errors import ModelError
from dataplane.model.rotary import inverse_frequencies
from tests.parity.chain import Chain

BASE: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
FAMILIES = list(CLASSES)
DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LINEAR = {"type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ABSENT = "<absent>"

# What is different from BASE, and the key that is refused; "" where transformers' meaning is ours.
CASES: list[tuple[dict[str, Any], str]] = [
    ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, ""),
    ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR, "rope_theta": 700.0}, ""),
    ({"rope_parameters": DEFAULT, "rope_scaling": {**LINEAR, "rope_theta": 70.0}}, ""),
    ({"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}, ""),
    ({"rope_parameters": DEFAULT, "rope_scaling": YARN}, ""),
    ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "dynamic", "factor": 2.3}}, ""),
    ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "axial"}}, "rope_scaling.type"),
    ({"rope_parameters": {**DEFAULT, "rope_type": "yarn", "factor": 2.0}}, ""),
    ({"rope_parameters": {**DEFAULT, "rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_slow": 2}}, ""),
    ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, ""),
    ({"rope_scaling": {**YARN, "factor": None, "mscale": 0.7, "mscale_all_dim": 1.4}}, ""),
    ({"rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3, 4, 5],
      "original_max_position_embeddings": 512}}, ""),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0, 3, 4, 5]}},
     "rope_scaling.short_factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "default"}}, ""),
    ({"rope_parameters": {}, "rope_scaling": LINEAR}, ""),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {}}, ""),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None}, ""),
    ({"rope_parameters": DEFAULT, "rope_theta": 20.0}, ""),
    ({"rope_theta": 20.0}, ""),
    ({"hidden_act": "swish"}, ""),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 20.0}, ""),
    ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, ""),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, ""),
    ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {**LINEAR, "rope_theta": None}}, "rope_scaling.rope_theta"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, ""),
    ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, ""),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 32}, ""),
    ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
    ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 1.0}, ""),
    ({"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters.full_attention"),
    ({"num_key_value_heads": ABSENT, "num_attention_heads": 32, "hidden_size": 256}, ""),
    ({"num_key_value_heads": ABSENT, "num_attention_heads": 64, "hidden_size": 512}, ""),
    ({"num_key_value_heads": None}, ""),
    ({"head_dim": None}, ""),
    ({"head_dim": ABSENT}, ""),
    ({"head_dim": 16}, ""),
    ({"max_position_embeddings": ABSENT}, ""),
    ({"torch_dtype": "bfloat16", "dtype": "float32"}, ""),
    ({"torch_dtype": "float32", "dtype": "bfloat16"}, ""),
    ({"torch_dtype": "bfloat16", "dtype": None}, ""),
    ({"torch_dtype": "bfloat16"}, ""),
    ({"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 2}, ""),
    ({"sliding_window": 17, "use_sliding_window": False, "max_window_layers": 2}, ""),
    ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 2}, ""),
    ({"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 4,
      "layer_types": ["sliding_attention", "full_attention"] * 2}, ""),
    ({"tie_word_embeddings": True}, ""),
    ({"attention_bias": True, "qkv_bias": True}, ""),
    ({"qkv_bias": True}, ""),
    ({"mlp_bias": True}, ""),
    ({"text_config": {"tie_word_embeddings": True, "num_key_value_heads": 3}}, "text_config"),
    ({"model_type": "gemma"}, "model_type"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
]  # fmt: skip


def write(path: Path, family: str, changes: dict[str, Any]) -> dict[str, Any]:
    architecture = f"{CLASSES[family]}ForCausalLM"
    values = {**BASE, "model_type": family, "architectures": [architecture], **changes}
    values = {key: value for key, value in values.items() if value != ABSENT}
    (path / "config.json").write_text(json.dumps(values))
    return values


def assert_as_transformers(ours: ModelConfig, path: Path) -> None:
    """Every switch of ours against the modules that transformers builds of the same file."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[0].self_attn
    rotary = type(model.model.rotary_emb)(config)
    np.testing.assert_array_equal(inverse_frequencies(ours.rope, ours.head_dim), rotary.inv_freq.numpy())
    assert rotary.attention_scaling == ours.rope.attention_factor
    assert attention.q_proj.weight.shape == (ours.num_heads * ours.head_dim, ours.hidden_size)
    assert attention.k_proj.weight.shape == (ours.num_kv_heads * ours.head_dim, ours.hidden_size)
    assert (attention.q_proj.bias is not None, attention.o_proj.bias is not None) == (
        ours.qkv_bias,
        ours.o_bias,
    )
    assert (model.model.layers[0].mlp.up_proj.bias is not None) == ours.mlp_bias
    assert ours.qk_norm == hasattr(attention, "q_norm")
    if ours.family == "mistral":
        windows = [config.sliding_window] * ours.num_layers
    else:
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    assert list(ours.windows) == windows
    stretched = {"yarn": ours.rope.original_max_positions, "dynamic": config.max_position_embeddings}
    reached = int(ours.rope.factor * stretched.get(ours.rope.kind, 0))
    assert ours.max_positions == max(config.max_position_embeddings, reached)
    assert ours.tie_embeddings == config.tie_word_embeddings
    assert ours.rms_norm_eps == config.rms_norm_eps
    assert ours.dtype == ("bfloat16" if config.dtype is torch.bfloat16 else "float32")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("changes", "refused"), CASES, ids=[json.dumps(case)[:70] for case, _ in CASES])
def test_a_config_is_read_as_transformers_does(
    tmp_path: Path, family: str, changes: dict[str, Any], refused: str
) -> None:
    write(tmp_path, family, changes)
    if family == "qwen3" and changes == {"head_dim": None}:
        refused = "head_dim"  # by transformers, too
    if refused:
        with pytest.raises(ModelError) as error:
            load_config(tmp_path)
        assert error.value.key == refused
        return
    ours = load_config(tmp_path)
    if family == "mistral" and changes == {"num_key_value_heads": None}:
        assert ours.num_kv_heads == 6  # as of transformers 4; 5 refuses it
        return
    if family == "qwen2" and changes == {"head_dim": None}:
        assert ours.head_dim == 8  # transformers fails to build the model
        return
    assert_as_transformers(ours, tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_without_a_window_are_refused(tmp_path: Path, family: str) -> None:
    """transformers fails at the first token."""
    write(tmp_path, family, {"sliding_window": 17, "layer_types": ["sliding_attention"] * 4})
    with pytest.raises(ModelError) as error:
        load_config(tmp_path)
    assert error.value.key == "layer_types"


@pytest.mark.parametrize("window", [17, None, ABSENT])
@pytest.mark.parametrize("used", [True, False])
def test_a_window_of_all_layers_of_a_mixture(tmp_path: Path, window: int | str | None, used: bool) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    values = {"sliding_window": window, "use_sliding_window": used, "architectures": ["Qwen3MoeForCausalLM"]}
    values = {**BASE, **experts, "model_type": "qwen3_moe", **values}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != ABSENT}))
    theirs = AutoConfig.from_pretrained(tmp_path).sliding_window
    assert load_config(tmp_path).windows == (theirs,) * 4


def test_the_generation_config_says_which_tokens_end(tmp_path: Path) -> None:
    write(tmp_path, "llama", {"eos_token_id": 5})
    assert load_config(tmp_path).eos_token_ids == (5,)
    for said, wanted in (([7, 8], (7, 8)), (9, (9,)), (None, (5,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert load_config(tmp_path).eos_token_ids == wanted


ROPES = {
    "linear": {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
    "llama3": {
        "rope_parameters": DEFAULT,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
    },
    "theta": {"rope_parameters": DEFAULT, "rope_theta": 3.0},
    "empty": {
        "rope_parameters": {},
        "rope_scaling": {"rope_type": "linear", "factor": 5.0},
        "rope_theta": 50.0,
    },
}


@pytest.mark.parametrize("case", list(ROPES))
@pytest.mark.parametrize("family", FAMILIES)
def test_token_for_token(tmp_path: Path, family: str, case: str) -> None:
    torch.manual_seed(3)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**BASE, initializer_range=0.3)
    getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).save_pretrained(tmp_path)
    write(tmp_path, family, ROPES[case])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = torch.randint(0, BASE["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 40:].tolist()
    assert Chain(tmp_path, 2).greedy([prompt[0].tolist()], 24) == [want]
    assert len(set(want)) > 3
