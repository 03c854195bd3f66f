"""What can be said of a model before anything starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from controlplane.contract.errors import ConfigError
from controlplane.gguf.files import config_of
from controlplane.gguf.header import GgufError, is_gguf, read_header


def absolute(model: str) -> Path:
    """Raises ConfigError for the home of a user that there is not."""
    try:
        return Path(model).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{model}: {error}") from error


def check_model(model: Path, stages: int | None) -> None:
    """Raises ConfigError: it is none, or has fewer layers than there are `stages` (None: these need none)."""
    path = model / "config.json"
    if not is_gguf(model) and not os.path.isfile(path):  # False where it may not be looked at
        raise ConfigError(
            f"{model} is not a Hugging Face checkpoint (it has no config.json), nor a GGUF file"
        )
    try:
        values: Any = (
            config_of(model, read_header(model)) if is_gguf(model) else json.loads(path.read_bytes())
        )
    except (GgufError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{model}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold an object")
    section = values.get("text_config")
    layers = (section if isinstance(section, dict) else values).get("num_hidden_layers")
    if stages is not None and isinstance(layers, int) and stages > layers:
        raise ConfigError(
            f"stages = {stages} and num_hidden_layers = {layers} of {model}: each stage has a layer at least"
        )
