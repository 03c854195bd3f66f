"""Which of a stage's ranks computes which KV heads and which shards of the FFN, and what moves when ranks go or come.

With H KV heads, n ranks have H // n heads of a layer each, for all requests (tensor-parallel). The H % n others are
with every rank, for those requests that it owns (data-parallel). So no rank has more heads than another, and with
requests owned evenly none has more KV. The FFN is cut into shards whose number depends on the model alone; they are
dealt out as evenly as whole shards can be. Both rotate layer by layer, so that a rank with one shard more in one layer
has one less in another.

Ranks have identities, not numbers in a row: those that are left when one is gone keep theirs, and with them all
heads, planes and shards that the new number allows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DATA_PARALLEL = -1  # in place of a rank: every rank, each for the requests that it owns
NO_PLANE = -1

Table = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is dealt out in each of the stage's layers: KV heads, and shards of the FFN."""

    layers: int
    heads: int
    shards: int

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.shards) < 1:
            raise ValueError(
                f"{self.layers} layers of {self.heads} heads and {self.shards} shards: 1 or more of each"
            )


@dataclass(frozen=True, slots=True)
class Layout:
    """ranks: identities, ascending. heads [layer][head]: the rank that has it for all requests, or DATA_PARALLEL.
    shards [layer][shard]: a rank. planes[i] [layer][head], of ranks[i]: where in its pool it keeps K and V of the
    head in that layer, or NO_PLANE."""

    shape: Shape
    ranks: tuple[int, ...]
    heads: Table
    shards: Table
    planes: tuple[Table, ...]

    @property
    def heads_per_rank(self) -> int:
        """Tensor-parallel ones of a layer."""
        return self.shape.heads // len(self.ranks)

    @property
    def heads_data_parallel(self) -> int:
        """Of a layer."""
        return self.shape.heads % len(self.ranks)

    def heads_of(self, rank: int, layer: int) -> tuple[int, ...]:
        """KV heads that the rank computes for all requests, ascending."""
        return tuple(head for head, holder in enumerate(self.heads[layer]) if holder == rank)

    def data_parallel(self, layer: int) -> tuple[int, ...]:
        """KV heads that every rank computes for the requests that it owns, ascending."""
        return self.heads_of(DATA_PARALLEL, layer)

    def shards_of(self, rank: int, layer: int) -> tuple[int, ...]:
        """Shards of the FFN, ascending."""
        return tuple(shard for shard, holder in enumerate(self.shards[layer]) if holder == rank)

    def planes_of(self, rank: int) -> Table:
        """[layer][head]: the plane in the rank's pool or NO_PLANE. Raises ValueError for a rank that is not one."""
        return self.planes[self.ranks.index(rank)]

    def planes_needed(self, rank: int) -> int:
        """Planes that the rank's pool must have: one more than the highest that is used."""
        return 1 + max((max(row) for row in self.planes_of(rank)), default=NO_PLANE)


@dataclass(frozen=True, slots=True)
class HeadMove:
    """K and V of a head of a layer go to `target`: a rank, for all requests, or DATA_PARALLEL: each request's to its
    owner. They were with `source`: a rank, which may be gone, or DATA_PARALLEL: each request's with its last owner."""

    layer: int
    head: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ShardMove:
    """The weights of a shard go from a rank, which may be gone, to another."""

    layer: int
    shard: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Changes:
    """From one layout to another. `heads` has only heads that another rank computes than before, or another kind: the
    data-parallel heads of a request that gets another owner move as well, which is for who owns requests to say.
    head_weights [rank]: (layer, head) whose weights it computes with now and did not before."""

    heads: tuple[HeadMove, ...]
    shards: tuple[ShardMove, ...]
    head_weights: dict[int, tuple[tuple[int, int], ...]]


def first_layout(shape: Shape, ranks: int) -> Layout:
    """Of ranks 0 to `ranks` - 1, which have nothing yet. Raises ValueError for less than one."""
    return deal(shape, range(ranks), None)


def next_layout(layout: Layout, ranks: Iterable[int]) -> Layout:
    """The same stage on other ranks. Those that stay keep what they have, as far as the others have as much; heads of
    ranks that are gone go first to ranks that lack one. A rank that has lost its memory and comes back is left out of
    one layout before it is in the next. Raises ValueError if none is left, or if one is named twice or is negative."""
    return deal(layout.shape, ranks, layout)


