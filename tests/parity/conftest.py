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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 24.0,
}


def longrope(frequencies: int) -> dict[str, Any]:
    """Rotary parameters of a Phi-3."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(frequencies)],
        "long_factor": [1.5 + 0.5 * i for i in range(frequencies)],
    }


# name: family, what differs from BASE
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied_one_kv_head": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 6}),
    "llama_linear_rope_biases": (
        "Llama",
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "intermediate_size": 50},
    ),
    "llama_shards": ("Llama", {"intermediate_size": 680, "num_key_value_heads": 3, "mlp_bias": True}),
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
    "llama_yarn_rope": ("Llama", {"rope_parameters": YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "sliding_window": 23}),
    "qwen3_moe": (  # one layer that is no mixture, and shares of experts that do not add up to 1
        "Qwen3Moe",
        {
            "num_local_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 24,
            "sliding_window": 21,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": None, "sliding_window": 19}),
    "phi3_longrope": (  # partial, and of the short factors: 512 positions were trained
        "Phi3",
        {
            "pad_token_id": None,
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 512,
            "rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75, "factor": 8.0},
        },
    ),
    "qwen3_head_dim": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_seven_to_one": (
        "Qwen3",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 18, "attention_bias": True},
    ),
}


def config_of(family: str, values: dict[str, Any], **more: Any) -> Any:
    """The configuration of transformers for the family."""
    return getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")(**values, **more)


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
            config = config_of(family, BASE | changes, initializer_range=0.15)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            with torch.no_grad():  # norms and biases start as ones and zeros, which would hide mistakes
                for value in model.parameters():
                    if value.ndim == 1:
                        value.add_(torch.randn_like(value) * 0.2)
                # Lively output: the next token follows from the last one.
                if not config.tie_word_embeddings:
                    model.get_input_embeddings().weight.mul_(6)
            # Some checkpoints come in several files with an index.
            size = "60KB" if name in ("llama", "qwen3_head_dim") else "5GB"
            model.save_pretrained(path, max_shard_size=size)
        return path

    return make
