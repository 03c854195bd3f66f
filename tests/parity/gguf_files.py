"""GGUF files for tests, written by the `gguf` package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import load_file, save_file

from dataplane.model.gguf import ENDS, LAYER
from dataplane.model.weights import SINGLE

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 4, 2, 16, 3, 224
BYTES = [*map(chr, (*range(33, 127), *range(161, 173), *range(174, 256)))]  # byte-level BPE's, but for 68
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
WORDS = ["<|start|>", "<|end|>", "he", "ll", "hell", "hello", "Ġhe", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ he", "1 2"]


def make_checkpoint(path: Path) -> None:
    """A small Llama of random weights, without a tokenizer."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB + 40, hidden_size=HEADS * HEAD_DIM, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=256,
        initializer_range=0.15, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def side_by_side(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Queries' and keys' rows as llama.cpp's converter has them."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(original: Path, kind: str, into: Path, **fields: Any) -> tuple[Path, Path]:
    """A GGUF file of the model, and a checkpoint of the values that it holds."""
    path = into / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HEADS * HEAD_DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*WORDS, *BYTES]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    values = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        weight = tensor.float().numpy()
        module, _, part = name.removeprefix("model.layers.").rpartition(".")
        layer, _, inner = module.partition(".")
        theirs = ENDS.get(name) or f"blk.{layer}.{LAYER[inner]}.{part}"
        quant = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else gguf.GGMLQuantizationType[kind]
        if name.startswith("model.embed"):
            quant = gguf.GGMLQuantizationType.Q8_0
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(inner)
        data = gguf.quants.quantize(weight if heads is None else side_by_side(weight, heads), quant)
        writer.add_tensor(theirs, data, raw_dtype=quant)
        values[name] = torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(weight, quant), quant).copy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = into / f"{kind}-plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((original / "config.json").read_bytes())
    save_file(values, plain / SINGLE)
    return path, plain
