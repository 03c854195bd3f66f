"""Random-weight checkpoints of every family and odd shape, written by transformers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

BASE = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}

# name: family, what differs from BASE
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied_one_kv_head": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 6}),
    "llama_linear_rope_biases": (
        "Llama",
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "intermediate_size": 50},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 21, "head_dim": 20}),
    "mistral_full": ("Mistral", {"sliding_window": None, "num_key_value_heads": 3}),
    "qwen2_biases": ("Qwen2", {"vocab_size": 203}),
    "qwen2_mixed_windows": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_head_dim": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_seven_to_one": (
        "Qwen3",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 18, "attention_bias": True},
    ),
}

Build = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Writes a checkpoint once a session and returns its directory."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        path = root / name
        if not path.exists():
            family, changes = MODELS[name]
            torch.manual_seed(sum(map(ord, name)))
            config = getattr(transformers, f"{family}Config")(**(BASE | changes), initializer_range=0.15)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            with torch.no_grad():  # norms and biases start as ones and zeros, which would hide mistakes
                for value in model.parameters():
                    if value.ndim == 1:
                        value.add_(torch.randn_like(value) * 0.2)
                if not config.tie_word_embeddings:  # lively output: the next token follows from the last one
                    model.get_input_embeddings().weight.mul_(6)
            # Some checkpoints come in several files with an index.
            size = "60KB" if name in ("llama", "qwen3_head_dim") else "5GB"
            model.save_pretrained(path, max_shard_size=size)
        return path

    return make
