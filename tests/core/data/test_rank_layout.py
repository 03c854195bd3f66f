"""Heads, shards and planes of a stage's ranks: even for any number of ranks, and kept by those that stay."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.ranks.layout import (
    DATA_PARALLEL,
    NO_PLANE,
    HeadMove,
    Layout,
    Shape,
    changes,
    first_layout,
    next_layout,
)

SHAPES = st.builds(Shape, st.integers(1, 12), st.integers(1, 16), st.integers(1, 60))
CHAINS = st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=10), min_size=1, max_size=6)


def check(layout: Layout) -> None:
    """What holds for every layout, however it came about."""
    shape, count = layout.shape, len(layout.ranks)
    for layer in range(shape.layers):
        for rank in layout.ranks:
            assert len(layout.heads_of(rank, layer)) == layout.heads_per_rank == shape.heads // count
            assert len(layout.shards_of(rank, layer)) in (shape.shards // count, -(-shape.shards // count))
        assert len(layout.data_parallel(layer)) == layout.heads_data_parallel == shape.heads % count
        assert set(layout.heads[layer]) <= {DATA_PARALLEL, *layout.ranks}
        assert set(layout.shards[layer]) <= set(layout.ranks)
    for rank in layout.ranks:
        planes = layout.planes_of(rank)
        for layer, head in itertools.product(range(shape.layers), range(shape.heads)):
            has = layout.heads[layer][head] in (rank, DATA_PARALLEL)
            assert (planes[layer][head] != NO_PLANE) == has
        used = [plane for row in planes for plane in row if plane != NO_PLANE]
        assert len(set(used)) == len(used)
        assert layout.planes_needed(rank) == 1 + max(used, default=-1)


@given(SHAPES, st.integers(1, 16))
def test_first_layout_is_even_and_dense(shape: Shape, ranks: int) -> None:
    layout = first_layout(shape, ranks)
    check(layout)
    each = shape.layers * (layout.heads_per_rank + layout.heads_data_parallel)
    assert all(layout.planes_needed(rank) == each for rank in layout.ranks)


@given(SHAPES, CHAINS)
def test_any_chain_of_ranks(shape: Shape, chain: list[set[int]]) -> None:
    """Ranks go and come, several at once: the layout stays even, planes stay where they are, and the changes are what
    leads from one layout to the next."""
    layout = first_layout(shape, 4)
    for ranks in chain:
        after = next_layout(layout, ranks)
        check(after)
        moves = changes(layout, after)
        heads, shards = [list(row) for row in layout.heads], [list(row) for row in layout.shards]
        for head in moves.heads:
            assert heads[head.layer][head.head] == head.source
            heads[head.layer][head.head] = head.target
        for shard in moves.shards:
            assert shards[shard.layer][shard.shard] == shard.source
            shards[shard.layer][shard.shard] = shard.target
        assert heads == [list(row) for row in after.heads]
        assert shards == [list(row) for row in after.shards]
        for rank in set(layout.ranks) & set(after.ranks):
            for old, new in zip(layout.planes_of(rank), after.planes_of(rank), strict=True):
                assert all(a == b for a, b in zip(old, new, strict=True) if NO_PLANE not in (a, b))
            assert all(
                layout.planes_of(rank)[layer][head] == NO_PLANE for layer, head in moves.head_weights[rank]
            )
        for rank in set(after.ranks) - set(layout.ranks):
            planes = after.planes_of(rank)
            assert all(planes[layer][head] != NO_PLANE for layer, head in moves.head_weights[rank])
            assert len(moves.head_weights[rank]) == sum(plane != NO_PLANE for row in planes for plane in row)
        layout = after


@given(SHAPES, st.integers(2, 8), st.data())
def test_survivors_keep_theirs(shape: Shape, ranks: int, data: st.DataObject) -> None:
    before = first_layout(shape, ranks)
    gone = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1))
    after = next_layout(before, set(before.ranks) - gone)
    moves = changes(before, after)
    assert all(move.source in gone or move.source == DATA_PARALLEL for move in moves.heads)
    assert all(move.source in gone for move in moves.shards)
    for layer in range(shape.layers):  # no head takes another's place among the data-parallel ones
        kinds = {
            (m.source == DATA_PARALLEL, m.target == DATA_PARALLEL) for m in moves.heads if m.layer == layer
        }
        assert not kinds >= {(False, True), (True, False)}


def test_the_same_ranks_change_nothing() -> None:
    layout = next_layout(first_layout(Shape(7, 8, 48), 8), [0, 1, 2, 4, 5, 6, 7])
    again = next_layout(layout, layout.ranks)
    assert again == layout
    assert changes(layout, again).heads == () == changes(layout, again).shards


def test_eight_to_five_and_back() -> None:
    """Of eight heads on eight ranks the head of a rank that is lost becomes data-parallel, and nothing else moves."""
    layouts = [first_layout(Shape(32, 8, 48), 8)]
    for ranks in ([0, 1, 2, 4, 5, 6, 7], [0, 1, 2, 4, 5, 7], [1, 2, 4, 5, 7], range(8)):
        layouts.append(next_layout(layouts[-1], ranks))
    eight, seven, six, five, back = layouts
    lost = tuple(HeadMove(layer, eight.heads_of(3, layer)[0], 3, DATA_PARALLEL) for layer in range(32))
    assert changes(eight, seven).heads == lost
    assert [len(changes(a, b).heads) for a, b in itertools.pairwise(layouts)] == [32, 32, 32, 3 * 32]
    assert [len(changes(a, b).shards) // 32 for a, b in itertools.pairwise(layouts)] == [6, 6, 8, 18]
    assert all(move.source == DATA_PARALLEL for move in changes(five, back).heads)
    assert (six.heads_data_parallel, back.heads_data_parallel) == (2, 0)


@pytest.mark.parametrize("shape", [Shape(32, 8, 48), Shape(80, 8, 48), Shape(20, 6, 48)])
def test_kv_and_ffn_differ_by_at_most_five_percent(shape: Shape) -> None:
    """KV of requests that are owned evenly, and the shards of all layers, also after ranks have gone and come."""
    layouts = [first_layout(shape, ranks) for ranks in range(1, 9)]
    layout = layouts[-1]
    for ranks in (
        [0, 1, 2, 4, 5, 6, 7],
        [0, 1, 2, 4, 5, 7],
        [1, 2, 4, 5, 7],
        [1, 2, 5, 7],
        range(8),
        [0, 7, 9],
    ):
        layouts.append(layout := next_layout(layout, ranks))
    for layout in layouts:
        count = len(layout.ranks)
        kv = [
            sum(
                1.0 if holder == rank else 1.0 / count if holder == DATA_PARALLEL else 0.0
                for row in layout.heads
                for holder in row
            )
            for rank in layout.ranks
        ]
        ffn = [sum(holder == rank for row in layout.shards for holder in row) for rank in layout.ranks]
        assert max(kv) / min(kv) <= 1.05, layout.ranks
        assert max(ffn) / (sum(ffn) / count) <= 1.05, layout.ranks


def test_heads_rotate() -> None:
    """In turn every head is data-parallel, and every rank has every head."""
    layout = first_layout(Shape(40, 8, 48), 5)
    assert {layout.data_parallel(layer) for layer in range(8)} >= {(3, 4, 5), (5, 6, 7), (0, 1, 7)}
    for rank in layout.ranks:
        assert {head for layer in range(40) for head in layout.heads_of(rank, layer)} == set(range(8))


@pytest.mark.parametrize("ranks", [[], [1, 1], [-1, 2]])
def test_ranks_that_cannot_be(ranks: list[int]) -> None:
    with pytest.raises(ValueError, match="one or more, all different"):
        next_layout(first_layout(Shape(2, 4, 8), 2), ranks)


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 or more of each"):
        Shape(2, 0, 8)
    with pytest.raises(ValueError, match="does not become"):
        changes(first_layout(Shape(2, 4, 8), 2), first_layout(Shape(2, 4, 9), 2))
