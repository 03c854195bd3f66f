"""What is in a node's numerics, and stages of different precision behind one another."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from controlplane.contract.config import ClusterConfig, EngineConfig
from controlplane.contract.errors import ConfigError
from dataplane import numerics
from dataplane._fast import sampling
from dataplane.accelerators import Place
from dataplane.executor import StageExecutor
from dataplane.loading import load_executor
from dataplane.numerics import device_kind, kernel_sources, numerics_of
from kernels.cpu import _native
from tests.parity.chain import Chain
from tests.parity.conftest import Build

ROOT = Path(__file__).parents[2]
TEXT = [5, 99, 3, 42, 7, 150, 21, 8, 77, 13, 60, 2]


def executor(path: Path, **more: Any) -> StageExecutor:
    return StageExecutor(path, 0, 2, **{"num_blocks": 8, "block_size": 16, **more})


def test_equal_nodes_have_equal_numerics(build: Build) -> None:
    """Whatever processor, threads, pool or directory; the word says what is different at a glance."""
    one = executor(build("llama"))
    assert re.fullmatch(r"float32-cpu-[0-9a-f]{12}", one.numerics)
    for isa in (0, 1, 3):
        try:
            _native.set_isa(isa)
            assert executor(build("llama"), num_blocks=16, threads=2).numerics == one.numerics
        finally:
            _native.set_isa(-1)


def test_what_changes_bits_or_layout_changes_numerics(build: Build) -> None:
    one = executor(build("llama"))
    others = [
        executor(build("llama"), dtype="bfloat16"),
        executor(build("llama"), block_size=32),
        executor(build("llama3_rope")),
        StageExecutor(build("llama"), 1, 2, num_blocks=8, block_size=16),
    ]
    assert len({one.numerics, *(other.numerics for other in others)}) == 5
    config = one.config
    given: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "attention": "exact", "block_size": 16,
        "sources": "a", "libraries": ["numpy 1"],
    }  # fmt: skip
    base = numerics_of(config, one.layers, **given)
    assert base == numerics_of(replace(config, eos_token_ids=(1,), dtype="bfloat16"), one.layers, **given)
    changed = [
        numerics_of(config, one.layers, **{**given, key: value})
        for key, value in (
            ("device", "cuda 9.0"), ("device", "cuda 8.0"), ("attention", "xformers"),
            ("weights", "int8"), ("sums", "fixed"),
            ("sources", "b"), ("libraries", ["numpy 2"]),
        )
    ] + [
        numerics_of(replace(config, rope=replace(config.rope, theta=5.0)), one.layers, **given),
        numerics_of(replace(config, rms_norm_eps=1e-5), one.layers, **given),
        numerics_of(replace(config, windows=(3,) * config.num_layers), one.layers, **given),
    ]  # fmt: skip
    assert len({base, *changed}) == 1 + len(changed)
    assert device_kind("cpu") == "cpu"


def test_of_a_gpu_the_libraries_count_that_compute_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where xFormers attends, its numbers and those of the FlashAttention that it finds are a node's own."""
    versions = {"torch": "2.13.0", "triton": "3.9.0", "xformers": "0.0.35", "flash_attn": "2.8.0"}

    def version(name: str) -> str:
        if name == "triton":
            raise numerics.metadata.PackageNotFoundError(name)  # a build under another distribution's name
        return versions[name]

    monkeypatch.setattr(numerics.util, "find_spec", lambda name: name in versions or None)
    monkeypatch.setattr(numerics.metadata, "version", version)
    monkeypatch.setattr(
        numerics.importlib, "import_module", lambda name: SimpleNamespace(__version__="3.9.1")
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def used(device: str, attention: str) -> list[str]:
        return [one for one in numerics._libraries(device, attention) if not one.startswith(("numpy", "llg"))]

    ours = ["cuda 13.0", "torch 2.13.0", "triton 3.9.1"]
    assert used("cpu", "exact") == []
    assert used("cuda 9.0", "exact") == ours, "what is only installed decides nothing"
    assert used("cuda 9.0", "xformers") == [*ours, "xformers 0.0.35", "flash_attn 2.8.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_so(build: Build) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        executor(build("llama"), device="cuda")
    config = ClusterConfig("run", str(build("llama")), (), stages=2, engine=EngineConfig(device="cuda"))
    with pytest.raises(
        ConfigError, match=r"stage 1 cannot be computed on cuda:3: .* torch sees no CUDA device"
    ):
        load_executor(config, 1, Place("cuda:3"))


def test_a_change_of_kernels_changes_them_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The extensions carry the digest that setup.py makes of their sources; Python's are read."""
    before = kernel_sources()
    monkeypatch.setattr(_native, "SOURCES", "0123456789abcdef")
    assert kernel_sources.__wrapped__() != before
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "SOURCES", "0123456789abcdef")
    assert kernel_sources.__wrapped__() != before
    monkeypatch.undo()
    assert kernel_sources.__wrapped__() == before
    for pattern in numerics.PYTHON:
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(numerics, "ROOT", tmp_path)
    assert kernel_sources.__wrapped__() == before
    with (tmp_path / "kernels" / "triton" / "linear.py").open("a") as file:
        file.write("# changed\n")
    assert kernel_sources.__wrapped__() != before


def test_the_extensions_were_built_from_these_sources() -> None:
    """Fails after an edit until `make install`: a node must not register what it does not run."""
    code = (
        "import setuptools, Cython.Build as b, json;"
        "setuptools.setup = lambda **more: None; b.cythonize = lambda extensions, **more:"
        " print(json.dumps({e.name: dict(e.define_macros) for e in extensions}));"
        "exec(open('setup.py').read())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    made = __import__("json").loads(out.stdout)
    assert made["kernels.cpu._native"]["KF_SOURCES"].strip('"') == _native.SOURCES
    assert made["dataplane._fast.sampling"]["KF_SOURCES"].strip('"') == sampling.SOURCES
    assert _native.SOURCES != sampling.SOURCES


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_stages_of_two_precisions_behind_one_another(build: Build, first: Any) -> None:
    """A roll that changes the precision makes such a pipeline for a while: its logits are near those of either."""
    second = "bfloat16" if first == "float32" else "float32"
    mixed, pure = Chain(build("llama"), 2, first), Chain(build("llama"), 2, "float32")
    other = Chain(build("llama"), 2, second)
    mixed.stages[1], mixed.tables[1], mixed.free[1] = other.stages[1], other.tables[1], other.free[1]
    forward, sizes = mixed.stages[1].forward, []

    def adopting(tokens: Any, hidden: Any, step: Any, rows: Any) -> Any:
        sizes.append(memoryview(hidden).nbytes)
        return forward(tokens, mixed.stages[1].adopt(hidden, step.num_tokens), step, rows)

    mixed.stages[1].forward = adopting  # type: ignore[method-assign]
    got, want = mixed.step([(mixed.new(), TEXT)])[0], pure.step([(pure.new(), TEXT)])[0]
    assert sizes == [len(TEXT) * 48 * (4 if first == "float32" else 2)]
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999
