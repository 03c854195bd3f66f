"""The models that benches run: Llama checkpoints of random weights, in a cache directory, made when first asked for.

T is small enough that everything but arithmetic shows; V is smaller yet and has Llama-3's vocabulary; S (110 M
parameters) is bound by memory and matrix products; K has much KV for its size. The
weights come from a seed, so every machine measures the same model. They are normal with a standard deviation of 0.02,
as models are initialised, but for queries and keys: attention that looks at all positions alike makes a model of random
weights say one token for ever; with scores of a standard deviation of about 6 it says another one nearly every time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

Dtype = Literal["float32", "bfloat16"]
MAX_POSITIONS = 4096
SEED = 20
WEIGHT_STD = 0.02
LLAMA3_VOCAB = 128256
GROUP = 128  # inputs that share a scale of four bits
QUERY_STD = 2.5  # of the values of queries and keys
FORMAT = 2  # in the directory's name: raise it when a change below makes other files


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model, named as config.json names them. The output head is the embedding."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int


MODELS = {
    "T": Shape(256, 8, 8, 4, 768, 4096, 32),
    "S": Shape(768, 12, 12, 4, 2048, 32000, 64),
    # Many heads: 256 KB of KV a token in float32, and little to compute.
    "K": Shape(128, 16, 16, 16, 256, 1024, 128),
    "V": Shape(256, 4, 8, 4, 768, LLAMA3_VOCAB, 32),
}


def cache_dir() -> Path:
    """Where checkpoints are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kevlarflow-bench"


def checkpoint(name: str, dtype: Dtype, cache: Path | None = None) -> Path:
    """The checkpoint directory of a model of MODELS; written, whole or not at all, if it is not there yet."""
    parent = cache or cache_dir()
    return _made(parent / f"{name}-{dtype}-{FORMAT}", lambda scratch: _write(MODELS[name], dtype, scratch))


def _made(final: Path, write: Callable[[Path], None]) -> Path:
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    try:
        write(scratch)
        scratch.rename(final)
    except OSError:
        if not final.exists():  # else another process was faster, with the same files
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # there only if it was not renamed
    return final


def four_bits(source: Path) -> Path:
    """Beside a checkpoint, the same one with its layers' weights in four bits."""
    final = source.with_name(f"{source.name}-int4")
    return _made(final, lambda scratch: write_four_bits(source, scratch, GROUP))


def weight_bytes(model_dir: Path) -> int:
    """Bytes that a decode step of one token reads: every weight once (the head is the embedding)."""
    return (model_dir / "model.safetensors").stat().st_size


def _write(shape: Shape, dtype: Dtype, into: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for readers older than transformers 5
    }
    (into / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    save_file(_weights(shape, getattr(torch, dtype)), into / "model.safetensors", metadata={"format": "pt"})
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, shape.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(into / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (into / "tokenizer_config.json").write_bytes(msgspec.json.encode(special))


def _weights(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    hidden, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    queries = shape.num_attention_heads * shape.head_dim

    def normal(rows: int, columns: int, std: float = WEIGHT_STD) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(dtype)

    weights = {"model.embed_tokens.weight": normal(shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        for name, rows in (("self_attn.q_proj", queries), ("self_attn.k_proj", kv)):
            weights[f"{prefix}{name}.weight"] = normal(rows, hidden, QUERY_STD / hidden**0.5)
        for name, rows, columns in (
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", shape.intermediate_size, hidden),
            ("mlp.up_proj", shape.intermediate_size, hidden),
            ("mlp.down_proj", hidden, shape.intermediate_size),
        ):
            weights[f"{prefix}{name}.weight"] = normal(rows, columns)
    weights["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    return weights


def write_four_bits(source: Path, into: Path, group: int) -> None:
    """The checkpoint with its layers' weights in four bits: symmetric, a scale for each `group` inputs."""
    kept = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj.weight" not in name:
            kept[name] = weight
            continue
        groups = weight.float().view(len(weight), -1, group)
        scale = groups.abs().amax(-1) / 7
        q = (groups / scale[..., None]).round().clamp(-8, 7).long() + 8
        words = (q.view(len(q), -1, 8) << torch.arange(0, 32, 4)).sum(-1)
        base = name.removesuffix(".weight")
        kept[f"{base}.weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
        kept[f"{base}.weight_scale"] = scale.bfloat16()
    save_file(kept, into / "model.safetensors", metadata={"format": "pt"})
    config = msgspec.json.decode((source / "config.json").read_bytes())
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": group, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (into / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, into / name)
