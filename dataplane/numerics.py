"""Numerics: what decides the bits of a node's KV and of the tokens that it draws, as one word.

Nodes with equal weights may stand in for each other; only nodes with equal numerics may exchange KV. A processor's
instruction set is not part of it: AVX2, AVX-512 and plain C have equal bits (tests/parity). A GPU's architecture is,
and so are the libraries whose arithmetic is used."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from importlib import metadata, util
from pathlib import Path

import msgspec
import numpy as np

from controlplane.grammar import library_version
from dataplane._fast import sampling
from dataplane.model.config import ModelConfig
from kernels.cpu import _native

ROOT = Path(__file__).parents[1]
# Beside the C sources, of which the extensions carry the digest that they were built with.
PYTHON = (
    "kernels/**/*.py",
    "dataplane/model/blocks.py",
    "dataplane/model/layers.py",
    "dataplane/model/mixtures.py",
    "dataplane/model/quantised.py",
    "dataplane/model/ropes.py",
    "dataplane/model/rotary.py",
    "dataplane/model/sampler.py",
)
DIGEST_BYTES = 6
COMPILERS = ("torch", "triton")
XFORMERS = (
    "xformers",
    "flash_attn",
    "flash_attn_3",
)  # where one of the others is installed, it attends for xFormers
NOT_NUMERIC = ("dtype", "float16", "eos_token_ids")  # of a configuration


@cache
def kernel_sources() -> str:
    """Digest of the kernels and the sampler. Computed once a process and inherited by forks: call it while the files
    are the ones that were imported."""
    digest = hashlib.blake2b(f"{_native.SOURCES} {sampling.SOURCES}".encode(), digest_size=DIGEST_BYTES)
    for path in sorted(path for pattern in PYTHON for path in ROOT.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def numerics_of(
    config: ModelConfig,
    layers: range,
    *,
    dtype: str,
    device: str,
    attention: str,
    block_size: int,
    weights: str = "model",
    sums: str = "float",
    sources: str | None = None,
    libraries: Iterable[str] | None = None,
) -> str:
    """ "<dtype>-<device>-<digest>". Equal for nodes whose KV and activations have the same bits in the same layout.

    device: "cpu", or "cuda" with what makes its kernels' numbers its own (see `device_kind`)."""
    model = {key: value for key, value in asdict(config).items() if key not in NOT_NUMERIC}
    parts = {
        "model": repr(sorted(model.items())),
        "layers": f"{layers.start}:{layers.stop}",
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "block_size": block_size,
        "weights": weights,
        "sums": sums,
        "sources": kernel_sources() if sources is None else sources,
        "libraries": sorted(_libraries(device, attention) if libraries is None else libraries),
    }
    encoded = msgspec.json.encode(parts, order="deterministic")
    digest = hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()
    return f"{dtype}-{device.partition(' ')[0]}-{digest}"


def device_kind(device: str) -> str:
    """A GPU with its architecture: its kernels are compiled for it, and sum as it does. Raises CannotCompute if
    there is none."""
    if device == "cpu":
        return device
    import torch  # not above: only nodes with a GPU need it here

    from kernels.base import CannotCompute

    if not torch.cuda.is_available():
        raise CannotCompute(f"device {device!r} cannot be used: torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def _libraries(device: str, attention: str) -> list[str]:
    """Those whose results are: sines and cosines, what a grammar allows, on a GPU the compilers of its kernels, and
    whose attention it is if it is not ours."""
    used = [f"numpy {np.__version__}", f"llguidance {library_version()}"]
    if device == "cpu":
        return used
    import torch  # not above: as in device_kind

    modules = [*COMPILERS, *(XFORMERS if attention == "xformers" else ())]
    return [
        *used,
        f"cuda {torch.version.cuda}",
        *(_version(name) for name in modules if util.find_spec(name)),
    ]


def _version(module: str) -> str:
    """Of one that can be imported, which need not be here under a distribution of its name."""
    try:
        return f"{module} {metadata.version(module)}"
    except metadata.PackageNotFoundError:
        return f"{module} {getattr(importlib.import_module(module), '__version__', '')}"
