"""What is optional stays so: everything else imports, silently, without triton, xFormers or a GPU."""

import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple, cast

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.base import StageSpec
from kernels.dispatch import CacheShape, build_cuda_stage
from kernels.xformers import PagedAttention, XformersMissing, why_not

IMPORT = """
import sys
sys.modules["triton"] = sys.modules["xformers"] = None  # importing them raises ImportError
import kernels, kernels.xformers, kernels.reference, dataplane.executor, dataplane.main
"""


def test_everything_imports_without_them_and_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_xformers_says_why_it_cannot_be_used() -> None:
    assert why_not(torch.device("cpu")) == "xFormers has no operator for cpu"
    with pytest.raises(XformersMissing, match="no operator for cpu"):
        PagedAttention(torch.zeros(1, 2, 4, 16, 2, 32))


class Mask(NamedTuple):
    """What of xFormers' masks is looked at."""

    queries: list[int]
    padding: int

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, device):
        assert kv_seqlen == q_seqlen
        assert max(kv_seqlen) <= kv_padding
        return cls(q_seqlen, kv_padding)

    def make_paged(self, tables, block_size, _kind):
        assert tables.shape == (len(self.queries), self.padding // block_size)
        return self

    @property
    def q_seqinfo(self):
        return SimpleNamespace(max_seqlen=max(self.queries))


def test_xformers_is_warmed_up_for_steps_of_all_kinds(monkeypatch) -> None:
    """Also chunks of prompts, whose operator is another one; only decode steps have to have one."""
    ran: list[tuple[int, int, int]] = []
    without = 0

    def attend(query, keys, values, mask, p, scale):
        ran.append((len(mask.queries), mask.queries[0], mask.padding))
        if mask.queries[0] == without:
            raise NotImplementedError("no operator")
        return query

    names = {
        "xformers.ops.fmha": SimpleNamespace(memory_efficient_attention_forward=attend),
        "xformers.ops.fmha.attn_bias": SimpleNamespace(
            BlockDiagonalCausalWithOffsetPaddedKeysMask=Mask,
            PagedBlockDiagonalCausalWithOffsetPaddedKeysMask=None,
        ),
    }
    monkeypatch.setattr("kernels.xformers.why_not", lambda device: None)
    monkeypatch.setattr("kernels.xformers.importlib", SimpleNamespace(import_module=names.get))

    def warm_up() -> None:
        PagedAttention(torch.zeros(1, 2, 4, 64, 2, 32)).warm_up(4, 0.125, [1, 2], [1, 4], 70)

    warm_up()
    assert ran == [(1, 1, 64), (1, 1, 256), (2, 1, 64), (2, 1, 256), (1, 70, 128)]
    without = 70
    warm_up()
    without = 1
    with pytest.raises(XformersMissing, match="no operator for decode steps"):
        warm_up()


def test_a_device_that_cannot_be_used_says_why() -> None:
    shape = CacheShape(2, 2, 16, 32, "float32")
    spec = cast(StageSpec, None)  # nobody looks at it any more
    with pytest.raises(ValueError, match="no kernels for device 'mps'"):
        build_cuda_stage(spec, shape, "mps", rows_max=16)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            build_cuda_stage(spec, shape, "cuda", rows_max=16)


def test_a_device_that_is_not_there_says_how_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="'cuda:2' cannot be used: torch sees 2 CUDA devices"):
        build_cuda_stage(cast(StageSpec, None), CacheShape(2, 2, 16, 32, "float32"), "cuda:2", rows_max=16)


@pytest.mark.parametrize(
    "work", [[(0, 99, 1), (1, 63, 1)], [(0, 0, 40), (1, 60, 1)]], ids=["decode", "mixed"]
)
def test_xformers_attention(gpu, work) -> None:
    """Where one of its operators takes the step; with the tolerance of bfloat16, for it keeps no bits."""
    from tests.gpu.steps import Rows, close, make_cache, random

    reason = why_not(gpu)
    if reason is not None:
        pytest.skip(reason)
    cache = make_cache(gpu, "bfloat16", head_dim=64, block_size=64, blocks=8)
    step = Rows([100, 64], cache).step(*work)
    tokens = int(step.cu_q[-1])
    q = random(tokens, 4 * 64, dtype="bfloat16", device=gpu)
    attention = PagedAttention(cache.planes)
    mask = attention.mask(step, torch.from_numpy(np.ascontiguousarray(step.tables)).to(gpu))
    got, want = torch.empty_like(q), torch.empty(tokens, 4, 64, dtype=q.dtype, device=gpu)
    if not attention.attend(1, q, mask, 0.125, got):
        pytest.skip("xFormers has no operator for this step here")
    reference.attend(q.view(want.shape), *cache.layer(1), step, 0.125, None, want)
    close(got.view(want.shape), want, "bfloat16")
