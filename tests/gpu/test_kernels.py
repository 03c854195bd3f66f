"""Each Triton kernel against its plain torch reference; and its rows have the same bits in any company."""

import numpy as np
import pytest
import torch

from kernels import reference

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

from kernels.cuda.step import query_tiles, slabs
from kernels.triton.attention import attention
from kernels.triton.linear import linear
from kernels.triton.rope import rope_write
from kernels.triton.rows import add_rms_norm, gated_mul
from tests.gpu.steps import Rows, close, make_cache, on_device, random

DTYPES = ("float32", "bfloat16")
SHAPES = [  # kv_heads, group, head_dim, block_size, window
    (2, 2, 32, 16, None),
    (1, 7, 24, 16, 20),
    (2, 1, 40, 8, None),
    (1, 12, 16, 4, 33),
    (2, 4, 80, 16, 1),
    (1, 2, 144, 48, 16),
]


def attend(cache, step, q, window, room=1 << 20):
    heads = q.shape[1] // cache.head_dim
    there = on_device(step, cache, heads, room)
    out = torch.full_like(q, torch.nan)
    attention(
        q, *cache.layer(1), there.positions, there.tables, there.tiles, there.slabs, there.partials,
        there.splits, 0.3, window, out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim", "block_size", "window"), SHAPES)
def test_attention(device, dtype, kv_heads, group, head_dim, block_size, window) -> None:
    cache = make_cache(
        device, dtype, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, blocks=700 // block_size
    )
    step = Rows([5, 100, 33, 1], cache).step((0, 0, 5), (1, 99, 1), (2, 13, 20), (3, 0, 1))
    q = random(27, kv_heads * group * head_dim, dtype=dtype, device=device)
    want = torch.empty(27, kv_heads * group, head_dim, dtype=q.dtype, device=device)
    reference.attend(q.view(want.shape), *cache.layer(1), step, 0.3, window, want)
    close(attend(cache, step, q, window).view(want.shape), want, dtype)


@pytest.mark.timeout(600)  # the interpreter takes its time on a busy machine
@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("bfloat16", 140)])
def test_attention_has_equal_bits_across_splits(device, short_splits, dtype, window) -> None:
    """A context over three splits: as one prefill, as chunks, as decode steps, and in a batch."""
    split, length = short_splits, 2 * short_splits + 40
    cache = make_cache(device, dtype, blocks=50, kv_heads=1)
    rows = Rows([length, length], cache)
    q = random(length, 2 * cache.head_dim, dtype=dtype, device=device)
    step = rows.step((0, 0, length))
    whole = attend(cache, step, q, window)
    want = torch.empty(length, 2, cache.head_dim, dtype=q.dtype, device=device)
    reference.attend(q.view(want.shape), *cache.layer(1), step, 0.3, window, want)
    close(whole.view(want.shape), want, dtype)

    for begin, end in [(0, 30), (30, split + 1), (split + 1, length)]:
        got = attend(cache, rows.step((0, begin, end - begin)), q[begin:end].contiguous(), window)
        assert torch.equal(got, whole[begin:end])
    for position in (0, 63, 64, split - 1, split, 2 * split, length - 1):
        alone = attend(cache, rows.step((0, position, 1)), q[position : position + 1].contiguous(), window)
        assert torch.equal(alone[0], whole[position])
    mixed = rows.step((1, 90, 37), (0, 201, 1), (1, 0, 5))
    company = torch.cat([q[:37], q[201:202], q[:5]])
    assert torch.equal(attend(cache, mixed, company, window)[37], whole[201])
    # Little room for partial results: the step takes several turns.
    assert torch.equal(attend(cache, step, q, window, room=100 * 3), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "bias"), [(100, 48, True), (33, 64, False), (16, 130, True)])
def test_linear(device, dtype, n, k, bias) -> None:
    x, weight = random(70, k, dtype=dtype, device=device), random(n, k, dtype=dtype, device=device, seed=1)
    add = random(n, dtype=dtype, device=device, seed=2) if bias else None
    out = torch.full((70, n), torch.nan, dtype=torch.float32, device=device)
    linear(x, weight, add, out, 70)
    torch.testing.assert_close(out.double(), reference.linear(x, weight, add), rtol=1e-5, atol=1e-4)
    for begin, count in [(0, 1), (69, 1), (5, 17), (3, 64), (0, 65)]:
        some = torch.full((count + 3, n), torch.nan, dtype=torch.float32, device=device)
        linear(x[begin:].contiguous(), weight, add, some, count)
        assert torch.equal(some[:count], out[begin : begin + count])
        assert some[count:].isnan().all()  # nothing beyond the rows asked for


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [48, 1000])
def test_add_rms_norm(device, dtype, n) -> None:
    x, before = (random(9, n, dtype=dtype, device=device, seed=s) for s in range(2))
    weight = random(n, dtype=dtype, device=device, seed=2)
    residual, out = before.clone(), torch.zeros_like(before)
    add_rms_norm(x, residual, weight, 1e-6, out, 8)
    close(residual[:8], (x.float() + before.float())[:8], dtype)
    assert torch.equal(residual[8], before[8])
    close(out[:8], reference.rms_norm(residual[:8], weight, 1e-6), dtype)
    one = before[5:6].clone()
    alone = torch.empty_like(one)
    add_rms_norm(x[5:6].contiguous(), one, weight, 1e-6, alone, 1)
    assert torch.equal(alone[0], out[5])
    add_rms_norm(x, before, None, 1e-6, None, 8)
    assert torch.equal(before, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [50, 1500])
