"""GhostServe's rules: an acknowledged chunk survives every pattern of as many losses as it has parities, whatever the
links did; an encoder holds the parities and one shard; the ledger claims nothing that was not acknowledged."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.ids import Member
from dataplane.core.encoder import (
    FETCH_LIMIT_S,
    OPEN_LIMIT_S,
    Acknowledge,
    Add,
    Cancel,
    ChunkEncoder,
    Drop,
    Effect,
    Fetch,
    Open,
    Refuse,
    Shape,
)
from dataplane.core.parity import Chunk, Order, ParityLedger, encoder_of
from kernels.coding.codes import Code, make_code

CODES = [("xor", 1), ("rdp", 2), ("rs", 1), ("rs", 2), ("rs", 3)]


def members(prefix: str, count: int) -> list[Member]:
    return [Member(f"{prefix}{i}", "a") for i in range(count)]


@dataclass
class Shelf:
    """Performs an encoder's effects with real bytes, over links that lose, repeat and reorder. `now` counts calls."""

    code: Code
    encoder: ChunkEncoder
    shard_bytes: list[int]
    numbers: random.Random
    parities: dict[Chunk, list[bytearray]] = field(default_factory=dict)
    acknowledged: set[Chunk] = field(default_factory=set)
    refused: list[Chunk] = field(default_factory=list)
    links: list[tuple[str, Chunk, int]] = field(default_factory=list)
    expected: Fetch | None = None  # whose bytes there is a buffer for
    now: float = 0.0

    def shard(self, chunk: Chunk, stage: int) -> bytes:
        """What the stage has of this version of the chunk."""
        return random.Random(repr((chunk, stage))).randbytes(self.shard_bytes[stage])

    @property
    def shape(self) -> Shape:
        return Shape(self.code.data, self.code.parity * self.code.parity_bytes(max(self.shard_bytes)))

    def offer(self, chunk: Chunk, stage: int) -> None:
        self.perform(self.encoder.offered(chunk, stage, self.shape, self.now))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Open(chunk, size):
                    assert chunk not in self.parities
                    each = size // self.code.parity
                    self.parities[chunk] = [bytearray(each) for _ in range(self.code.parity)]
                case Fetch(chunk, stage):
                    assert self.expected is None, "one shard at a time"
                    self.expected = effect
                    self.links.append(("shard", chunk, stage))
                case Cancel(chunk, stage):
                    assert self.expected == Fetch(chunk, stage)
                    self.expected = None
                case Add(chunk, stage):
                    self.code.update(self.parities[chunk], stage, self.shard(chunk, stage))
                case Acknowledge(chunk):
                    self.acknowledged.add(chunk)
                case Refuse(chunk):
                    self.refused.append(chunk)
                case Drop(chunk):
                    del self.parities[chunk]
                    self.acknowledged.discard(chunk)
        held = sum(len(parity) for checks in self.parities.values() for parity in checks)
        assert held == self.encoder.used_bytes

    def deliver(self) -> None:
        """One message, any of them; sometimes it stays on the link and comes again."""
        kind, chunk, stage = self.links.pop(self.numbers.randrange(len(self.links)))
        if self.numbers.random() < 0.2:
            self.links.append((kind, chunk, stage))
        if kind == "offer":
            self.offer(chunk, stage)
            return
        if self.expected == Fetch(chunk, stage):
            self.expected = None
        self.perform(self.encoder.arrived(chunk, stage, self.now))

    def offer_all(self, chunk: Chunk, *stages: int) -> None:
        """Over links that do nothing wrong."""
        for stage in stages:
            self.offer(chunk, stage)
        while self.links:
            self.deliver()

    def restores_every_pattern(self, chunk: Chunk) -> bool:
        shards = [self.shard(chunk, stage) for stage in range(self.code.data)]
        for count in range(1, self.code.parity + 1):
            for lost in itertools.combinations(range(self.code.data), count):
                left = [bytearray(len(s)) if i in lost else bytearray(s) for i, s in enumerate(shards)]
                self.code.decode(left, self.parities[chunk], lost)
                if left != shards:
                    return False
        return True


def make_shelf(name: str, data: int, parity: int, numbers: random.Random, chunks: int = 8) -> Shelf:
    code = make_code(name, data, parity)
    shard_bytes = [numbers.choice([24, 40, 7]) for _ in range(data)]
    room = chunks * parity * code.parity_bytes(max(shard_bytes))
    return Shelf(code, ChunkEncoder(room), shard_bytes, numbers)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CODES), st.integers(1, 5), st.integers(0, 1 << 30))
