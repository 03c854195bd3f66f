"""A stage of any number of ranks has the bits of a stage of one, also while ranks go and come."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataplane.kvcache import KVCache
from kernels.base import DTYPES, Experts, Linear
from kernels.cpu import _native, ops
from kernels.cpu.pack import pack
from kernels.cpu.rank import CpuRank, SharedHeads
from kernels.cpu.rank_weights import RankWeights
from kernels.memory import Arena
from kernels.ranks import cuts, sums
from kernels.ranks.exchange import Exchange, ExchangeAborted, RankMissing, make_memory
from kernels.ranks.layout import Layout, Shape, changes, first_layout, next_layout
from kernels.ranks.own import shape_of, vocabulary_of
from tests.parity.rank_group import (
    BLOCK,
    BLOCKS,
    HEAD_DIM,
    HIDDEN,
    ROWS_MAX,
    VOCAB,
    PlanePool,
    RankGroup,
    Requests,
    random_spec,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [2, 4, 6, 8])
def test_any_number_of_ranks(kv_heads: int, dtype: str) -> None:
    """Prefill in chunks and decodes, in one step; with 8 ranks of 2 heads all heads are data-parallel."""
    spec = random_spec(kv_heads, DTYPES[dtype])
    for ranks in range(1, 9):
        requests = Requests(spec, kv_heads, dtype, 5)
        group = RankGroup(requests, kv_heads, ranks, threads=1 + (ranks == 2))
        one, two, three, four, five = requests.rows
        group.check_step({one: 21, two: 9})
        group.check_step({two: 1, three: 33, one: 1, four: 2})
        group.check_step({five: 1, one: 1, two: 1, three: 1, four: 1})
        group.check_step({four: 3})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [8, 6])
def test_ranks_go_and_come(kv_heads: int, dtype: str) -> None:
    """8 -> 7 -> 6 -> 5 -> 4 -> 8: KV goes where the layout says, and nowhere else; streams go on in between."""
    requests = Requests(random_spec(kv_heads, DTYPES[dtype]), kv_heads, dtype, 6)
    group = RankGroup(requests, kv_heads, 8)
    rows = requests.rows
    group.check_step(dict.fromkeys(rows, 9))
    for ranks in ([0, 1, 2, 4, 5, 6, 7], [0, 1, 2, 4, 5, 7], [1, 2, 4, 5, 7], [1, 4, 5, 7], range(8)):
        after = next_layout(group.layout, ranks)
        kept = {row: rank for row, rank in group.owners.items() if rank in after.ranks}
        new = {row: after.ranks[row % len(after.ranks)] for row in rows if row not in kept}
        group.become(after, {row: (kept | new)[row] for row in rows})
        group.check_step(dict.fromkeys(rows, 1))
        group.check_step({rows[0]: 5, rows[3]: 1, rows[5]: 2})


def test_only_what_a_rank_did_not_have_is_packed() -> None:
    """4 -> 3 -> 4 -> 2 -> 4, and what is copied has the bytes that it would have if it were packed."""
    requests = Requests(random_spec(6, torch.bfloat16), 6, "bfloat16", 2)
    group = RankGroup(requests, 6, 4)
    every = (6 + len(cuts.ffn_ends(1100))) * 3  # heads and shards of three layers
    assert sum(rank.weights.packed for rank in group.ranks.values()) >= every
    for ranks in ([0, 2, 3], range(4), [1, 3], range(4)):
        before, after = group.layout, next_layout(group.layout, ranks)
        moves = changes(before, after)
        group.become(after, {row: after.ranks[row % len(after.ranks)] for row in requests.rows})
        for number, rank in group.ranks.items():
            new = len(moves.head_weights[number]) + sum(shard.target == number for shard in moves.shards)
            assert rank.weights.packed == new
            check_as_packed(rank.weights, RankWeights(requests.spec, 6), after, number)
        group.check_step(dict.fromkeys(requests.rows, 3))


def check_as_packed(got: RankWeights, fresh: RankWeights, layout: Layout, rank: int) -> None:
    for layer in range(layout.shape.layers):
        for heads in (layout.heads_of(rank, layer), layout.data_parallel(layer)):
            if heads:
                fresh.heads(layer, heads)
        fresh.shards(layer, layout.shards_of(rank, layer))
    assert got._heads.keys() == fresh._heads.keys()
    assert got._shards.keys() == fresh._shards.keys()
    pairs = [(got._heads[at].qkv, head.qkv) for at, head in fresh._heads.items()]
    pairs += [(got._heads[at].o, head.o) for at, head in fresh._heads.items()]
    pairs += [(got._shards[at].gate_up, shard.gate_up) for at, shard in fresh._shards.items()]
    pairs += [(got._shards[at].down, shard.down) for at, shard in fresh._shards.items()]
    for one, other in pairs:
        assert one.view(torch.int32).equal(other.view(torch.int32))


def test_kv_that_is_not_brought_is_seen() -> None:
    requests = Requests(random_spec(4, torch.float32), 4, "float32", 4)
    group = RankGroup(requests, 4, 4)
    group.check_step(dict.fromkeys(requests.rows, 9))
    after = next_layout(group.layout, [0, 1, 3])
    group.become(after, {row: after.ranks[row % 3] for row in requests.rows})
    plane = after.planes_of(1)[2][after.data_parallel(2)[0]]
    group.pools[1].array.view(np.uint8).reshape(group.pools[1].planes, -1)[plane] = 0xFF
    with pytest.raises(AssertionError):
        group.check_step(dict.fromkeys(requests.rows, 1))


def test_floats_added_as_they_arrive_depend_on_who_adds() -> None:
    """What the fixed point is for: with float32 in its place the bits differ by the number of ranks and by order."""
    generator = torch.Generator().manual_seed(5)
    ends = cuts.ffn_ends(2048)
    x, weight = torch.randn(4, 2048, generator=generator), torch.randn(64, 2048, generator=generator)
    team, partials = _native.Team(1), []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        partials.append(torch.empty(4, 64))
        packed = pack(Linear(weight[:, begin:end].contiguous()), Arena())
        ops.linear(team, x[:, begin:end].contiguous(), packed, partials[-1], ops.FLOAT)
    by_floats, by_whole_numbers = set(), set()
    limit = sums.limit_of(len(ends))
    for ranks in range(1, 9):
        layout = first_layout(Shape(1, 1, len(ends)), ranks)
        own = [layout.shards_of(rank, 0) for rank in layout.ranks]
        for order in (own, own[::-1]):
            floats, whole = torch.zeros(4, 64), np.zeros(4 * 64, np.int64)
            for shards in order:
                mine, mine_whole = torch.zeros(4, 64), np.zeros(4 * 64, np.int64)
                for shard in shards:
                    mine += partials[shard]
                    assert sums.add(mine_whole, partials[shard].numpy().ravel(), limit) == 0
                floats += mine
                whole += mine_whole
            by_floats.add(floats.numpy().tobytes())
            by_whole_numbers.add(sums.to_float(whole).tobytes())
    assert len(by_whole_numbers) == 1
    assert len(by_floats) > 8


def exchange_of(memory: int, ranks: int, rank: int) -> Exchange:
    return Exchange(memory, ranks, rank, ROWS_MAX * HIDDEN)


def test_a_rank_that_is_missing_or_an_abort_ends_the_step() -> None:
    spec = random_spec(2, torch.float32)
    layout = first_layout(shape_of(spec, 2), 2)
    requests = Requests(spec, 2, "float32", 1)
    memory = make_memory(2, ROWS_MAX * HIDDEN)
    try:
        ends = [exchange_of(memory, 2, i) for i in range(2)]
    finally:
        os.close(memory)
    pool = PlanePool(layout.planes_needed(1), BLOCKS, BLOCK, HEAD_DIM, "float32")
    rank = CpuRank(spec, layout, 1, pool, ends[1], timeout_s=0.05, threads=2)
    tokens, rows, starts, new = requests.step({requests.rows[0]: 3})
    step, picked = requests.table.fill(rows, starts, new), np.zeros(1, np.int32)
    begun = time.monotonic()
    with pytest.raises(RankMissing, match="rank 0 was not there within"):
        rank.forward(tokens, step, picked)
    assert time.monotonic() - begun < 30
    with pytest.raises(ExchangeAborted):  # which the one who was late has done
        rank.forward(tokens, step, picked)
    assert rank.team.beats() == -1


def test_what_does_not_fit() -> None:
    spec = random_spec(2, torch.float32)
    layout = first_layout(shape_of(spec, 2), 1)
    memory = make_memory(1, 2 * HIDDEN)
    try:
        exchange = Exchange(memory, 1, 0, 2 * HIDDEN)
    finally:
        os.close(memory)
    pool = PlanePool(layout.planes_needed(0), BLOCKS, BLOCK, HEAD_DIM, "float32")
    rank = CpuRank(spec, layout, 0, pool, exchange)
    requests = Requests(spec, 2, "float32", 1)
    tokens, rows, starts, new = requests.step({requests.rows[0]: 3})
    step, picked = requests.table.fill(rows, starts, new), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="3 rows of 40 are more than the 80 numbers"):
        rank.forward(tokens, step, picked)
    with pytest.raises(IndexError, match="row that this step does not have"):
        rank.forward(tokens[:1], requests.table.fill(rows, starts, new // 3), np.array([4], np.int32))
    with pytest.raises(ValueError, match="does not fit the stage"):
        CpuRank(spec, first_layout(Shape(3, 2, 4), 1), 0, pool, exchange)
    with pytest.raises(ValueError, match="3 layers of 4 KV heads for a layout of"):
        CpuRank(spec, layout, 0, SharedHeads(KVCache(BLOCKS, 3, 4, BLOCK, HEAD_DIM, "float32")), exchange)
    mixture = Experts(torch.ones(1, HIDDEN), (), 1, False)
    with pytest.raises(ValueError, match="mixture of experts"):
        CpuRank(replace(spec, layers=(replace(spec.layers[0], mlp=mixture),)), layout, 0, pool, exchange)


def test_the_vocabulary_is_cut_by_panels() -> None:
    for ranks in range(1, 9):
        layout = first_layout(Shape(1, 2, 4), ranks)
        parts = [vocabulary_of(layout, rank, VOCAB) for rank in layout.ranks]
        assert [token for part in parts for token in part] == list(range(VOCAB))
        assert all(part.start % 64 == 0 for part in parts if part)
