"""What a plan must do: all is where it belongs, nothing is read twice or although a rank has it, ranks read evenly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.core.ranks.recovery import Bandwidth, Held, Plan, Sizes, plan
from dataplane.core.ranks.routing import Router
from kernels.ranks.layout import DATA_PARALLEL, Layout, Shape, first_layout, next_layout

SIZES = Sizes(block=8192, head=1 << 20, shard=3 << 20)


@dataclass
class World:
    """What each rank has: blocks of planes by (request, layer, head), weights of heads by parts of 1, shards."""

    planes: dict[int, dict[tuple[int, int, int], int]]
    heads: dict[int, dict[tuple[int, int], float]]
    shards: dict[int, set[tuple[int, int]]]


def world(layout: Layout, requests: list[Held]) -> World:
    places = [(layer, head) for layer in range(layout.shape.layers) for head in range(layout.shape.heads)]
    return World(
        {
            rank: {
                (held.request, layer, head): held.blocks
                for held in requests
                for layer, head in places
                if rank == (holder := layout.heads[layer][head])
                or (holder == DATA_PARALLEL and rank == held.owner)
            }
            for rank in layout.ranks
        },
        {
            rank: {at: 1.0 for at in places if layout.heads[at[0]][at[1]] in (rank, DATA_PARALLEL)}
            for rank in layout.ranks
        },
        {
            rank: {
                (layer, shard)
                for layer in range(layout.shape.layers)
                for shard in layout.shards_of(rank, layer)
            }
            for rank in layout.ranks
        },
    )


def perform(have: World, made: Plan, stay: set[int]) -> World:
    """Reads, then sends. What a rank has already, and what is read although one that stays has it, is an error."""
    ranks = made.layout.ranks
    after = World(
        {rank: dict(have.planes[rank]) if rank in stay else {} for rank in ranks},
        {rank: dict(have.heads[rank]) if rank in stay else {} for rank in ranks},
        {rank: set(have.shards[rank]) if rank in stay else set() for rank in ranks},
    )
    seen = set()
    for read in made.kv_reads:
        for layer, head in read.planes:
            at = (read.request, layer, head)
            assert at not in seen, "read twice"
            assert all(at not in have.planes[rank] for rank in stay), "a rank that stays has it"
            seen.add(at)
            after.planes[read.target][at] = read.blocks
    for sent in made.kv_sends:
        for layer, head in sent.planes:
            at = (sent.request, layer, head)
            assert have.planes[sent.source][at] >= sent.blocks
            assert at not in after.planes[sent.target], "it was there"
            after.planes[sent.target][at] = sent.blocks
    parts = set()
    for part in made.head_reads:
        assert (part.layer, part.head, part.part) not in parts, "read twice"
        assert all((part.layer, part.head) not in have.heads[rank] for rank in stay), (
            "a rank that stays has it"
        )
        parts.add((part.layer, part.head, part.part))
        for rank in part.targets:
            add_part(after, rank, part.layer, part.head, part.parts)
        if part.reader not in part.targets and made.layout.heads[part.layer][part.head] in (
            part.reader,
            DATA_PARALLEL,
        ):
            add_part(after, part.reader, part.layer, part.head, part.parts)
    for whole in made.head_sends:
        assert have.heads[whole.source][whole.layer, whole.head] == 1.0
        for rank in whole.targets:
            assert (whole.layer, whole.head) not in after.heads[rank], "it was there"
            after.heads[rank][whole.layer, whole.head] = 1.0
    for shard in made.shard_reads:
        assert all((shard.layer, shard.shard) not in have.shards[rank] for rank in stay), (
            "a rank that stays has it"
        )
        assert (shard.layer, shard.shard) not in after.shards[shard.reader], "read twice"
        after.shards[shard.reader].add((shard.layer, shard.shard))
    for moved in made.shard_sends:
        assert (moved.layer, moved.shard) in have.shards[moved.source]
        after.shards[moved.target].add((moved.layer, moved.shard))
    return after


def add_part(after: World, rank: int, layer: int, head: int, parts: int) -> None:
    after.heads[rank][layer, head] = after.heads[rank].get((layer, head), 0.0) + 1 / parts


def assert_whole(have: World, made: Plan, owners: dict[int, int]) -> None:
    """Everything that the layout asks for is there."""
    layout = made.layout
    for layer, row in enumerate(layout.heads):
        for head, holder in enumerate(row):
            for rank in layout.ranks if holder == DATA_PARALLEL else (holder,):
                assert have.heads[rank].get((layer, head), 0) == pytest.approx(1.0)
            for request, blocks in made.resume.items():
                rank = owners[request] if holder == DATA_PARALLEL else holder
                assert have.planes[rank].get((request, layer, head), 0) >= blocks
        for shard, holder in enumerate(layout.shards[layer]):
            assert (layer, shard) in have.shards[holder]


@st.composite
def losses(draw: st.DrawFn) -> tuple[Layout, Layout, list[Held]]:
    """A stage that has changed its ranks a few times, and changes them once more."""
    shape = Shape(draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 24)))
    layout = first_layout(shape, draw(st.integers(1, 8)))
    some = st.sets(st.integers(0, 9), min_size=1, max_size=8)
    for ranks in draw(st.lists(some, max_size=3)):
        layout = next_layout(layout, ranks)
    requests = [
        Held(number, draw(st.sampled_from(layout.ranks)), blocks, draw(st.integers(0, blocks)))
        for number, blocks in enumerate(draw(st.lists(st.integers(0, 40), max_size=6)))
    ]
    return layout, next_layout(layout, draw(some)), requests


@settings(max_examples=40, deadline=None)
@given(losses(), st.randoms(use_true_random=False))
def test_nothing_is_missing_afterwards_and_only_what_is_missing_is_read_once(
    case: tuple[Layout, Layout, list[Held]], random: object
) -> None:
    before, after, requests = case
    owners = {held.request: random.choice(after.ranks) for held in requests}  # type: ignore[attr-defined]
    made = plan(before, after, requests, owners, SIZES)
    stay = set(before.ranks) & set(after.ranks)
    have = perform(world(before, requests), made, stay)
    assert_whole(have, made, owners)
    for held in requests:
        # Nothing is given up but what neither a rank nor the shelf has.
        assert made.resume[held.request] >= min(held.blocks, held.on_shelf)
        if before.ranks == after.ranks:
            assert made.resume[held.request] == held.blocks


def owner_of(router: Router, request: int) -> int:
    owner = router.owner(request)
    assert owner is not None
    return owner


LLAMA_70B = Shape(80, 8, 112)


@pytest.mark.parametrize("lost", [{3}, {0, 7}, {1, 4, 6}])
def test_survivors_read_evenly(lost: set[int]) -> None:
    before = first_layout(LLAMA_70B, 8)
    after = next_layout(before, set(before.ranks) - lost)
    router = Router(before.ranks)
    lengths = [3000 + 1700 * (number * number % 11) for number in range(60)]
    for number, tokens in enumerate(lengths):
        router.submit(number, tokens, tokens)
    held = [
        Held(number, owner_of(router, number), tokens // 16, tokens // 16 - 2)
        for number, tokens in enumerate(lengths)
    ]
    router.change(after.ranks)
    owners = {each.request: owner_of(router, each.request) for each in held}
    made = plan(before, after, held, owners, SIZES)
    read = made.read_bytes(SIZES)
    assert max(read.values()) <= 1.05 * sum(read.values()) / len(read)
    # A loss asks for no KV but what the lost ranks had.
    blocks = sum(each.on_shelf for each in held) * LLAMA_70B.layers * len(lost)
    assert sum(each.blocks * len(each.planes) for each in made.kv_reads) == blocks
    lost_shards = sum(len(before.shards_of(rank, layer)) for rank in lost for layer in range(80))
    assert len(made.shard_reads) == lost_shards


def test_a_rank_that_returns_reads_nothing() -> None:
    whole = first_layout(LLAMA_70B, 8)
    before = next_layout(whole, range(7))
    held = [Held(number, number % 7, 64, 60) for number in range(30)]
    owners = {number: number % 7 for number in range(30)}
    made = plan(before, next_layout(before, range(8)), held, owners, SIZES)
    assert (made.kv_reads, made.head_reads, made.shard_reads) == ((), (), ())
    assert set(made.resume.values()) == {64}  # nothing of it waits for the shelf
    assert {sent.target for sent in made.kv_sends} == {7}


def test_a_rank_and_its_shelf_at_once_are_computed_again() -> None:
    before = first_layout(Shape(4, 8, 8), 8)
    made = plan(before, next_layout(before, range(7)), [Held(0, 7, 10, 0)], {0: 2}, SIZES)
    assert made.resume == {0: 0}
    assert (made.kv_reads, made.kv_sends) == ((), ())


def test_the_prediction_is_the_slowest_reader_and_the_busiest_link() -> None:
    before = first_layout(Shape(1, 2, 2), 2)
    made = plan(before, next_layout(before, [0]), [Held(0, 0, 3, 3)], {0: 0}, SIZES)
    read = 3 * SIZES.block + SIZES.head + SIZES.shard
    assert made.read_bytes(SIZES) == {0: read}
    assert made.seconds(SIZES, Bandwidth(1e9, 1e10)) == pytest.approx(read / 1e9)


def test_an_owner_that_is_gone_is_refused() -> None:
    before = first_layout(Shape(1, 2, 2), 2)
    with pytest.raises(ValueError, match=r"requests \[5\] have no owner"):
        plan(before, next_layout(before, [0]), [Held(5, 1, 3, 3)], {5: 1}, SIZES)