def changes(before: Layout, after: Layout) -> Changes:
    """What has to be brought where. Raises ValueError for layouts of different shapes."""
    if before.shape != after.shape:
        raise ValueError(f"{before.shape} does not become {after.shape}")
    heads, shards = [], []
    for layer in range(after.shape.layers):
        for head, (source, target) in enumerate(zip(before.heads[layer], after.heads[layer], strict=True)):
            if source != target:
                heads.append(HeadMove(layer, head, source, target))
        for shard, (source, target) in enumerate(zip(before.shards[layer], after.shards[layer], strict=True)):
            if source != target:
                shards.append(ShardMove(layer, shard, source, target))
    return Changes(
        tuple(heads), tuple(shards), {rank: _new_heads(before, after, rank) for rank in after.ranks}
    )


def deal(shape: Shape, ranks: Iterable[int], before: Layout | None) -> Layout:
    """A layout for these ranks that keeps what it can of the one before."""
    order = tuple(sorted(ranks))
    if not order or order[0] < 0 or len(set(order)) != len(order):
        raise ValueError(f"ranks {order}: one or more, all different and not negative")
    heads, shards = [], []
    for layer in range(shape.layers):
        turned = tuple(order[(i + layer) % len(order)] for i in range(len(order)))
        held = {rank: [] if before is None else list(before.heads_of(rank, layer)) for rank in order}
        old = () if before is None else before.data_parallel(layer)
        heads.append(_deal_heads(shape.heads, turned, held, old, layer))
        held = {rank: [] if before is None else list(before.shards_of(rank, layer)) for rank in order}
        shards.append(_deal_shards(shape.shards, turned, held))
    planes = tuple(
        _planes(rank, tuple(heads), before.planes_of(rank) if before and rank in before.ranks else None)
        for rank in order
    )
    return Layout(shape, order, tuple(heads), tuple(shards), planes)


def _deal_heads(
    heads: int, ranks: tuple[int, ...], held: dict[int, list[int]], data_parallel: tuple[int, ...], layer: int
) -> tuple[int, ...]:
    """Of one layer. Heads that were data-parallel are the last to get a rank: leaving them moves nothing."""
    each = heads // len(ranks)
    holder = [DATA_PARALLEL] * heads
    for rank in ranks:
        for head in held[rank][:each]:
            holder[head] = rank
    turned = [(head + layer) % heads for head in range(heads)]
    free = [head for head in turned if holder[head] == DATA_PARALLEL and head not in data_parallel]
    free += [head for head in turned if head in data_parallel]
    at = 0
    for rank in ranks:
        for head in free[at : at + max(0, each - len(held[rank]))]:
            holder[head] = rank
            at += 1
    return tuple(holder)


def _deal_shards(shards: int, ranks: tuple[int, ...], held: dict[int, list[int]]) -> tuple[int, ...]:
    """Of one layer. One more than others have: ranks that have it already, then those that come first in this layer."""
    each, more = divmod(shards, len(ranks))
    places = {rank: i for i, rank in enumerate(ranks)}
    order = sorted(ranks, key=lambda rank: (len(held[rank]) <= each, places[rank]))
    quota = {rank: each + (i < more) for i, rank in enumerate(order)}
    holder = [DATA_PARALLEL] * shards
    for rank in ranks:
        for shard in held[rank][: quota[rank]]:
            holder[shard] = rank
    free = [shard for shard, rank in enumerate(holder) if rank == DATA_PARALLEL]
    at = 0
    for rank in ranks:
        for shard in free[at : at + max(0, quota[rank] - len(held[rank]))]:
            holder[shard] = rank
            at += 1
    return tuple(holder)


def _planes(rank: int, heads: Table, before: Table | None) -> Table:
    """A head that the rank had keeps its plane, whichever its kind; others take the lowest planes that are free."""
    mine = [[holder in (rank, DATA_PARALLEL) for holder in row] for row in heads]
    kept = [
        [plane if wanted else NO_PLANE for wanted, plane in zip(row, old, strict=True)]
        for row, old in zip(mine, before or [[NO_PLANE] * len(row) for row in heads], strict=True)
    ]
    taken = {plane for row in kept for plane in row}
    free = (plane for plane in range(sum(map(sum, mine))) if plane not in taken)
    return tuple(
        tuple(
            next(free) if wanted and plane == NO_PLANE else plane
            for wanted, plane in zip(row, old, strict=True)
        )
        for row, old in zip(mine, kept, strict=True)
    )


def _new_heads(before: Layout, after: Layout, rank: int) -> tuple[tuple[int, int], ...]:
    with_it = (rank, DATA_PARALLEL) if rank in before.ranks else ()
    return tuple(
        (layer, head)
        for layer, row in enumerate(after.heads)
        for head, holder in enumerate(row)
        if holder in (rank, DATA_PARALLEL) and before.heads[layer][head] not in with_it
    )