def test_gated_mul(device, dtype, n) -> None:
    x = random(4, 2 * n, dtype=dtype, device=device)
    out = torch.zeros(4, n, dtype=x.dtype, device=device)
    gated_mul(x, out, 3)
    close(out[:3], reference.silu_mul(x[:3]), dtype)
    gated_mul(x, out, 3, "gelu_tanh")
    close(out[:3], reference.gelu_mul(x[:3]), dtype)
    assert not out[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_added_may_be_normed_first(device, dtype) -> None:
    x, residual = (random(3, 50, dtype=dtype, device=device, seed=s) for s in range(2))
    before, weight = residual.clone(), random(50, dtype="float32", device=device, seed=2)
    add_rms_norm(x, residual, None, 1e-6, None, 2, weight)
    want = before.double() + reference.rms_norm(x, weight, 1e-6).double()
    close(residual[:2], want[:2], dtype)
    assert torch.equal(residual[2], before[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norms", "rotated"), [(False, 24), (True, 24), (True, 18), (False, 6)])
def test_rope_write(device, dtype, norms, rotated) -> None:
    cache = make_cache(device, dtype)
    before = cache.planes.clone()
    step = Rows([5, 100, 33, 1], cache).step((0, 0, 5), (1, 99, 1), (2, 13, 20), (3, 0, 1))
    there, hd, tokens = on_device(step, cache, 6), cache.head_dim, 27
    there.slots[7] = -1  # padding: no effect
    qkv = random(tokens, 10 * hd, dtype=dtype, device=device)
    cos, sin = (random(128, rotated // 2, dtype="float32", device=device, seed=s) for s in (3, 4))
    weights = [random(hd, dtype=dtype, device=device, seed=s) if norms else None for s in (5, 6)]
    q = torch.full((tokens, 6 * hd), 9.0, dtype=qkv.dtype, device=device)
    rope_write(qkv, there.positions, there.slots, cos, sin, *weights, 1e-6, q, *cache.layer(1))

    parts = [part.reshape(tokens, -1, hd) for part in qkv.split([6 * hd, 2 * hd, 2 * hd], 1)]
    at = torch.from_numpy(step.positions).to(device)
    for i, weight in enumerate(weights):
        wide = parts[i].double()
        if weight is not None:
            wide = reference.rms_norm(wide, weight, 1e-6)
        parts[i] = reference.rotate(wide, cos[at], sin[at])
    parts[0][7] = 9.0
    close(q.view(tokens, 6, hd), parts[0], dtype)
    slots = [slot for t, slot in enumerate(step.slots.tolist()) if t != 7]
    keep = [t for t in range(tokens) if t != 7]
    for written, want in zip(cache.layer(1), parts[1:], strict=True):
        close(written.flatten(0, 1)[slots], want[keep], dtype)
    # Nothing else was touched.
    changed = (cache.planes != before).flatten(2, 3).any(-1).any(-1)
    assert not changed[0].any()
    assert set(changed[1].any(0).nonzero().flatten().tolist()) <= set(slots)


def test_tiles_and_slabs_cover_every_query_once() -> None:
    cu_q = np.array([0, 5, 6, 6, 40, 41], np.int32)
    tiles = query_tiles(cu_q, 16)
    assert tiles.tolist() == [[0, 0, 5], [1, 5, 6], [3, 6, 40], [3, 22, 40], [3, 38, 40], [4, 40, 41]]
    assert slabs(tiles[:, 1], 41, 41) == [(0, 6, 0, 41)]
    assert slabs(tiles[:, 1], 41, 18) == [(0, 2, 0, 6), (2, 3, 6, 22), (3, 5, 22, 40), (5, 6, 40, 41)]
    with pytest.raises(ValueError, match="more queries than there is room"):
        slabs(tiles[:, 1], 41, 15)
