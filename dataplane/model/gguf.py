"""The tensors of a GGUF file under the names that they have in a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from controlplane.gguf.header import GgufError, Tensor, read_header
from dataplane.model.errors import ModelError

# What ggml calls them, behind "blk.N.".
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PLAIN = ("f32", "f16", "bf16")  # kept under their own name; of others the type of the blocks is behind it


def place_of(path: Path, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Where the tensors of these names are, by the names under which they are kept. Raises ModelError."""
    try:
        tensors = read_header(path).tensors
    except (GgufError, OSError) as error:
        raise ModelError(path, None, str(error)) from error
    found = {}
    for name in names:
        tensor = tensors.get(_theirs(name))
        if tensor is None:
            raise ModelError(path, name, f"the tensor {_theirs(name)} is missing")
        kind = tensor.block.name
        found[name if kind in PLAIN else f"{name}.{kind}"] = tensor
    return found


def _theirs(name: str) -> str:
    if name in ENDS:
        return ENDS[name]
    module, _, kind = name.removeprefix("model.layers.").rpartition(".")
    index, _, rest = module.partition(".")
    return f"blk.{index}.{LAYER[rest]}.{kind}"
