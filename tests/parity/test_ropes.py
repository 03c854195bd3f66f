"""Rotary embeddings that are stretched: their tables at real positions, and streams that go beyond what was trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from dataplane.model.rotary import RotaryTable, inverse_frequencies
from tests.parity.chain import Chain
from tests.parity.conftest import BASE, longrope

LONG = {"max_position_embeddings": 131072, "hidden_size": 512, "num_attention_heads": 4}
PHI = BASE | {"pad_token_id": None, "hidden_size": 96}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("Llama", {"rope_type": "default", "rope_theta": 1000000.0}),
    "linear": ("Llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 32.0}),
    "llama3": (
        "Llama",
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        "Qwen3",
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "longrope": ("Phi3", longrope(48) | {"partial_rotary_factor": 0.75}),
}


def write(path: Path, family: str, values: dict[str, Any]) -> Any:
    """A checkpoint with random weights, and the model that it is of."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**values, initializer_range=0.15)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_tables_at_real_positions(tmp_path: Path, kind: str) -> None:
    """Sines and cosines of transformers, in float32, at positions up to the end of a long context."""
    family, rope = KINDS[kind]
    values = BASE | LONG | {"head_dim": 128, "rope_parameters": dict(rope)}
    if family == "Phi3":
        values |= {"pad_token_id": None, "original_max_position_embeddings": 4096}
    config = getattr(transformers, f"{family}Config")(**values)
    architecture = {"architectures": [f"{family}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | architecture, default=str))
    ours = load_config(tmp_path)
    rotary = getattr(transformers.models, family.lower())
    theirs = getattr(getattr(rotary, f"modeling_{family.lower()}"), f"{family}RotaryEmbedding")(config)
    table = RotaryTable(ours.rope, ours.head_dim, ours.max_positions)
    table.cover(131072)
    at = torch.tensor([[0, 1, 4095, 4096, 32768, 100001, 131071]])
    for want, got in zip(theirs(torch.zeros(1), at), (table.cos, table.sin), strict=True):
        want, inv = want[0, :, : table.cos.shape[1]], inverse_frequencies(ours.rope, ours.head_dim)
        # Powers and sines of libraries differ in the last bit or two, angles by as much of themselves.
        room = 2e-7 + 2.4e-7 * at[0].numpy()[:, None] * inv[None, :]
        assert (np.abs(got[at[0]].numpy() - want.numpy()) <= room * ours.rope.attention_factor).all()


def test_dynamic_streams_beyond_what_was_trained(tmp_path: Path) -> None:
    """As transformers decodes them: each position as long as its sequence is then, and KV stays as it was written."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = write(tmp_path, "Llama", BASE | {"max_position_embeddings": 48, "rope_parameters": rope})
    prompt = np.random.default_rng(3).integers(0, 200, 40).tolist()
    with torch.inference_mode():
        want = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert load_config(tmp_path).max_positions == 192
    assert Chain(tmp_path, 2).greedy([prompt], 60, 7) == [want[0, 40:].tolist()]
    assert len(set(want[0, 48:].tolist())) > 8


def test_any_path_writes_the_same_dynamic_positions(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    write(tmp_path, "Llama", BASE | {"max_position_embeddings": 48, "rope_parameters": rope})
    text = np.random.default_rng(4).integers(0, 200, 90).tolist()
    chain = Chain(tmp_path, 2)
    rows = [chain.new() for _ in range(2)]
    whole = chain.step([(rows[0], text)])[rows[0]]
    parts = [chain.step([(rows[1], text[at : at + 13])])[rows[1]] for at in range(0, 90, 13)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("context_max", "length"), [(64, 20), (0, 70)])
def test_longrope_of_the_context_that_is_served(tmp_path: Path, context_max: int, length: int) -> None:
    """Within what was trained the short factors; else the long ones, as transformers has for sequences beyond it."""
    changes = {"original_max_position_embeddings": 64, "rope_parameters": longrope(8)}
    model = write(tmp_path, "Phi3", PHI | changes)
    prompt = np.random.default_rng(3).integers(0, 200, length).tolist()
    with torch.inference_mode():
        text = list(prompt)
        for _ in range(24):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    chain = Chain(tmp_path, 2, context_max=context_max)
    assert chain.greedy([prompt], 24) == [text[length:]]
    other = Chain(tmp_path, 2, context_max=64 - context_max)
    assert other.greedy([prompt], 24) != [text[length:]], "the factors make a difference"
    assert chain.stages[0].numerics != other.stages[0].numerics


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"partial_rotary_factor": 0.6}, "rope_parameters.partial_rotary_factor"),
        ({"rope_scaling": longrope(8) | {"rope_type": "su", "long_factor": [1.0]}}, "rope_scaling.long_factor"),
        ({"original_max_position_embeddings": "64", "rope_scaling": longrope(8)},
         "original_max_position_embeddings"),
        ({"sliding_window": 0}, "sliding_window"),
    ],
)  # fmt: skip
def test_what_phi_3_cannot_have_is_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    values = {**PHI, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError) as error:
        load_config(tmp_path)
    assert error.value.key == key