def test_what_is_acknowledged_survives_every_pattern_of_losses(
    code: tuple[str, int], data: int, seed: int
) -> None:
    """Offers and shards come in any order, late and again; chunks are computed anew, requests end, fetches time
    out."""
    numbers = random.Random(seed)
    shelf = make_shelf(code[0], data, code[1], numbers, chunks=3)
    newest: dict[tuple[int, int], int] = {}
    for _ in range(120):
        shelf.now += numbers.choice([0.01, 0.01, 0.01, FETCH_LIMIT_S])
        event = numbers.random()
        if event < 0.5:
            rid, index = numbers.randrange(2), numbers.randrange(3)
            newest.setdefault((rid, index), 0)
            if event < 0.03:
                newest[rid, index] += 1
            chunk = Chunk(rid, index, newest[rid, index])
            shelf.links.append(("offer", chunk, numbers.randrange(data)))
        elif event < 0.52:
            shelf.perform(shelf.encoder.freed([numbers.randrange(2)], shelf.now))
        elif event < 0.56:
            shelf.perform(shelf.encoder.expire(shelf.now))
        elif shelf.links:
            shelf.deliver()
        assert shelf.encoder.used_bytes <= 3 * shelf.shape.parity_bytes
        assert shelf.acknowledged <= shelf.parities.keys()
    assert shelf.acknowledged <= set(shelf.encoder.complete())
    for chunk in shelf.acknowledged:
        assert shelf.restores_every_pattern(chunk)


@pytest.mark.parametrize(("name", "parity"), CODES)
def test_a_chunk_that_lacks_one_shard_is_not_acknowledged_and_would_restore_nothing(
    name: str, parity: int
) -> None:
    shelf = make_shelf(name, 4, parity, random.Random(1))
    chunk = Chunk(7, 0)
    shelf.offer_all(chunk, 2, 0, 3)
    assert not shelf.acknowledged
    assert not shelf.restores_every_pattern(chunk)
    shelf.offer_all(chunk, 1)
    assert shelf.acknowledged == {chunk}
    assert shelf.restores_every_pattern(chunk)


def test_an_encoder_without_room_refuses_and_goes_on() -> None:
    shelf = make_shelf("rs", 2, 1, random.Random(2), chunks=1)
    first, second = Chunk(1, 0), Chunk(1, 1)
    shelf.offer(first, 0)
    shelf.offer(second, 0)
    shelf.offer_all(first, 1)
    assert (shelf.acknowledged, shelf.refused) == ({first}, [second])
    shelf.perform(shelf.encoder.freed([1], shelf.now))
    assert shelf.encoder.used_bytes == 0
    shelf.offer_all(second, 0, 1)
    assert shelf.acknowledged == {second}
    too_large = Shape(2, 2 * shelf.shape.parity_bytes)
    for chunk, stage, shape in ((Chunk(2, 0), 0, too_large), (Chunk(2, 0), 2, shelf.shape)):
        assert shelf.encoder.offered(chunk, stage, shape, 0.0) == [Refuse(chunk)]


def test_a_silent_stage_holds_nobody_up_for_long() -> None:
    shelf = make_shelf("xor", 2, 1, random.Random(3))
    silent, other = Chunk(1, 0), Chunk(2, 0)
    shelf.offer(silent, 0)
    shelf.links.clear()  # its shard never comes
    shelf.offer(other, 0)
    shelf.offer(other, 1)
    assert not shelf.links
    shelf.now = FETCH_LIMIT_S
    shelf.perform(shelf.encoder.expire(shelf.now))
    while shelf.links:
        shelf.deliver()
    assert shelf.acknowledged == {other}
    shelf.now = OPEN_LIMIT_S
    shelf.perform(shelf.encoder.expire(shelf.now))
    assert shelf.refused == [silent]
    assert shelf.parities.keys() == {other}


def test_shards_of_two_versions_are_never_added_up() -> None:
    shelf = make_shelf("rs", 3, 2, random.Random(4))
    old, new = Chunk(1, 0, 0), Chunk(1, 0, 1)
    shelf.offer_all(old, 0, 1)
    shelf.offer_all(new, 2)
    shelf.offer_all(old, 2)  # late
    shelf.offer_all(new, 0)
    assert not shelf.acknowledged
    shelf.offer_all(new, 1)
    assert shelf.acknowledged == {new}
    assert shelf.restores_every_pattern(new)


