"""What config.json of the newer families may leave out is what transformers' classes say."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dataplane.model.config import load_config

SIZES = {
    "vocab_size": 211,
    "hidden_size": 512,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3": ("Phi3ForCausalLM", "phi3", {}),
    "phi3 with a window": ("Phi3ForCausalLM", "phi3", {"sliding_window": 7, "partial_rotary_factor": 0.5}),
    "mixtral": ("MixtralForCausalLM", "mixtral", {}),
    "mixtral with a window": ("MixtralForCausalLM", "mixtral", {"sliding_window": 7, "rope_theta": 20.0}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {}),
    "qwen3_moe with a window": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "head_dim": 32,
            "attention_bias": True,
            "num_experts": 16,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_defaults(tmp_path: Path, case: str) -> None:
    architecture, model_type, changes = CASES[case]
    values = {"architectures": [architecture], "model_type": model_type, **SIZES, **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = load_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.windows == (theirs.sliding_window,) * 4
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.part == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.qkv_bias == ours.o_bias == getattr(theirs, "attention_bias", False)
    if ours.experts is not None:
        assert ours.experts.count == theirs.num_local_experts
        assert ours.experts.chosen == theirs.num_experts_per_tok
        wide = "intermediate_size" if model_type == "mixtral" else "moe_intermediate_size"
        assert ours.experts.intermediate == getattr(theirs, wide)
        assert ours.experts.normalised == getattr(theirs, "norm_topk_prob", True)


def test_float16_checkpoints_say_so(tmp_path: Path) -> None:
    for said, (dtype, float16) in {"float16": ("bfloat16", True), "bfloat16": ("bfloat16", False)}.items():
        values = {"architectures": ["Phi3ForCausalLM"], **SIZES, "torch_dtype": said}
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = load_config(tmp_path)
        assert (config.dtype, config.float16) == (dtype, float16)
