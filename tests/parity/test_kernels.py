"""Each kernel against its plain torch reference."""

import numpy as np
import pytest
import torch

import kernels
from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.kvcache import KVCache
from kernels import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = {"float32": 2e-6, "bfloat16": 8e-3}


def make(dtype, kv_heads=2, head_dim=24, block_size=16, lengths=(5, 100, 33, 1), counts=(5, 1, 20, 1)):
    """A cache full of random values and a step over shuffled blocks."""
    generator = torch.Generator().manual_seed(head_dim)
    need = [-(-n // block_size) for n in lengths]
    kv = KVCache(sum(need) + 3, 2, kv_heads, block_size, head_dim, dtype)
    random = torch.randn(kv.array.shape, generator=generator)
    target = torch.from_numpy(kv.array)
    target.copy_(random if dtype == "float32" else random.bfloat16().view(torch.uint16))
    order = torch.randperm(kv.num_blocks, generator=generator).tolist()
    table = BlockTable(len(lengths), max(need), block_size)
    rows = [table.new_row() for _ in lengths]
    for row, n in zip(rows, need, strict=True):
        table.extend(row, [order.pop() for _ in range(n)])
    starts = [n - c for n, c in zip(lengths, counts, strict=True)]
    step = table.fill(*(np.array(a, np.int32) for a in (rows, starts, counts)), StepArrays())
    return kv, step, generator


def close(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_size", "window"),
    [
        (2, 2, 64, 16, None),
        (1, 7, 24, 16, 20),
        (2, 1, 40, 8, None),
        (3, 3, 128, 32, 5),
        (1, 12, 16, 4, 33),
        (2, 4, 80, 16, 1),
        (2, 1, 18, 48, 16),
    ],
)
def test_paged_attention(dtype, kv_heads, group, head_dim, block_size, window) -> None:
    kv, step, generator = make(dtype, kv_heads, head_dim, block_size)
    shape = (step.num_tokens, kv_heads * group, head_dim)
    q = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    got, want = torch.empty_like(q), torch.empty_like(q)
    kernels.paged_attention(q, kv, 1, step, 0.3, window, got)
    reference.paged_attention(q, kv, 1, step, 0.3, window, want)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
def test_rope_write(dtype: str, norms: bool) -> None:
    kv, step, generator = make(dtype)
    t, hd, heads = step.num_tokens, 24, 6
    kind = DTYPES[dtype]
    qkv = torch.randn(t, (heads + 4) * hd, generator=generator).to(kind)
    cos, sin = torch.randn(2, 128, hd // 2, generator=generator)
    weights = [torch.rand(hd, generator=generator).to(kind) + 1 if norms else None for _ in range(2)]
    q = torch.empty(t, heads * hd, dtype=kind)
    kernels.step_kernels(kv, step).rope_write(1, qkv, cos, sin, weights[0], weights[1], 1e-6, q)

    want = [part.reshape(t, -1, hd) for part in qkv.split([heads * hd, 2 * hd, 2 * hd], 1)]
    at = torch.from_numpy(step.positions)
    for i, weight in enumerate(weights):
        if weight is not None:
            want[i] = reference.rms_norm(want[i], weight, 1e-6)
        want[i] = reference.rotate(want[i], cos[at], sin[at])
    tolerance = "bfloat16" if dtype == "bfloat16" else "float32"
    torch.testing.assert_close(q.view(t, heads, hd), want[0], rtol=0.02, atol=0.04 if norms else 0.02)
    if dtype == "float32":
        close(q.view(t, heads, hd), want[0], tolerance)
    keys, values = reference.planes(kv, 1)
    for i, slot in enumerate(step.slots.tolist()):
        block, offset = divmod(slot, kv.block_size)
        torch.testing.assert_close(keys[block, :, :, offset], want[1][i], rtol=0.02, atol=0.04)
        assert torch.equal(values[block, :, offset], want[2][i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "n", "bias"), [(1, 7, 5, True), (3, 64, 96, False), (77, 33, 50, True), (8, 40, 16, False)]
)
def test_linear(dtype: str, rows: int, k: int, n: int, bias: bool) -> None:
    kv, step, generator = make(dtype)
    kind = DTYPES[dtype]
    x, w = torch.randn(rows, k, generator=generator).to(kind), torch.randn(n, k, generator=generator)
    b = torch.randn(n, generator=generator).to(kind) if bias else None
    out = torch.full((rows + 1, n), 7.0, dtype=kind)
    kernels.step_kernels(kv, step).linear(x, kernels.pack_weight(w, kind), b, out, rows)
    want = x.double() @ w.to(kind).double().t() + (0 if b is None else b.double())
    torch.testing.assert_close(out[:rows].double(), want, rtol=ROUNDING[dtype], atol=20 * ROUNDING[dtype])
    assert (out[rows] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 50, 257])
def test_norm_and_activation(dtype: str, n: int) -> None:
    kv, step, generator = make(dtype)
    kind = DTYPES[dtype]
    k = kernels.step_kernels(kv, step)
    x, residual = torch.randn(2, 5, n, generator=generator).to(kind)
    weight = torch.randn(n, generator=generator).to(kind)
    total, out = x + residual, torch.empty(5, n, dtype=kind)
    k.add_rms_norm(x, residual, weight, 1e-5, out, 5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, reference.rms_norm(total, weight, 1e-5), rtol=0.02, atol=1e-5)
    gate_up = (torch.randn(5, 2 * n, generator=generator) * 20).to(kind)
    k.silu_mul(gate_up, out, 5)
    want = reference.silu_mul(gate_up)
    torch.testing.assert_close(out, want, rtol=0.02 if dtype == "bfloat16" else 2e-6, atol=1e-6)


def test_wrong_steps_are_refused() -> None:
    kv, step, _ = make("float32")
    q = torch.zeros(step.num_tokens, 2, 24)
    for name, value, error in (
        ("tables", np.full_like(step.tables, kv.num_blocks), IndexError),
        ("tables", np.full_like(step.tables, -1), IndexError),
        ("tables", step.tables[:, :1].copy(), ValueError),
        ("context_lens", step.context_lens * 0, ValueError),
        ("cu_q", step.cu_q[::-1].copy(), ValueError),
        ("slots", step.slots[:-1].copy(), ValueError),
    ):
        bad = type(
            "Bad", (), {n: getattr(step, n) for n in ("positions", "slots", "cu_q", "context_lens", "tables")}
        )
        setattr(bad, name, value)
        with pytest.raises(error):
            kernels.paged_attention(q, kv, 0, bad(), 1.0, None, torch.empty_like(q))
    with pytest.raises(ValueError, match="layer"):
        kernels.paged_attention(q, kv, 2, step, 1.0, None, torch.empty_like(q))
    with pytest.raises(ValueError, match="expected contiguous"):
        kernels.paged_attention(q[1:], kv, 0, step, 1.0, None, torch.empty_like(q))


def test_slots_and_positions_are_checked() -> None:
    kv, step, _ = make("float32")
    t = step.num_tokens
    qkv, q = torch.zeros(t, 6 * 24), torch.zeros(t, 2 * 24)
    tables = torch.zeros(200, 12)
    good = step.slots.copy()
    for slot in (-1, kv.num_blocks * kv.block_size):
        step.slots[0] = slot
        with pytest.raises(IndexError, match="slot"):
            kernels.step_kernels(kv, step).rope_write(0, qkv, tables, tables, None, None, 1e-6, q)
    step.slots[:] = good
    with pytest.raises(IndexError, match="position"):
        kernels.step_kernels(kv, step).rope_write(0, qkv, tables[:50], tables[:50], None, None, 1e-6, q)


def test_kv_cache_blocks() -> None:
    kv = KVCache(4, 3, 2, 16, 8, "bfloat16")
    assert kv.block_bytes == 3 * 2 * 2 * 16 * 8 * 2
    assert kv.address % 64 == 0
    data = np.random.default_rng(0).bytes(kv.block_bytes)
    kv.write(2, data)
    view = kv.view(2)
    assert (bytes(view), view.format, view.readonly) == (data, "B", False)
    view[0] ^= 0xFF
    assert kv.view(2)[0] == data[0] ^ 0xFF
    assert kv.array[2].tobytes() == bytes(view)
    assert not kv.array[[0, 1, 3]].any()
    for block in (-1, 4):
        with pytest.raises(IndexError):
            kv.view(block)
    with pytest.raises(ValueError, match="bytes"):
        kv.write(0, data[1:])
    with pytest.raises(ValueError, match="device"):
        KVCache(1, 1, 1, 1, 2, "float32", "cuda")
