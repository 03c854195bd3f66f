"""Gemma 3: what its configurations ask for, and the text of checkpoints that are for images as well."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dataplane.executor import StageExecutor
from dataplane.model.bundle import open_bundle
from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from tests.parity.chain import Chain

TEXT: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16,
}  # fmt: skip


def write(path: Path, **values: Any) -> None:
    text = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **TEXT}
    (path / "config.json").write_text(json.dumps(text | values))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling.rope_type"),
        (
            {
                "rope_parameters": {"full_attention": {"rope_type": "default"}},
                "rope_scaling": {"type": "linear", "factor": 8.0},
            },
            "rope_scaling.type",
        ),
        ({"sliding_window": None}, "sliding_window"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "axial"}}},
            "rope_parameters.sliding_attention.rope_type",
        ),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "model_type"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}, "text_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    write(tmp_path, **values)
    with pytest.raises(ModelError) as error:
        load_config(tmp_path)
    assert error.value.key == key


def test_older_keys_and_what_a_class_says_where_they_are_absent(tmp_path: Path) -> None:
    older = {
        "rope_theta": 7000.0,
        "rope_local_base_freq": 70.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    write(tmp_path, **older, sliding_window_pattern=2)
    config = load_config(tmp_path)
    assert config.local_rope is not None
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("linear", 7000.0, 8.0)
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 70.0)
    assert config.windows == (9, None, 9, None)
    assert config.tie_embeddings
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["full_attention"] == {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 7000.0,
    }
    assert [kind == "sliding_attention" for kind in theirs.layer_types] == [
        w is not None for w in config.windows
    ]
    few = ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads((tmp_path / "config.json").read_text()).items()
                if key in few
            }
        )
    )
    config, theirs = load_config(tmp_path), transformers.Gemma3TextConfig(hidden_size=48, num_hidden_layers=4)
    for ours, name in (
        (config.vocab_size, "vocab_size"), (config.num_heads, "num_attention_heads"), (config.head_dim, "head_dim"),
        (config.num_kv_heads, "num_key_value_heads"), (config.max_positions, "max_position_embeddings"),
        (config.rms_norm_eps, "rms_norm_eps"), (config.windows[0], "sliding_window"),
    ):  # fmt: skip
        assert ours == getattr(theirs, name), name


def test_without_layers_that_have_a_window_none_is_needed(tmp_path: Path) -> None:
    write(tmp_path, sliding_window=None, layer_types=["full_attention"] * 4)
    assert load_config(tmp_path).windows == (None,) * 4


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_a_kind_by_its_oldest_name(tmp_path: Path, key: str) -> None:
    write(tmp_path, rope_scaling={key: "linear", "factor": 8.0})
    assert load_config(tmp_path).rope.kind == "linear"
    both = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
    write(tmp_path, rope_scaling={key: "linear", "factor": 8.0}, rope_parameters=both)
    assert load_config(tmp_path).rope.factor == 8.0


def test_the_text_of_a_model_for_images(tmp_path: Path) -> None:
    """Its tensors have another name; a blank node gets them, and the same tokens come out."""
    torch.manual_seed(7)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**TEXT, "initializer_range": 0.15, "tie_word_embeddings": False},
        vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    (whole / "generation_config.json").unlink()
    prompt = np.random.default_rng(3).integers(0, 200, 30).tolist()
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(20):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert Chain(whole, 2).greedy([prompt], 20, 7) == [text[30:]]
    assert len(set(text[30:])) > 5
    for stage in range(2):
        bundle, blank = open_bundle(whole, stage, 2), tmp_path / f"stage{stage}"
        blank.mkdir()
        for name in bundle.files:
            (blank / name).write_bytes(bundle.read(name, 0, bundle.size(name)))
        there, here = (StageExecutor(path, stage, 2, num_blocks=4) for path in (whole, blank))
        assert there.weights_digest == here.weights_digest