def test_a_lost_acknowledgement_is_said_again() -> None:
    shelf = make_shelf("xor", 2, 1, random.Random(5))
    chunk = Chunk(1, 0)
    shelf.offer_all(chunk, 0, 1)
    assert shelf.encoder.offered(chunk, 0, shelf.shape, 1.0) == [Acknowledge(chunk)]


def test_encoders_rotate_chunk_by_chunk_outside_the_pipeline() -> None:
    stages, outside = members("s", 4), members("w", 3)
    ledger = ParityLedger(stages, 1, 16)
    orders = ledger.grew(5, 16 * 30 + 15, [*stages, *outside])
    assert [order.chunk for order in orders] == [Chunk(5, i) for i in range(30)]
    assert all(order.encoder == outside[(5 + i) % 3] for i, order in enumerate(orders))
    assert {encoder_of(rid, 0, outside) for rid in range(3)} == set(outside)
    assert ledger.grew(5, 16 * 30 + 15, [*stages, *outside]) == []
    assert ledger.grew(6, 64, stages) == []
    assert ledger.lag_chunks(6, 64) == 4
    assert encoder_of(5, 0, []) is None


@pytest.mark.parametrize("parity", [1, 2, 3])
def test_what_can_be_rebuilt_after_every_pattern_of_losses(parity: int) -> None:
    """Exactly the acknowledged chunks whose encoder is left, if no more stages are lost than there are parities."""
    stages, outside = members("s", 4), members("w", 3)
    ledger, nodes = ParityLedger(stages, parity, 16), [*stages, *outside]
    orders = ledger.grew(0, 16 * 7, nodes)
    answered = [order for order in orders if order.chunk.index != 3]
    for order in answered:
        ledger.acknowledged(order.chunk, order.encoder)
    assert ledger.lag_chunks(0, 16 * 7) == 1
    for count in range(len(nodes) + 1):
        for lost in itertools.combinations(nodes, count):
            found = {p for begin, end in ledger.rebuildable(0, lost) for p in range(begin, end)}
            expected: set[int] = set()
            if sum(stage in lost for stage in stages) <= parity:
                for order in answered:
                    if order.encoder not in lost:
                        expected |= set(range(order.chunk.index * 16, order.chunk.index * 16 + 16))
            assert found == expected, lost
    assert ledger.rebuildable(0, stages[:1]) == [(0, 48), (64, 112)]


def test_the_ledger_forgets_what_is_computed_again_and_what_an_encoder_took_along() -> None:
    stages, outside = members("s", 2), members("w", 2)
    ledger, nodes = ParityLedger(stages, 1, 10), [*stages, *outside]

    def answer(orders: list[Order]) -> None:
        for order in orders:
            ledger.acknowledged(order.chunk, order.encoder)

    first = ledger.grew(0, 40, nodes)
    answer(first)
    ledger.rewrote(0, 25)
    assert ledger.rebuildable(0, []) == [(0, 20)]
    again = ledger.grew(0, 40, nodes)
    assert [order.chunk for order in again] == [Chunk(0, 2, 1), Chunk(0, 3, 1)]
    answer(first)  # late answers, about what is no longer
    assert ledger.rebuildable(0, []) == [(0, 20)]
    answer(again)
    assert ledger.rebuildable(0, []) == [(0, 40)]
    moved = ledger.grew(0, 40, [*stages, outside[1]])
    assert [(order.chunk.index, order.encoder) for order in moved] == [(0, outside[1]), (2, outside[1])]
    ledger.acknowledged(moved[0].chunk, outside[0])  # of one that no longer counts
    assert ledger.rebuildable(0, []) == [(10, 20), (30, 40)]
    ledger.refused(moved[0].chunk, outside[1])
    assert ledger.grew(0, 40, [*stages, outside[1]]) == []
    assert ledger.room(outside[1]) == [moved[0]]
    answer(moved)
    assert ledger.rebuildable(0, [outside[0]]) == [(0, 40)]
    ledger.freed(0)
    assert ledger.rebuildable(0, []) == []


def test_one_who_held_a_chunk_and_drops_it_no_longer_counts() -> None:
    ledger = ParityLedger(members("s", 2), 1, 10)
    (order,) = ledger.grew(0, 10, members("w", 1))
    ledger.acknowledged(order.chunk, order.encoder)
    ledger.refused(order.chunk, order.encoder)
    assert ledger.rebuildable(0, []) == []
