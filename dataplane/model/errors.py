"""Errors whose cause is the checkpoint directory."""

from pathlib import Path


class ModelError(Exception):
    """The checkpoint cannot be served. Names the file and, where there is one, the key in it."""

    def __init__(self, path: Path, key: str | None, reason: str) -> None:
        self.path, self.key, self.reason = path, key, reason
        super().__init__(f"{path}: {key}: {reason}" if key else f"{path}: {reason}")
