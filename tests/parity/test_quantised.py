"""Products of quantised weights: near those of the values that they stand for, with the same bits on every path."""

from collections.abc import Iterator

import pytest
import torch

from kernels.base import Layer, Linear, Mlp
from kernels.cpu import _native, ops
from kernels.cpu.pack import pack, pack_gate_up
from kernels.cuda.weights import to_device
from kernels.memory import Arena
from kernels.quantised import GROUP, K_GROUPS, Format, Plane, Quantised, int8_rows, joined

FORMATS = [format for format in Format if format is not Format.DENSE]
SHAPES = [(1, 8, 5, True), (3, 64, 96, False), (77, 34, 50, True), (200, 290, 129, True)]
TEAM = _native.Team(2)


@pytest.fixture(autouse=True)
def all_instructions() -> Iterator[None]:
    yield
    _native.set_isa(-1)


def random_weight(format: Format, n: int, k: int, seed: int = 0) -> Quantised:
    """Every q that the format has, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // GROUP)
    q = torch.randint(0, 1 << format.bits, (n, groups * GROUP), generator=generator, dtype=torch.uint8)

    def plane(every: int, kind: torch.dtype) -> Plane:
        shape = (n, -(-groups // every))
        if kind is torch.uint8:
            return Plane(torch.randint(0, 64, shape, generator=generator, dtype=kind), every)
        return Plane((torch.randn(shape, generator=generator) * 0.01).to(kind), every)

    half = torch.float16
    planes = {
        Format.INT8_ROW: (plane(groups, torch.float32),),
        Format.INT8_F16: (plane(1, half),),
        Format.INT4_F16: (plane(1, half),),
        Format.INT4_F16_MIN: (plane(1, half), plane(1, half)),
        Format.INT4_F32_MIN: (plane(4, torch.float32), plane(4, torch.float32)),
        Format.INT4_K: (*(plane(K_GROUPS, half),) * 2, *(plane(1, torch.uint8),) * 2),
    }
    return Quantised(format, q, planes[format], k)


def rows(count: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(count + k)).to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 rows as the kernels take them: eight bits, a scale for each group. In float64."""
    k = x.shape[1]
    groups = torch.nn.functional.pad(x.float(), (0, -k % GROUP)).view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    q = torch.where(largest > 0, groups * (torch.full_like(largest, 127) / largest), 0.0).round()
    return (q.double() * (largest / torch.full_like(largest, 127))).flatten(1)[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("count", "k", "n", "biased"), SHAPES)
