"""The dashboard's files, read once at start: a request can never name another file."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from importlib.resources.abc import Traversable

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    body: bytes
    media_type: str


def load_files() -> dict[str, StaticFile]:
    """Every file of `web/ui` that a browser may ask for, by its path below it ("vendor/htm.js")."""
    files: dict[str, StaticFile] = {}
    _collect(importlib.resources.files("web").joinpath("ui"), "", files)
    return files


def _collect(folder: Traversable, prefix: str, files: dict[str, StaticFile]) -> None:
    for entry in folder.iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if entry.is_dir():
            _collect(entry, f"{prefix}{entry.name}/", files)
        elif suffix in TYPES:
            files[prefix + entry.name] = StaticFile(entry.read_bytes(), TYPES[suffix])
