"""Which checkpoint a node's weights are of: one digest for all its stages, equal wherever its files are and however
they are cut.

Of the tensors' bytes samples are taken, since to hash a whole model takes minutes where a stage takes seconds: it tells
one model from another, and their digest (weights.py) tells whether a stage's weights are as they should be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from controlplane.gguf.header import is_gguf
from dataplane.model.bundle import Piece, tensors_of
from dataplane.model.config import ModelConfig, load_config
from dataplane.model.digests import digest_once, identities
from dataplane.model.errors import ModelError
from dataplane.model.weights import stage_files, stage_shapes

# Nodes of several versions of the code compare what they register: another way to compute it would lock those out that
# are upgraded first. What a later version adds to `ModelConfig` counts where it is not the default.
DIGEST_BYTES = 16
SAMPLE_BYTES = 4096
SAMPLES = 3  # of a tensor: at its begin, middle and end
SAMPLED_MAX = 8192  # tensors; where there are more, as in large mixtures, each is sampled in its middle alone
# How long an answer may be and where it ends may differ from host to host; the precision is the tensors'.
NOT_MEANT = frozenset({"max_positions", "eos_token_ids", "dtype", "float16"})


def checkpoint_of(model_dir: Path, kept: Path | None) -> str:
    """The digest; from the file `kept` if it was computed earlier (see digests.py). "" for a checkpoint of which only
    some files, or some tensors, are here, and for one that cannot be read: whoever loads a stage of it says why."""
    try:
        config = load_config(model_dir)
        files = [*stage_files(model_dir, list(stage_shapes(config, range(config.num_layers))))]
        if not is_gguf(model_dir):
            files.append(model_dir / "config.json")
        return digest_once(lambda: _digest(config, tensors_of(model_dir, 0, 1)), (), identities(files), kept)
    except (ModelError, OSError):
        return ""


def _digest(config: ModelConfig, tensors: Sequence[Piece]) -> str:
    """`tensors`: a table of their names, types and shapes, then their bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    table, *pieces = tensors
    for part in (msgspec.json.encode(_meaning(config), order="deterministic"), table.text):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    for piece in pieces:
        for sample in _samples(piece, 1 if len(pieces) > SAMPLED_MAX else SAMPLES):
            digest.update(sample)
    return digest.hexdigest()


def _samples(piece: Piece, count: int) -> Iterator[bytes]:
    if piece.length <= SAMPLE_BYTES * count:
        yield piece.read(0, piece.length)
        return
    last = piece.length - SAMPLE_BYTES
    for at in (last // 2,) if count == 1 else (last * number // (count - 1) for number in range(count)):
        yield piece.read(at, SAMPLE_BYTES)


def _meaning(value: Any) -> Any:
    """Of a config.json, whatever form it has: what is not as it is by default."""
    if not is_dataclass(value):
        return value
    named = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
    return {
        name: _meaning(one)
        for name, (one, default) in named.items()
        if name not in NOT_MEANT and one != default
    }
