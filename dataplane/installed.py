"""Whether what is installed on this host is still what this process runs: its code, and its settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.version import PACKAGES, SOURCES, code_version, settings_digest, tree_digest

Stamps = tuple[tuple[str, int, int, int], ...]


class Installed:
    """Files are read again only if their times, sizes or inodes have changed: to look takes some milliseconds."""

    def __init__(self, config_path: Path, config: ClusterConfig) -> None:
        self._config_path = config_path
        self._root = Path(__file__).parents[1]
        self._runs = (code_version().partition("+")[2], settings_digest(config))
        self._stamps = self._look()

    def changed(self) -> str:
        """What a fresh process would run instead, in words; "" if nothing else. Raises ConfigError for settings that
        cannot be read: the ones that this process has are then the best there are."""
        stamps = self._look()
        if stamps == self._stamps:
            return ""
        code, settings = tree_digest(self._root), settings_digest(load_config(self._config_path))
        self._stamps = stamps
        found = [
            f"{what} {new} in place of {old}"
            for what, new, old in zip(("code", "settings"), (code, settings), self._runs, strict=True)
            if new != old
        ]
        return " and ".join(found)

    def _look(self) -> Stamps:
        paths = [str(self._config_path)]
        for package in PACKAGES:
            paths += _sources(str(self._root / package))
        return tuple(stamp for path in sorted(paths) if (stamp := _stamp(path)) is not None)


def _sources(folder: str) -> Iterator[str]:
    suffixes = (*SOURCES, ".so")
    for parent, folders, files in os.walk(folder):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
        yield from (os.path.join(parent, file) for file in files if file.endswith(suffixes))


def _stamp(path: str) -> tuple[str, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:  # it is being replaced
        return None
    return path, found.st_mtime_ns, found.st_size, found.st_ino
