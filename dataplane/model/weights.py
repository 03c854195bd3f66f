"""Weights of one stage from safetensors files: only its own tensors are mapped, nothing is unpickled.

torch is imported by what loads tensors, not by what only names them: a node of the oracle executor has none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from controlplane.gguf.header import BLOCKS, is_gguf
from dataplane.model.config import ModelConfig
from dataplane.model.errors import ModelError
from dataplane.model.fields import read_json
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
TEXT_PREFIX = "language_model."  # of Gemma 3 with images
LINEAR = re.compile(r"_proj\.weight$|\.experts\.\d+\.w[123]\.weight$")
BLOCKS_BY_NAME = {block.name: block for block in BLOCKS.values() if block.name not in PLAIN}


def stage_shapes(config: ModelConfig, layers: range) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the stage that runs `layers`."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {}
    if layers.start == 0:
        shapes[EMBED] = (c.vocab_size, c.hidden_size)
    for i in layers:
        p = f"model.layers.{i}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if c.norms_around:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{p}{name}.weight": (c.hidden_size,) for name in norms}
        for name, rows, columns, bias in (*_attention(c), *_mlp(c, i)):
            full = f"{p}{name}.weight"
            shapes |= c.scheme.shapes(full, rows, columns) if c.scheme else {full: (rows, columns)}
            if bias:
                shapes[f"{p}{name}.bias"] = (rows,)
        if c.experts and i in c.experts.layers:
            shapes[f"{p}{c.experts.router}.weight"] = (c.experts.count, c.hidden_size)
        if c.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = shapes[p + "self_attn.k_norm.weight"] = (c.head_dim,)
    if layers.stop == c.num_layers:
        shapes[NORM] = (c.hidden_size,)
        shapes[EMBED if c.tie_embeddings else HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


Linears = list[tuple[str, int, int, bool]]  # name, outputs, inputs, whether there is a bias


def _attention(c: ModelConfig) -> Linears:
    q, kv, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    out = ("self_attn.o_proj", hidden, q, c.o_bias)
    if c.fused:
        return [("self_attn.qkv_proj", q + 2 * kv, hidden, c.qkv_bias), out]
    sizes = (("q", q), ("k", kv), ("v", kv))
    return [*((f"self_attn.{name}_proj", rows, hidden, c.qkv_bias) for name, rows in sizes), out]


def _mlp(c: ModelConfig, layer: int) -> Linears:
    hidden, wide = c.hidden_size, c.intermediate_size
    if c.experts and layer in c.experts.layers:
        wide = c.experts.intermediate
        linears: Linears = []
        for gate, up, down in map(c.experts.names, range(c.experts.count)):
            linears += [(gate, wide, hidden, False), (up, wide, hidden, False), (down, hidden, wide, False)]
        return linears
    down_proj = ("mlp.down_proj", hidden, wide, c.mlp_bias)
    if c.fused:
        return [("mlp.gate_up_proj", 2 * wide, hidden, c.mlp_bias), down_proj]
    return [*((f"mlp.{name}_proj", wide, hidden, c.mlp_bias) for name in ("gate", "up")), down_proj]


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
        file = where.get(name, where.get(TEXT_PREFIX + name))
        if file is None:
            raise ModelError(index, name, "the tensor is missing")
        # A checkpoint must not make us open anything outside its directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(index, name, f"{file!r:.80} is not a safetensors file of this directory")
        files.setdefault(model_dir / file, []).append(name)
    return files


def kept_names(present: Iterable[str]) -> dict[str, str]:
    """The keys of a file by the names of the tensors: of what is kept in blocks, their type is behind the name;
    what belongs to the text of a model for images says so before it."""
    names = {}
    for key in present:
        own = key.removeprefix(TEXT_PREFIX)
        name, _, kind = own.rpartition(".")
        names[name if kind in BLOCKS_BY_NAME else own] = key
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
                found[keys[name].removeprefix(TEXT_PREFIX)] = file.get_tensor(keys[name])
    except (OSError, SafetensorError) as error:
        raise ModelError(path, None, f"cannot be read: {error}") from error
    return found


def _from_gguf(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    plain = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    # "c": torch wants memory that could be written to.
    data = torch.from_numpy(np.memmap(path, np.uint8, "c"))
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
    elif scheme and scheme.bits == 8 and last == "weight" and LINEAR.search(key):
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
