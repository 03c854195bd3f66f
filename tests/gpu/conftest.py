"""Where the GPU kernels' tests run: on a GPU if there is one, else in Triton's interpreter, else not at all.

The interpreter runs the same kernels on CPU tensors with numpy: it shows that they compute the right thing and that
no row depends on its company; nothing about speed. That they compile is shown apart from it (test_compile.py)."""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the tests beside this file do


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed (pip install 'kevlarflow[gpu]')")
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A real GPU."""
    if device.type != "cuda":
        pytest.skip(
            "torch sees no CUDA device here; Triton's interpreter cannot stand in for one in this test"
        )
    return device


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> int:
    """Attention's splits, made short so that a small context has several of them: their length in keys."""
    monkeypatch.setattr("kernels.triton.attention.SPLIT_KEYS", 128)
    return 128
