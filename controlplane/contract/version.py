"""What a process is made of: the version of its code and the digest of its settings, for records and status."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec

from controlplane.contract.config import ClusterConfig

PACKAGES = ("controlplane", "dataplane", "kernels", "web", "migrations")
SOURCES = frozenset({".py", ".pyx", ".pxd", ".c", ".h"})
# They say where a process runs and where its files are, not what it does: hosts of one cluster differ in them.
WHERE = frozenset(
    {
        "run_dir",
        "host",
        "advertise",
        "controller_ports",
        "node_ports",
        "link_ports",
        "tls",
        "labels",
        "insecure",
    }
)
DIGEST_BYTES = 6


@cache
def code_version() -> str:
    """ "<package version>+<digest of the installed sources and extensions>".

    Computed once a process and inherited by forks, so call it while the files are the ones that were imported:
    a launcher does before its first fork.
    """
    return f"{_package_version()}+{tree_digest(Path(__file__).parents[2])}"


def tree_digest(root: Path) -> str:
    """Digest of our packages under `root`: names and contents of their sources.

    An extension is counted by its sources, so that two hosts that built the same ones are equal; by its binary
    where they are not installed.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for package in PACKAGES:
        paths = sorted((root / package).rglob("*"))
        extensions = {path.with_suffix("") for path in paths if path.suffix == ".pyx"}
        for path in paths:
            compiled = (
                path.suffix in (".c", ".so") and path.with_name(path.name.partition(".")[0]) in extensions
            )
            if compiled or path.suffix not in SOURCES | {".so"} or not path.is_file():
                continue
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def settings_digest(config: ClusterConfig) -> str:
    """Equal for equal settings, whatever file, order or notation they were read from."""
    settings = {key: value for key, value in msgspec.to_builtins(config).items() if key not in WHERE}
    encoded = msgspec.json.encode(settings, order="deterministic")
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()


def _package_version() -> str:
    try:
        return metadata.version("kevlarflow")
    except metadata.PackageNotFoundError:  # run from a tree that was never installed
        return "0"
