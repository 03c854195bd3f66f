"""What a node of one stage needs of a checkpoint, as a few files that can be read in pieces.

The stage's tensors become one safetensors file that exists only as a list of pieces: a header of its own, then ranges
of the checkpoint's files. Equal tensors give equal bytes, whatever files they come from. Nothing is loaded: a piece is
read when it is asked for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.gguf.files import small_files
from controlplane.gguf.header import GgufError, is_gguf
from dataplane.model.config import load_config
from dataplane.model.errors import ModelError
from dataplane.model.gguf import place_of
from dataplane.model.split import split_layers
from dataplane.model.weights import SINGLE, kept_names, stage_files, stage_shapes

# Besides the tensors: small, copied whole.
SMALL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
SMALL_BYTES_MAX = 64 << 20
HEADER_BYTES_MAX = 100 << 20  # what the safetensors library takes
ALIGN = 8
SAFETENSORS_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}  # blocks are bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes of a file from `offset` on, or the bytes of `text` themselves."""

    length: int
    path: Path | None = None
    offset: int = 0
    text: bytes = b""

    def read(self, start: int, length: int) -> bytes:
        if self.path is None:
            return self.text[start : start + length]
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            data = file.read(length)
        if len(data) < length:
            raise ModelError(self.path, None, "is shorter than its header says")
        return data


@dataclass(frozen=True, slots=True)
class Bundle:
    """File name -> its pieces."""

    files: Mapping[str, tuple[Piece, ...]]

    def size(self, name: str) -> int:
        return sum(piece.length for piece in self.files[name])

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of a file, fewer at its end. Raises KeyError, ModelError, OSError."""
        parts = []
        for piece in self.files[name]:
            if offset < piece.length and length > 0:
                part = piece.read(offset, min(length, piece.length - offset))
                parts.append(part)
                length -= len(part)
            offset = max(0, offset - piece.length)
        return b"".join(parts)


def holds_stage(model_dir: Path, stage: int, num_stages: int) -> bool:
    """Whether the directory has the files that the stage's tensors should be in. What is in them is not looked at."""
    if is_gguf(model_dir):
        return True
    if not (model_dir / "config.json").is_file():
        return False
    try:
        return all(path.is_file() for path in _where(model_dir, stage, num_stages))
    except ModelError as error:
        if error.path == model_dir:  # neither a single file nor an index
            return False
        raise


def open_bundle(model_dir: Path, stage: int, num_stages: int) -> Bundle:
    """The bundle of one stage. Raises ModelError for a checkpoint that cannot be served."""
    small = {name: (Piece(len(text), text=text),) for name, text in _small(model_dir).items()}
    return Bundle({**small, SINGLE: tensors_of(model_dir, stage, num_stages)})


def tensors_of(model_dir: Path, stage: int, num_stages: int) -> tuple[Piece, ...]:
    """A table of the stage's tensors, then each of them, by name. Raises ModelError."""
    return _tensors(_where(model_dir, stage, num_stages))


def _small(model_dir: Path) -> Mapping[str, bytes]:
    if is_gguf(model_dir):
        try:
            return small_files(model_dir)
        except GgufError as error:
            raise ModelError(model_dir, None, str(error)) from error
    found = {}
    for name in SMALL:
        path = model_dir / name
        if path.is_file():
            if path.stat().st_size > SMALL_BYTES_MAX:
                raise ModelError(path, None, f"is larger than {SMALL_BYTES_MAX} bytes")
            found[name] = path.read_bytes()
    return found


def _where(model_dir: Path, stage: int, num_stages: int) -> dict[Path, list[str]]:
    config = load_config(model_dir)
    layers = split_layers(config.num_layers, num_stages)[stage]
    return stage_files(model_dir, list(stage_shapes(config, layers)))


def _tensors(where: Mapping[Path, list[str]]) -> tuple[Piece, ...]:
    """One safetensors file of all the tensors, in the order of their names."""
    found: dict[str, tuple[dict[str, Any], Piece]] = {}
    for path, names in where.items():
        if is_gguf(path):
            found |= _of_gguf(path, names)
            continue
        header, start = _header(path)
        keys = kept_names(header)
        for name in names:
            if name not in keys:
                raise ModelError(path, name, "the tensor is missing")
            entry = header[keys[name]]
            try:
                begin, end = entry["data_offsets"]
                found[keys[name]] = (entry, Piece(end - begin, path, start + begin))
            except (TypeError, KeyError, ValueError) as error:
                raise ModelError(path, name, "the table of tensors does not say where it is") from error
    entries, at = {}, 0
    for name in sorted(found):
        entry, piece = found[name]
        entries[name] = {**entry, "data_offsets": [at, at + piece.length]}
        at += piece.length
    text = json.dumps(entries, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % ALIGN)
    head = struct.pack("<Q", len(text)) + text
    return (Piece(len(head), text=head), *(found[name][1] for name in sorted(found)))


def _of_gguf(path: Path, names: list[str]) -> dict[str, tuple[dict[str, Any], Piece]]:
    found = {}
    for key, tensor in place_of(path, names).items():
        plain = SAFETENSORS_DTYPES.get(tensor.block.name)
        shape = list(tensor.shape) if plain else [*tensor.shape[:-1], tensor.row_bytes]
        found[key] = ({"dtype": plain or "U8", "shape": shape}, Piece(tensor.bytes, path, tensor.offset))
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors, and where their bytes begin."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_BYTES_MAX:
                raise ModelError(path, None, f"has a header of {length} bytes")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise ModelError(path, None, f"cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(path, None, "has no table of tensors")
    return header, 8 + length
