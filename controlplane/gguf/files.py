"""The files of a Hugging Face directory that say what a GGUF file says, tensors apart."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlplane.gguf.header import GgufError, Header, is_gguf, read_header
from controlplane.gguf.tokenizer import begins, strings, token_text, tokenizer_json

Json = dict[str, Any]

# general.architecture -> the class of transformers, and its model_type
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
ENDS = ("eos", "eot", "eom")
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QUANTIZATION = {"quant_method": "gguf"}
FORMAT = 1  # raise it when what is written changes


def folder_of(model: Path, run_dir: Path) -> Path:
    """Where the small files of a model are: in its directory, or of a GGUF file in one below `run_dir`, which is
    written if it is not there yet. Raises GgufError, OSError."""
    if not is_gguf(model):
        return model
    stat = model.stat()
    identity = f"{FORMAT} {model.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    parent = run_dir / "gguf"
    final = parent / f"{model.stem}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}"
    if final.is_dir():
        return final
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
    try:
        for name, content in small_files(model).items():
            (scratch / name).write_bytes(content)
        os.replace(scratch, final)
    except OSError:
        if not final.is_dir():  # else another process was faster, with the same files
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # there only if it was not renamed
    return final


def small_files(path: Path) -> dict[str, bytes]:
    """By name, for a GGUF file. Raises GgufError, OSError."""
    header = read_header(path)
    files: dict[str, Json] = {
        "config.json": config_of(path, header),
        "tokenizer.json": tokenizer_json(header.fields),
        "tokenizer_config.json": _tokenizer_config(header.fields),
    }
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}


def config_of(path: Path, header: Header) -> Json:
    """config.json as transformers would write it. Raises GgufError for a model that has no counterpart."""
    fields = header.fields
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise GgufError(
            f"general.architecture: {name!r:.80} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if fields.get(f"{name}.expert_count") or fields.get("split.count", 1) > 1:
        raise GgufError("models of experts and files of several parts are not supported")
    architecture, model_type = ARCHITECTURES[name]

    def number(key: str, default: float | None = None) -> Any:
        value = fields.get(f"{name}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise GgufError(f"{name}.{key}: expected a number, found {value!r:.80}")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    config: Json = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", hidden // max(heads, 1)),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": number("rope.freq_base", 10000.0),
        "max_position_embeddings": number("context_length"),
        "vocab_size": len(strings(fields, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": model_type == "llama" and "blk.0.attn_output.bias" in header.tensors,
        "hidden_act": "silu",
        "dtype": "float32",  # GGUF names none; in float32 a stage computes with exactly the values that it holds
        "quantization_config": QUANTIZATION,
    }
    ends = {fields.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS}
    config["eos_token_id"] = sorted(end for end in ends if isinstance(end, int)) or None
    window = fields.get(f"{name}.attention.sliding_window")
    if window and model_type == "llama":
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": window,
        }
    if scaling := _rope_scaling(path, header, name, config):
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(path: Path, header: Header, name: str, config: Json) -> Json | None:
    kind = header.fields.get(f"{name}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": header.fields.get(f"{name}.rope.scaling.factor")}
    if kind != "none":
        raise GgufError(f"{name}.rope.scaling.type: {kind!r:.80} is not supported; supported: none, linear")
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.bytes)
    found = struct.unpack(f"<{len(data) // 4}f", data) if tensor.block.name == "f32" else ()
    factor = round(max(found, default=0.0), 3)
    wanted = _llama3_factors(config["head_dim"], config["rope_theta"], factor or 1.0)
    same = len(found) == len(wanted) and all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, wanted, strict=True)
    )
    if not same:
        raise GgufError(f"{ROPE_FACTORS}: they are not those of Llama 3.1 and 3.2, the only ones supported")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _llama3_factors(head_dim: int, theta: float, factor: float) -> list[float]:
    """What each frequency is divided by."""
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    original = LLAMA3_ROPE["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _tokenizer_config(fields: Mapping[str, Any]) -> Json:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config: Json = {
        key: text for name, key in names.items() if (text := token_text(fields, name)) is not None
    }
    config["add_bos_token"] = begins(fields)
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {**config, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}


def _shortest(value: float) -> float:
    """The decimal number that was meant by a float of 32 bits."""
    (single,) = struct.unpack("<f", struct.pack("<f", value))
    for digits in range(1, 17):
        meant = float(f"{single:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", meant))[0] == single:
            return meant
    return value
