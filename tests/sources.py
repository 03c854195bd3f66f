"""Which code a result is of: a digest of the sources that decided it; a result of other code counts no longer."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("controlplane", "dataplane", "kernels", "web", "tests")  # whose modules may decide a result


def loaded() -> set[Path]:
    """The files of the modules of ours that this process has imported."""
    files = {Path(file) for each in list(sys.modules.values()) if (file := getattr(each, "__file__", None))}
    return {file for file in files if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in OURS}


def sources(module: Path) -> list[Path]:
    """What a module is made from: itself, or what its extension was compiled from."""
    if module.suffix == ".py":
        return [module]
    folder = module.parent
    pyx = folder / f"{module.name.partition('.')[0]}.pyx"
    included = [path for suffix in ("h", "pxd", "c") for path in folder.glob(f"*.{suffix}")]
    return [pyx, *(path for path in included if path.suffix != ".c" or not path.with_suffix(".pyx").exists())]


def code_digest(modules: Iterable[Path]) -> str:
    """Of the sources of these modules."""
    digest = hashlib.sha256()
    for path in sorted({path for module in modules for path in sources(module)}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
