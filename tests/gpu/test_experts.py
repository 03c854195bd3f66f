"""Mixtures of experts on a device: against the reference, and rows with the same bits in any company."""

import pytest
import torch

from kernels import reference
from kernels.base import Experts, Linear, Mlp

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

from kernels.cuda.experts import DeviceExperts, Routes
from kernels.triton.experts import route, tiles_of
from kernels.triton.linear import ROWS
from tests.gpu.steps import random

HIDDEN, WIDE = 48, 40


def mixture_of(count: int, chosen: int, normalised: bool, dtype: str, device: torch.device) -> Experts:
    def weight(n: int, k: int, seed: int) -> Linear:
        return Linear(random(n, k, dtype=dtype, device=device, seed=seed) * 0.3)

    experts = tuple(Mlp(weight(2 * WIDE, HIDDEN, i), weight(HIDDEN, WIDE, 100 + i)) for i in range(count))
    return Experts(weight(count, HIDDEN, 999).tensor, experts, chosen, normalised)


def test_pairs_are_cut_into_tiles_of_one_expert(device) -> None:
    chosen = torch.tensor([[0, 3]] * (ROWS + 2) + [[3, 1]] * 3, dtype=torch.int32, device=device)
    order, tiles = tiles_of(chosen, 5)
    pairs = chosen.flatten()
    seen = []
    for expert, first, end in tiles.tolist():
        assert end - first <= ROWS
        seen += range(first, end)
        assert (pairs[order[first : max(first, end)].long()] == expert).all()
    assert seen == list(range(len(pairs)))
    assert sorted(order.tolist()) == seen
    one, _ = tiles_of(chosen[:1], 5)
    assert one.tolist() == [0, 1]


@pytest.mark.parametrize(("experts", "chosen", "normalised"), [(5, 2, True), (9, 3, False), (16, 16, True)])
def test_route(device, experts, chosen, normalised) -> None:
    logits = random(6, experts, dtype="float32", device=device)
    logits[2] = 1.0  # all equal: the first ones
    logits[4] = torch.nan
    weights = torch.empty(6, chosen, device=device)
    taken = torch.empty(6, chosen, dtype=torch.int32, device=device)
    route(logits, weights, taken, 6, normalised)
    assert taken[2].tolist() == list(range(chosen))
    # Where nothing is a number, any expert will do: what it makes of the row is no number either.
    assert ((taken >= 0) & (taken < experts)).all()
    want, where = logits.softmax(-1).topk(chosen, -1)
    want = want / want.sum(-1, keepdim=True) if normalised else want
    rows = [0, 1, 3, 5]
    assert torch.equal(taken[rows].long(), where[rows])
    torch.testing.assert_close(weights[rows], want[rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_do_not_know_of_each_other(device, dtype) -> None:
    mixture = mixture_of(6, 2, True, dtype, device)
    there = DeviceExperts.load(mixture, device, mixture.router.dtype)
    x = random(9, HIDDEN, dtype=dtype, device=device, seed=5)
    routes, whole = Routes(there, 9), torch.empty_like(x)
    routes.run(there, x, whole, 9, "silu")
    room = 2e-5 if dtype == "float32" else 6e-2
    torch.testing.assert_close(whole.double(), reference.experts(x, mixture), rtol=room, atol=room)
    assert len({row.float().cpu().numpy().tobytes() for row in whole}) == 9
    for begin, count in [(0, 1), (8, 1), (2, 4)]:
        some = torch.empty_like(x)
        routes.run(there, x[begin : begin + count].contiguous(), some, count, "silu")
        assert torch.equal(some[:count], whole[begin : begin + count])
