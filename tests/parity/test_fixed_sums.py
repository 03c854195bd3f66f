"""A stage whose sums over shards are in fixed point: the same bits on every path, as the format says."""

import numpy as np
import pytest
import torch

from dataplane.executor import StageExecutor
from kernels.base import Linear
from kernels.cpu import _native, ops
from kernels.cpu.pack import pack
from kernels.memory import Arena
from kernels.ranks import cuts, sums
from tests.parity.chain import Chain
from tests.parity.conftest import Build
from tests.parity.test_equal_bits import TEXTS, in_batch, in_chunks, whole

LIMIT = 2.0**23  # KF_FIXED_LIMIT in kernels.h


def shard_sums(x: torch.Tensor, weight: torch.Tensor, ends: cuts.Ends) -> np.ndarray:
    """Each shard's product in float32, added as whole numbers by kernels/ranks. [rows, n]"""
    team = _native.Team(1)
    total = np.zeros(len(x) * len(weight), np.int64)
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        part = torch.empty(len(x), len(weight))
        packed = pack(Linear(weight[:, begin:end].contiguous()), Arena())
        ops.linear(team, x[:, begin:end].contiguous(), packed, part, ops.FLOAT)
        assert sums.add(total, part.numpy().ravel(), LIMIT / len(ends)) == 0
    return sums.to_float(total).reshape(len(x), len(weight))


@pytest.mark.parametrize("isa", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_sums_of_shards(dtype: torch.dtype, isa: int) -> None:
    generator = torch.Generator().manual_seed(3)
    ends = cuts.ffn_ends(680)
    assert len(ends) == 5
    weight = torch.randn(150, 680, generator=generator).to(dtype)
    try:
        if _native.set_isa(isa) != isa:
            pytest.skip("not on this processor")
        for rows in (1, 2, 3, 4, 5, 6, 11, 200):
            x = torch.randn(rows, 680, generator=generator).to(dtype)
            bias = torch.randn(150, generator=generator).to(dtype)
            want = torch.from_numpy(shard_sums(x, weight, ends))
            out = torch.empty(rows, 150, dtype=dtype)
            ops.linear(_native.Team(2), x, pack(Linear(weight, bias), Arena()), out, ops.STORE, ends)
            assert torch.equal(out, (want + bias.float()).to(dtype)), rows
            ops.linear(_native.Team(1), x, pack(Linear(weight), Arena()), out.zero_(), ops.ADD, ends)
            assert torch.equal(out, want.to(dtype)), rows
    finally:
        _native.set_isa(-1)


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_a_partial_sum_beyond_the_limit_is_no_number(isa: int) -> None:
    """Of that output only, also where others would bring the sum back."""
    ends = cuts.head_ends(4, 64)
    weight = torch.ones(80, 64)
    weight[7, 16:32] = -1.0
    x = torch.zeros(3, 64)
    x[1, 3], x[1, 20] = LIMIT / 4, LIMIT / 4  # 0 for output 7, were it allowed
    x[2, 3] = float(np.nextafter(np.float32(LIMIT / 4), np.float32(0)))
    out = torch.empty(3, 80)
    try:
        _native.set_isa(isa)
        ops.linear(_native.Team(1), x, pack(Linear(weight), Arena()), out, ops.STORE, ends)
    finally:
        _native.set_isa(-1)
    assert torch.isnan(out[1]).all()
    assert torch.equal(out[0], torch.zeros(80))
    assert torch.equal(out[2], x[2, 3].expand(80))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_shards", "gemma3"])
def test_any_chunk_and_batch(build: Build, name: str, dtype: str) -> None:
    chain = Chain(build(name), 1, dtype, sums="fixed")
    want = [whole(chain, text) for text in TEXTS]
    for sizes in ([1] * 70, [16, 17, 1, 36]):
        assert np.array_equal(in_chunks(chain, TEXTS[0], sizes), want[0]), sizes
    got = in_batch(chain, np.random.default_rng(0))
    assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))
    other = Chain(build(name), 3, dtype, block_size=24, threads=2, sums="fixed")
    assert np.array_equal(in_chunks(other, TEXTS[0], [33, 1, 36]), want[0])
    if dtype == "float32":  # bfloat16 mostly rounds to the same
        as_floats = whole(Chain(build(name), 1, dtype), TEXTS[0])
        assert not np.array_equal(as_floats, want[0])
        assert np.abs(as_floats - want[0]).max() < 1e-4 * np.abs(as_floats).max()


def test_any_instruction_set(build: Build) -> None:
    outs = []
    try:
        for isa in (0, 1, 2, 3):
            _native.set_isa(isa)
            outs.append(
                [
                    whole(Chain(build("llama_shards"), 1, d, sums="fixed"), TEXTS[0])
                    for d in ("float32", "bfloat16")
                ]
            )
    finally:
        _native.set_isa(-1)
    for other in outs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_cuts_depend_on_the_model_alone_and_are_even() -> None:
    for inputs in (40, 128, 680, 2048, 8192, 11008, 14336, 28672):
        ends = cuts.ffn_ends(inputs)
        widths = np.diff(ends, prepend=0)
        assert ends[-1] == inputs
        assert len(ends) == cuts.ffn_shards(inputs) <= sums.SHARDS_MAX
        assert (ends[:-1] % cuts.GRANULE == 0).all()
        assert widths.max() - widths.min() < 2 * cuts.GRANULE
    assert cuts.head_ends(3, 48).tolist() == [16, 32, 48]
    with pytest.raises(ValueError, match="alike"):
        cuts.head_ends(3, 50)


def test_what_has_no_fixed_sums(build: Build) -> None:
    with pytest.raises(ValueError, match="mixture of experts"):
        StageExecutor(build("mixtral"), 0, 1, num_blocks=4, sums="fixed")
    with pytest.raises(ValueError, match="quantised"):
        StageExecutor(build("llama"), 0, 1, num_blocks=4, dtype="bfloat16", weights="int8", sums="fixed")
    with pytest.raises(ValueError, match="fixed-point"):
        StageExecutor(build("llama"), 0, 1, num_blocks=4, device="cuda", sums="fixed")
    team, packed, out = _native.Team(1), pack(Linear(torch.ones(4, 8)), Arena()), torch.empty(1, 4)
    for ends in ([4], [4, 4, 8], [3, 8], []):
        with pytest.raises(ValueError, match="shards"):
            ops.linear(team, torch.ones(1, 8), packed, out, ops.STORE, np.array(ends, np.int64))
