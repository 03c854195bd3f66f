"""Each kernel against its plain torch reference."""

import numpy as np
import pytest
import torch

from dataplane._fast.blocktable import BlockTable, StepArrays
from dataplane.kvcache import KVCache
from kernels import reference
from kernels.base import Linear
from kernels.cpu import _native, ops
from kernels.cpu.pack import pack, pack_gate_up
from kernels.memory import Arena

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEAM = _native.Team(2)
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
    ops.attention(TEAM, kv, 1, step, q, 0.3, window, got)
    reference.paged_attention(q, kv, 1, step, 0.3, window, want)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norms", "rotated"), [(False, 24), (True, 24), (True, 18), (False, 6)])
def test_rope_write(dtype: str, norms: bool, rotated: int) -> None:
    kv, step, generator = make(dtype)
    t, hd, heads = step.num_tokens, 24, 6
    kind = DTYPES[dtype]
    qkv = torch.randn(t, (heads + 4) * hd, generator=generator).to(kind)
    cos, sin = torch.randn(2, 128, rotated // 2, generator=generator)
    random = [torch.rand(hd, generator=generator).to(kind) + 1 for _ in range(2)]
    weights = [weight.float() if norms else None for weight in random]
    q = torch.empty(t, heads, hd, dtype=kind)
    ops.rope_write(TEAM, kv, 1, step, qkv, (cos, sin), (weights[0], weights[1]), 1e-6, q)

    want = [part.reshape(t, -1, hd) for part in qkv.split([heads * hd, 2 * hd, 2 * hd], 1)]
    at = torch.from_numpy(step.positions)
    for i, weight in enumerate(weights):
        if weight is not None:
            want[i] = reference.rms_norm(want[i], weight, 1e-6)
        want[i] = reference.rotate(want[i], cos[at], sin[at])
    tolerance = "bfloat16" if dtype == "bfloat16" else "float32"
    torch.testing.assert_close(q, want[0], rtol=0.02, atol=0.04 if norms else 0.02)
    if dtype == "float32":
        close(q, want[0], tolerance)
    keys, values = reference.planes(kv, 1)
    for i, slot in enumerate(step.slots.tolist()):
        block, offset = divmod(slot, kv.block_size)
        torch.testing.assert_close(keys[block, :, :, offset], want[1][i], rtol=0.02, atol=0.04)
        assert torch.equal(values[block, :, offset], want[2][i])


SHAPES = [(1, 8, 5, True), (3, 64, 96, False), (77, 34, 50, True), (8, 40, 16, False), (400, 130, 129, True)]


def product(dtype: str, rows: int, k: int, n: int, bias: bool) -> tuple[torch.Tensor, Linear, torch.Tensor]:
    """x, a linear layer and what they make, in float64."""
    generator = torch.Generator().manual_seed(rows * k)
    kind = DTYPES[dtype]
    x, w = (torch.randn(m, k, generator=generator).to(kind) for m in (rows, n))
    b = torch.randn(n, generator=generator).to(kind) if bias else None
    return x, Linear(w, b), reference.linear(x, w, b)


def near(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=20 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n", "bias"), SHAPES)
def test_linear(dtype: str, rows: int, k: int, n: int, bias: bool) -> None:
    x, linear, want = product(dtype, rows, k, n, bias)
    out = torch.full((rows + 1, n), 7.0, dtype=x.dtype)
    ops.linear(TEAM, x, pack(linear, Arena()), out, ops.STORE)
    near(out[:rows], want, dtype)
    ops.linear(TEAM, x, pack(linear, Arena()), out, ops.ADD)
    near(out[:rows], 2 * want, dtype)
    assert (out[rows] == 7.0).all()
    floats = torch.empty(rows, n)
    ops.linear(TEAM, x, pack(linear, Arena()), floats, ops.FLOAT)
    near(floats, want, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n", "bias"), SHAPES)
def test_gate_up(dtype: str, rows: int, k: int, n: int, bias: bool) -> None:
    x, linear, _ = product(dtype, rows, k, 2 * n, bias)
    wide = torch.empty(rows, 2 * n, dtype=x.dtype)
    ops.linear(TEAM, x, pack(linear, Arena()), wide, ops.STORE)
    out = torch.empty(rows, n, dtype=x.dtype)
    ops.linear(TEAM, x, pack_gate_up(linear, Arena()), out, ops.SILU_MUL)
    near_bits = 0.02 if dtype == "bfloat16" else 2e-5
    torch.testing.assert_close(out, reference.silu_mul(wide), rtol=near_bits, atol=1e-5)
    ops.linear(TEAM, x, pack_gate_up(linear, Arena()), out, ops.GELU_MUL)
    torch.testing.assert_close(out, reference.gelu_mul(wide), rtol=near_bits, atol=1e-5)


def test_odd_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="even number of inputs"):
        pack(Linear(torch.zeros(4, 7, dtype=torch.bfloat16)), Arena())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_know_of_each_other(dtype: str) -> None:
    """Any number of rows, threads and any instruction set: the same bits. Denormals are zero everywhere."""
    x, linear, _ = product(dtype, 300, 130, 70, True)
    x[7] *= 1e-30 if dtype == "float32" else 2.0**-100
    linear.weight[3] *= 2.0**-30
    packed = pack(linear, Arena())
    want = torch.empty(300, 70, dtype=x.dtype)
    ops.linear(TEAM, x, packed, want, ops.STORE)
    try:
        for isa in (0, 1, 2, 3):
            _native.set_isa(isa)
            for threads in (1, 3):
                team = _native.Team(threads)
                for rows in (1, 2, 3, 4, 5, 6, 7, 13, 31, 300):
                    got = torch.empty(rows, 70, dtype=x.dtype)
                    ops.linear(team, x[:rows], packed, got, ops.STORE)
                    assert torch.equal(got, want[:rows]), (isa, threads, rows)
    finally:
        _native.set_isa(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 50, 257])
def test_norm(dtype: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    kind = DTYPES[dtype]
    x, weight = torch.randn(5, n, generator=generator).to(kind), torch.randn(n, generator=generator)
    out = torch.empty_like(x)
    want = reference.rms_norm(x, weight, 1e-5)
    ops.rms_norm(TEAM, x, weight, 1e-5, out)
    torch.testing.assert_close(out, want, rtol=0.02, atol=1e-5)
    ops.rms_norm(TEAM, x, weight, 1e-5, out, wide=True)
    torch.testing.assert_close(out, want, rtol=ROUNDING[dtype], atol=1e-6)
    ops.rms_norm(TEAM, x, weight, 1e-5, out, wide=True, add=True)
    torch.testing.assert_close(out, 2 * want, rtol=2 * ROUNDING[dtype], atol=2e-6)


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
            ops.attention(TEAM, kv, 0, bad(), q, 1.0, None, torch.empty_like(q))
    with pytest.raises(ValueError, match="layer"):
        ops.attention(TEAM, kv, 2, step, q, 1.0, None, torch.empty_like(q))
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.attention(TEAM, kv, 0, step, q[1:], 1.0, None, torch.empty_like(q[1:]))


def test_slots_and_positions_are_checked() -> None:
    kv, step, _ = make("float32")
    t = step.num_tokens
    qkv, q = torch.zeros(t, 6 * 24), torch.zeros(t, 2, 24)
    tables = torch.zeros(200, 12)
    good = step.slots.copy()
    for slot in (-1, kv.num_blocks * kv.block_size):
        step.slots[0] = slot
        with pytest.raises(IndexError, match="slot"):
            ops.rope_write(TEAM, kv, 0, step, qkv, (tables, tables), (None, None), 1e-6, q)
    step.slots[:] = good
    short = (tables[:50].contiguous(), tables[:50].contiguous())
    with pytest.raises(IndexError, match="position"):
        ops.rope_write(TEAM, kv, 0, step, qkv, short, (None, None), 1e-6, q)


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
