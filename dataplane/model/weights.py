"""Weights of one stage from safetensors files: only its own tensors are mapped, nothing is unpickled.

torch is imported by what loads tensors, not by what only names them: a node of the oracle executor has none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from controlplane.gguf.header import BLOCKS, is_gguf
from dataplane.model.config import ModelConfig, read_json
from dataplane.model.errors import ModelError
from dataplane.model.gguf import PLAIN, place_of
from dataplane.model.schemes import Scheme

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
PACKED = {"qweight": "torch.int32", "qzeros": "torch.int32", "g_idx": "torch.int32", "weight_packed": "torch.int32",
          "weight_zero_point": "torch.int32"}  # fmt: skip
BLOCKS_BY_NAME = {block.name: block for block in BLOCKS.values() if block.name not in PLAIN}


def stage_shapes(config: ModelConfig, layers: range) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the stage that runs `layers`."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if layers.start == 0:
        shapes[EMBED] = (c.vocab_size, c.hidden_size)
    for i in layers:
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = (
            c.hidden_size,
        )
        linears = [("self_attn.q_proj", q, c.hidden_size, c.qkv_bias)]
        linears += [(f"self_attn.{name}_proj", kv, c.hidden_size, c.qkv_bias) for name in ("k", "v")]
        linears += [("self_attn.o_proj", c.hidden_size, q, c.o_bias)]
        linears += [
            (f"mlp.{name}_proj", c.intermediate_size, c.hidden_size, c.mlp_bias) for name in ("gate", "up")
        ]
        linears += [("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias)]
        for name, rows, columns, bias in linears:
            full = f"{p}{name}.weight"
            shapes |= c.scheme.shapes(full, rows, columns) if c.scheme else {full: (rows, columns)}
            if bias:
                shapes[f"{p}{name}.bias"] = (rows,)
        if c.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = shapes[p + "self_attn.k_norm.weight"] = (c.head_dim,)
    if layers.stop == c.num_layers:
        shapes[NORM] = (c.hidden_size,)
        shapes[EMBED if c.tie_embeddings else HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


def stage_files(model_dir: Path, names: list[str]) -> dict[Path, list[str]]:
    """Which file holds which of the tensors."""
    if is_gguf(model_dir):
        return {model_dir: names}
    index = model_dir / INDEX
    if not index.exists():
        if not (model_dir / SINGLE).exists():
            raise ModelError(model_dir, None, f"has neither {SINGLE} nor {INDEX}")
        return {model_dir / SINGLE: names}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise ModelError(index, "weight_map", "expected an object")
    files: dict[Path, list[str]] = {}
    for name in names:
        file = where.get(name)
        if file is None:
            raise ModelError(index, name, "the tensor is missing")
        # A checkpoint must not make us open anything outside its directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(index, name, f"{file!r:.80} is not a safetensors file of this directory")
        files.setdefault(model_dir / file, []).append(name)
    return files


def kept_names(present: Iterable[str]) -> dict[str, str]:
    """The keys of a file by the names of the tensors: of what is kept in blocks, their type is behind the name."""
    names = {}
    for key in present:
        name, _, kind = key.rpartition(".")
        names[name if kind in BLOCKS_BY_NAME else key] = key
    return names


def load_weights(model_dir: Path, config: ModelConfig, layers: range) -> dict[str, torch.Tensor]:
    """The stage's tensors as stored (mapped, read-only by convention). Raises ModelError."""
    shapes = stage_shapes(config, layers)
    weights: dict[str, torch.Tensor] = {}
    for path, names in stage_files(model_dir, list(shapes)).items():
        found = _from_gguf(path, names) if is_gguf(path) else _from_safetensors(path, names)
        keys = kept_names(found)
        for name in names:
            _check(path, keys[name], found[keys[name]], shapes[name], config.scheme)
        weights |= found
    return weights


def _from_safetensors(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = kept_names(file.keys())
            for name in names:
                if name not in keys:
                    raise ModelError(path, name, "the tensor is missing")
                found[keys[name]] = file.get_tensor(keys[name])
    except (OSError, SafetensorError) as error:
        raise ModelError(path, None, f"cannot be read: {error}") from error
    return found


def _from_gguf(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    plain = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    data = torch.from_numpy(
        np.memmap(path, np.uint8, "c")
    )  # "c": torch wants memory that could be written to
    found = {}
    for key, tensor in place_of(path, names).items():
        raw = data[tensor.offset : tensor.offset + tensor.bytes]
        if kind := plain.get(tensor.block.name):
            found[key] = raw.clone().view(kind).view(tensor.shape)
        else:
            found[key] = raw.view(*tensor.shape[:-1], tensor.row_bytes)
    return found


def _check(path: Path, key: str, tensor: torch.Tensor, shape: tuple[int, ...], scheme: Scheme | None) -> None:
    """Type and shape of a tensor that stands for one of `shape`. Raises ModelError."""
    last = key.rpartition(".")[2]
    dtypes: tuple[str, ...] = (PACKED[last],) if last in PACKED else DTYPES
    block = BLOCKS_BY_NAME.get(last)
    if block and scheme and scheme.method == "gguf":
        dtypes = ("torch.uint8",)
        if shape[-1] % block.values:
            raise ModelError(path, key, f"{shape[-1]} inputs are no multiple of {block.values}")
        shape = (*shape[:-1], shape[-1] // block.values * block.bytes)
    elif scheme and scheme.bits == 8 and last == "weight" and "_proj" in key:
        dtypes = DTYPES if scheme.skips(key) else ("torch.int8",)
    if tuple(tensor.shape) != shape:
        raise ModelError(path, key, f"expected shape {shape}, found {tuple(tensor.shape)}")
    if str(tensor.dtype) not in dtypes:
        raise ModelError(path, key, f"{tensor.dtype} is not supported")


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """blake2b over names, types, shapes and bytes: equal exactly if two nodes serve the same stage weights."""
    import torch

    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