def test_product(dtype: torch.dtype, format: Format, count: int, k: int, n: int, biased: bool) -> None:
    weight, x = random_weight(format, n, k), rows(count, k, dtype)
    bias = rows(1, n, dtype)[0] if biased else None
    exact = (rounded(x) if dtype is torch.bfloat16 else x.double()) @ weight.dense().double().T
    want = exact if bias is None else exact + bias.double()
    packed = pack(Linear(weight, bias), Arena())
    got = torch.empty(count, n)
    ops.linear(TEAM, x, packed, got, ops.FLOAT)
    size = want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * size)
    out = torch.full((count + 1, n), 7.0, dtype=dtype)
    ops.linear(TEAM, x, packed, out, ops.STORE)
    assert torch.equal(out[:count], got.to(dtype))
    ops.linear(TEAM, x, packed, out, ops.ADD)
    assert torch.equal(out[:count], (got.to(dtype).float() * 2).to(dtype))
    assert (out[count] == 7.0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_float_rows_have_the_product_of_the_values(format: Format) -> None:
    """Bit for bit: a stage in float32 computes what it does with a checkpoint of the values."""
    weight, bias, x = (
        random_weight(format, 129, 290),
        rows(1, 129, torch.float32)[0],
        rows(200, 290, torch.float32),
    )
    got, want = torch.empty(200, 129), torch.empty(200, 129)
    ops.linear(TEAM, x, pack(Linear(weight, bias), Arena()), got, ops.STORE)
    ops.linear(TEAM, x, pack(Linear(weight.dense(), bias), Arena()), want, ops.STORE)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_gate_up(dtype: torch.dtype, format: Format) -> None:
    count, k, n = 5, 70, 50
    weight, x = random_weight(format, 2 * n, k), rows(5, k, dtype)
    bias = rows(1, 2 * n, dtype)[0]
    wide = torch.empty(count, 2 * n, dtype=dtype)
    ops.linear(TEAM, x, pack(Linear(weight, bias), Arena()), wide, ops.STORE)
    out = torch.empty(count, n, dtype=dtype)
    ops.linear(TEAM, x, pack_gate_up(Linear(weight, bias), Arena()), out, ops.SILU_MUL)
    gate, up = wide.float().chunk(2, 1)
    want = torch.nn.functional.silu(gate).to(dtype).float() * up
    torch.testing.assert_close(out.float(), want, rtol=2e-2 if dtype is torch.bfloat16 else 2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_equal_bits(dtype: torch.dtype, format: Format) -> None:
    """Any number of rows, threads and any instruction set. The products of a group's largest values are among them."""
    k, n = 290, 70
    weight, x = random_weight(format, n, k), rows(300, k, dtype)
    weight.q[:3] = torch.tensor([0, (1 << format.bits) - 1, 1], dtype=torch.uint8)[:, None]
    x[0], x[1], x[2, ::2], x[3] = 1.0, -1.0, 0.0, 0.0
    x[4] *= 2.0**-110
    x[5, 40:50] *= 2.0**60
    packed = pack(Linear(weight, rows(1, n, dtype)[0]), Arena())
    _native.set_isa(0)
    want = torch.empty(300, n)
    ops.linear(_native.Team(1), x, packed, want, ops.FLOAT)
    for isa in (0, 1, 2, 3):
        _native.set_isa(isa)
        for threads in (1, 3):
            team = _native.Team(threads)
            for count in (1, 2, 3, 4, 5, 7, 14, 300) if isa else (1, 3, 6):
                got = torch.empty(count, n)
                ops.linear(team, x[:count], packed, got, ops.FLOAT)
                assert torch.equal(got, want[:count]), (isa, threads, count)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so_in_its_row(dtype: torch.dtype, bad: float) -> None:
    """Else a request whose numbers overflowed would go on with some that look sound."""
    weight, x = random_weight(Format.INT4_F16_MIN, 70, 100), rows(6, 100, dtype)
    good = torch.empty(6, 70)
    packed = pack(Linear(weight), Arena())
    ops.linear(TEAM, x, packed, good, ops.FLOAT)
    x[2, 41] = bad
    got = torch.empty(6, 70)
    ops.linear(TEAM, x, packed, got, ops.FLOAT)
    assert not got[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], good[others])


def test_int8_is_made_to_the_nearest() -> None:
    weight = rows(40, 50, torch.float32)
    weight[3] = 0.0
    made = int8_rows(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((made.dense() - weight).abs() <= step * 0.5001).all()
    assert (made.q[:, :50].int() - 128).abs().max() == 127


def test_only_what_is_alike_is_joined() -> None:
    four, more = (random_weight(Format.INT4_F16, n, 64, n) for n in (5, 9))
    whole = joined([four, more], torch.bfloat16)
    assert isinstance(whole, Quantised)
    assert torch.equal(whole.dense(), torch.cat([four.dense(), more.dense()]))
    other = random_weight(Format.INT8_F16, 9, 64)
    mixed = joined([four, other], torch.float32)
    assert isinstance(mixed, torch.Tensor)
    assert torch.equal(mixed, torch.cat([four.dense(), other.dense()]))


def test_a_device_without_kernels_for_them_has_the_values() -> None:
    """So GPUs serve quantised checkpoints as well, at the size of dense ones."""
    weights = [random_weight(Format.INT4_K, n, 64) for n in (96, 32, 128, 32)]
    qkv, o, gate_up, down = (Linear(weight) for weight in weights)
    norm = torch.ones(64, dtype=torch.bfloat16)
    layer = to_device(
        Layer(norm, qkv, None, None, o, norm, Mlp(gate_up, down), None), torch.device("cpu"), torch.bfloat16
    )
    assert isinstance(layer.mlp, Mlp)
    for weight, linear in zip(weights, (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down), strict=True):
        assert torch.equal(linear.tensor, weight.dense().bfloat16())
    with pytest.raises(TypeError, match="INT4_K"):
        _ = qkv.tensor


def test_formats_are_those_of_the_kernels() -> None:
    assert {format.name: format.value for format in Format} == {
        format.name: getattr(_native, format.name) for format in Format
    }
