"""A Llama checkpoint as a GGUF file, values as they are (bfloat16 stays bfloat16), without a vocabulary."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert(model: Path, into: Path) -> None:
    """Writes `into`. The head is the embedding, as in the checkpoint."""
    config = json.loads((model / "config.json").read_bytes())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(into, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    bfloat16 = config["dtype"] == "bfloat16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if bfloat16 else gguf.LlamaFileType.ALL_F32)
    for name, tensor in load_file(model / "model.safetensors").items():
        if ".q_proj" in name or ".k_proj" in name:
            tensor = _interleave(tensor, heads if ".q_proj" in name else kv_heads)
        if tensor.dtype == torch.bfloat16 and tensor.ndim == 2:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    match name.removesuffix(".weight").split(".", 3):
        case ["model", "embed_tokens"]:
            return "token_embd.weight"
        case ["model", "norm"]:
            return "output_norm.weight"
        case ["model", "layers", layer, part]:
            return f"blk.{layer}.{NAMES[part]}.weight"
        case _:
            raise ValueError(f"no GGUF name for {name}")


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs lie half a head apart in a checkpoint, side by side in GGUF's llama."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
