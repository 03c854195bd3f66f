"""Watermarks: what counts as copied is what the holder said, never more."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from controlplane.contract.ids import Member
from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import KvStore
from dataplane.core.messages import (
    Block,
    Fence,
    KvAckMeta,
    KvDropMeta,
    KvMeta,
    KvQueryMeta,
    Meta,
    Place,
    RejoinMeta,
    pack_rows,
)
from dataplane.core.prefix import NAME_BYTES
from dataplane.core.replication import (
    ANSWER_LIMIT_S,
    COPY_EVERY_S,
    REFUSED_PAUSE_MAX_S,
    REFUSED_PAUSE_S,
    WINDOW_BLOCKS,
    WINDOW_BYTES,
    Copy,
    ReplicaSource,
)
from dataplane.core.stage import Stage
from dataplane.kvcache import KVCache
from dataplane.replica import Replicator
from dataplane.transport.frames import Buffer
from tests.core.data.pipeline import done, here

HOLDER = Member("n4", "a")


def source(tokens: dict[int, int]) -> ReplicaSource:
    made = ReplicaSource(HOLDER, 4, lambda rid: tokens.get(rid, 0))
    assert made.must_ask(0.0)
    made.acknowledged((), whole=True, refused=False, now=0.0)
    for rid in tokens:
        made.wrote([rid])
    return made


def test_nothing_is_sent_before_the_holder_has_said_what_it_has() -> None:
    made = ReplicaSource(HOLDER, 4, lambda _: 8)
    made.wrote([1])
    assert made.take(0.0) == []
    assert made.must_ask(0.0)
    assert not made.must_ask(0.1)
    assert made.must_ask(ANSWER_LIMIT_S)


def test_whole_blocks_only() -> None:
    tokens = {1: 6}
    made = source(tokens)
    assert made.take(0.0) == [Copy(1, 0, 4)]
    assert made.lag_tokens([1]) == 4
    made.acknowledged(((1, 4),), whole=False, refused=False, now=0.1)
    assert made.lag_tokens([1]) == 0
    made.wrote([1])
    assert made.take(0.1) == []
    tokens[1] = 9
    assert made.lag_tokens([1]) == 4
    made.wrote([1])
    assert made.take(0.2) == [Copy(1, 1, 8)]


def test_how_long_the_rest_takes_is_told_from_what_was_acknowledged() -> None:
    tokens = {1: 400}
    made = source(tokens)
    made.take(0.0)
    assert made.behind_s(made.lag_tokens([1])) > 60.0  # nothing has been seen yet
    made.acknowledged(((1, 40),), whole=False, refused=False, now=0.2)
    made.acknowledged(((1, 120),), whole=False, refused=False, now=0.6)
    assert made.behind_s(280) == pytest.approx(280 / (120 / 0.6))
    assert made.behind_s(0) == 0.0
    made.acknowledged(((1, 130),), whole=False, refused=False, now=1.6)  # slower now
    assert made.behind_s(270) == pytest.approx(27.0)


def test_a_part_filled_block_of_a_holder_that_served_before_is_sent_again_when_it_has_grown() -> None:
    tokens = {1: 6}
    made = ReplicaSource(HOLDER, 4, tokens.get)  # type: ignore[arg-type]
    made.must_ask(0.0)
    made.acknowledged(((1, 6),), whole=True, refused=False, now=0.1)
    assert made.take(0.1) == []
    tokens[1] = 8
    made.wrote([1])
    assert made.take(0.2) == [Copy(1, 1, 8)]


def test_a_holder_that_kept_its_copies_gets_only_what_it_lacks() -> None:
    made = ReplicaSource(HOLDER, 4, {1: 16, 2: 8}.get)  # type: ignore[arg-type]
    made.must_ask(0.0)
    assert made.acknowledged(((1, 12),), whole=True, refused=False, now=0.0) == []
    made.wrote([1])
    made.wrote([2])
    assert made.take(0.0) == [Copy(1, 3, 16), Copy(2, 0, 4), Copy(2, 1, 8)]


def test_copies_of_requests_that_are_gone_are_given_back() -> None:
    made = ReplicaSource(HOLDER, 4, lambda rid: 8 if rid == 1 else 0)
    made.must_ask(0.0)
    assert made.acknowledged(((1, 4), (2, 8)), whole=True, refused=False, now=0.0) == [2]


def test_an_order_to_drop_that_was_lost_is_given_again() -> None:
    tokens = {1: 8, 2: 8}
    made = source(tokens)
    made.take(0.0)
    made.acknowledged(((1, 8), (2, 8)), whole=False, refused=False, now=0.1)
    assert not made.must_ask(50.0)
    del tokens[1]
    made.freed([1])
    # Was on its way, as the order is.
    assert made.acknowledged(((1, 8),), whole=False, refused=False, now=50.1) == []
    assert not made.must_ask(50.0 + ANSWER_LIMIT_S)
    assert made.must_ask(50.1 + ANSWER_LIMIT_S), "whatever else it acknowledges"
    assert made.acknowledged(((1, 8), (2, 8)), whole=True, refused=False, now=52.2) == [1]
    made.freed([1])
    made.acknowledged(((1, 0),), whole=False, refused=False, now=52.3)
    assert not made.must_ask(99.0)


def test_a_request_that_is_back_needs_no_order_to_drop() -> None:
    made = source({1: 8})
    made.take(0.0)
    made.freed([1])  # preempted
    made.wrote([1])
    assert len(made.take(0.2)) == 2
    made.acknowledged(((1, 8),), whole=False, refused=False, now=0.3)
    assert not made.must_ask(99.0)


def test_a_holder_says_that_copies_are_gone() -> None:
    sent: list[Meta] = []

    def send(_member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append(meta)
        return True

    kv = KVCache(3, 1, 1, 4, 1, "float32")
    store = KvStore(3, 4, 4, 8)
    holder = Replicator(store, kv, here, send)
    data = bytes(kv.block_bytes)
    copy = KvMeta("p0", Fence(1), (Block(1, 0, 4, zlib.crc32(data)),))
    done(holder.store_copies(HOLDER, copy, memoryview(data)))
    holder.drop_copies(HOLDER, KvDropMeta("p0", Fence(1), (1, 2)))
    done(holder.pump(0.0))
    assert sent == [KvAckMeta("p0", Fence(1), ((1, 0), (2, 0)))]
    assert not store.copies.rows


@pytest.mark.parametrize("targets", [[], [HOLDER]], ids=["placed", "full"])
@pytest.mark.parametrize("how", ["ended", "made room"])
def test_a_copy_that_waited_to_be_taken_up_ends_elsewhere_too_when_nobody_has_claimed_it(
    targets: list[Member], how: str
) -> None:
    """The stage has moved here with its copies, and the holder of single requests has one of its predecessor's."""
    sent: list[Meta] = []

    def send(_member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append(meta)
        return True

    kv = KVCache(4, 1, 1, 4, 1, "float32")
    store = KvStore(4, 4, 4, 8)
    moved = Replicator(store, kv, here, send)
    data, fence, stage = bytes(kv.block_bytes), Fence(2), Stage("p0", 0, 2, 2, store)
    blocks = tuple(Block(rid, 0, 4, zlib.crc32(data)) for rid in (1, 2))
    done(moved.store_copies(Member("n1", "a"), KvMeta("p0", Fence(1), blocks), memoryview(data * 2)))
    moved.protect("p0", 2, targets, {"p2": HOLDER})
    done(moved.pump(0.0))
    moved.acknowledged(HOLDER, KvAckMeta("p0", fence, ((1, 4), (2, 4), (3, 4)), whole=True), 0.1)
    done(moved.pump(0.1))
    drops = [meta for meta in sent if isinstance(meta, KvDropMeta)]
    assert [drop.rids for drop in drops] == [(3,)], "the others may still be claimed"
    sent.clear()

    if how == "made room":
        store.copies.evict_row(("p0", 1))
        done(moved.pump(0.2))
        assert [meta.rids for meta in sent if isinstance(meta, KvDropMeta)] == [(1,)]
        sent.clear()
    moved.rejoin(stage, RejoinMeta("p0", fence, 0, (), complete=True, adopts=False))
    done(moved.pump(0.3))
    dropped = [rid for meta in sent if isinstance(meta, KvDropMeta) for rid in meta.rids]
    assert sorted(dropped) == ([1, 2] if how == "ended" else [2])
    moved.acknowledged(HOLDER, KvAckMeta("p0", fence, ((1, 0), (2, 0), (3, 0))), 0.4)
    sent.clear()
    done(moved.pump(50.0))
    assert not sent, "told once, and heard of"


def test_a_copy_that_waited_and_was_taken_up_is_not_dropped_elsewhere() -> None:
    sent: list[Meta] = []

    def send(_member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append(meta)
        return True

    kv = KVCache(4, 1, 1, 4, 1, "float32")
    store = KvStore(4, 4, 4, 8)
    moved = Replicator(store, kv, here, send)
    data, fence, stage, name = bytes(kv.block_bytes), Fence(2), Stage("p0", 0, 2, 2, store), b"n" * NAME_BYTES
    copies = KvMeta("p0", Fence(1), (Block(1, 0, 4, zlib.crc32(data), name),))
    done(moved.store_copies(Member("n1", "a"), copies, memoryview(data)))
    moved.protect("p0", 2, [], {"p2": HOLDER})
    done(moved.pump(0.0))
    moved.acknowledged(HOLDER, KvAckMeta("p0", fence, ((1, 4),), whole=True), 0.1)
    assert moved.rejoin(stage, RejoinMeta("p0", fence, 0, (1,), complete=True, names=(name,))).held == (
        (1, 4),
    )
    moved.place("p0", (Place(1, ("p2",)),))
    done(moved.pump(0.2))
    moved.acknowledged(HOLDER, KvAckMeta("p0", fence, ((1, 4),), whole=True), 0.3)
    done(moved.pump(0.4))
    assert not [meta for meta in sent if isinstance(meta, KvDropMeta | KvMeta)]
    assert moved.copied("p0") == [(1, "p2")]


def test_a_refused_block_is_tried_again_after_a_pause() -> None:
    made = source({1: 8})
    assert len(made.take(0.0)) == 2
    made.acknowledged(((1, 0),), whole=False, refused=True, now=0.1)
    assert made.take(0.2) == []
    assert made.take(0.1 + REFUSED_PAUSE_S)[0] == Copy(1, 0, 4)


def test_a_holder_that_refuses_is_asked_ever_less_often() -> None:
    """A pool that stays full costs a few messages a minute, not two a second for each request."""
    made = source({1: 8})
    tries = []
    now = 0.0
    while now < 600.0:
        if copies := made.take(now):
            tries.append((now, len(copies)))
            made.acknowledged(((1, 0),), whole=False, refused=True, now=now)
        now += 0.05
    pauses = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(tries)]
    assert len(tries) <= 20
    assert pauses[0] == pytest.approx(REFUSED_PAUSE_S, abs=0.06)
    assert pauses[-1] == pytest.approx(REFUSED_PAUSE_MAX_S, abs=0.06)
    assert [count for _, count in tries[2:]] == [1] * (len(tries) - 2)  # one block tells
    assert made.refusals == len(tries)
    made.room()
    assert made.take(now) == [Copy(1, 0, 4), Copy(1, 1, 8)]
    made.acknowledged(((1, 8),), whole=False, refused=False, now=now)
    made.acknowledged(((1, 0),), whole=False, refused=True, now=now)
    assert made.take(now + REFUSED_PAUSE_S), "what was stored since ends the count"


def test_a_holder_says_when_it_has_room_again() -> None:
    """The change for which its source waits: not a timer's, and not before there is any."""
    sent: list[tuple[Member, Meta]] = []

    def send(member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append((member, meta))
        return True

    kv = KVCache(4, 1, 1, 4, 1, "float32")
    store = KvStore(4, 4, 4, 8)
    holder = Replicator(store, kv, here, send)
    assert store.begin("p1", Rows(pack_rows([(7, 0, 12, True)]))) is not None
    assert store.begin("p1", Rows(pack_rows([(8, 0, 4, True)]))) is not None
    data = bytes(kv.block_bytes)
    copy = KvMeta("p0", Fence(1), (Block(1, 0, 4, zlib.crc32(data)),))
    done(holder.store_copies(HOLDER, copy, memoryview(data)))
    assert sent == [(HOLDER, KvAckMeta("p0", Fence(1), ((1, 0),), refused=True))]
    done(holder.pump(0.1))
    assert len(sent) == 1
    store.release(("p1", 8))
    done(holder.pump(0.2))
    assert sent[1:] == [(HOLDER, KvAckMeta("p0", Fence(1), (), room=True))]
    done(holder.pump(0.3))
    assert len(sent) == 2  # told once

    # Who does not rely on us any more need not know.
    done(holder.store_copies(HOLDER, KvMeta("p0", Fence(1), (Block(9, 3, 16, 0),)), memoryview(data)))
    holder.answer_query(Member("n9", "b"), KvQueryMeta("p0", Fence(2)))
    sent.clear()
    store.release(("p1", 7))
    done(holder.pump(0.4))
    assert not sent


def test_copies_of_requests_that_have_ended_are_room_for_others() -> None:
    """What is spare gives way to them, and no block need become free for that."""
    sent: list[tuple[Member, Meta]] = []

    def send(member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append((member, meta))
        return True

    kv = KVCache(4, 1, 1, 4, 1, "float32")
    store = KvStore(4, 4, 8, 8)
    holder = Replicator(store, kv, here, send)
    data = bytes(kv.block_bytes)
    names = [bytes([rid]) * 16 for rid in range(5)]
    blocks = tuple(Block(rid, 0, 4, zlib.crc32(data), names[rid]) for rid in range(5))
    done(holder.store_copies(HOLDER, KvMeta("p0", Fence(1), blocks), memoryview(data * 5)))
    assert sent == [(HOLDER, KvAckMeta("p0", Fence(1), ((4, 0),), refused=True))]
    done(holder.pump(0.1))
    sent.clear()
    holder.drop_copies(HOLDER, KvDropMeta("p0", Fence(1), (1,)))
    done(holder.pump(0.2))
    assert not store.blocks_free
    assert (HOLDER, KvAckMeta("p0", Fence(1), (), room=True)) in sent
    done(holder.store_copies(HOLDER, KvMeta("p0", Fence(1), blocks[4:]), memoryview(data)))
    assert store.copies.tokens(("p0", 4)) == 4


def test_the_source_counts_refusals_and_takes_up_again_at_a_word() -> None:
    sent: list[Meta] = []

    def send(_member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append(meta)
        return True

    kv = KVCache(4, 1, 1, 4, 1, "float32")
    store = KvStore(4, 4, 4, 8)
    serving = Replicator(store, kv, here, send)
    rows = Rows(pack_rows([(1, 0, 8, True)]))
    table_rows = store.begin("p0", rows)
    assert table_rows is not None
    store.commit(table_rows, rows)
    serving.protect("p0", 1, [HOLDER])
    serving.acknowledged(HOLDER, KvAckMeta("p0", Fence(1), (), whole=True), 0.0)
    done(serving.pump(0.0))
    serving.acknowledged(HOLDER, KvAckMeta("p0", Fence(1), ((1, 0),), refused=True), 0.1)
    assert serving.stats.copies_refused == 1
    sent.clear()
    done(serving.pump(0.2))
    assert not sent
    serving.acknowledged(HOLDER, KvAckMeta("p0", Fence(1), (), room=True), 0.2)
    done(serving.pump(0.25))
    (message,) = sent
    assert isinstance(message, KvMeta)
    assert [block.index for block in message.blocks] == [0, 1]


def test_what_is_under_way_is_bounded_in_bytes_too() -> None:
    """Blocks of a model with many heads have megabytes: 64 of them would be a quarter of a gigabyte in memory."""
    made = ReplicaSource(HOLDER, 4, lambda _: 4 * 100, block_bytes=8 << 20)
    made.must_ask(0.0)
    made.acknowledged((), whole=True, refused=False, now=0.0)
    made.wrote([1])
    assert len(made.take(0.0, limit=3)) == 3
    assert len(made.take(0.0)) == WINDOW_BYTES // (8 << 20) - 3
    huge = ReplicaSource(HOLDER, 4, lambda _: 4 * 100, block_bytes=1 << 30)
    huge.must_ask(0.0)
    huge.acknowledged((), whole=True, refused=False, now=0.0)
    huge.wrote([1])
    assert len(huge.take(0.0)) == 2


def test_the_window_bounds_what_is_under_way() -> None:
    made = source({1: 4 * (WINDOW_BLOCKS + 10)})
    assert len(made.take(0.0)) == WINDOW_BLOCKS
    assert made.take(0.0) == []
    made.acknowledged(((1, 4 * 10),), whole=False, refused=False, now=0.1)
    assert len(made.take(0.1)) == 10


def test_a_silent_holder_is_asked_again_and_nothing_counts_meanwhile() -> None:
    made = source({1: 8})
    made.take(0.0)
    assert made.must_ask(ANSWER_LIMIT_S + 0.1)
    assert not made.known
    assert made.lag_tokens([1]) == 8


def test_blocks_that_fill_one_after_the_other_go_together() -> None:
    tokens = {1: 4, 2: 3}
    made = source(tokens)
    assert made.take(0.0) == [Copy(1, 0, 4)]
    tokens |= {1: 8, 2: 4}
    made.wrote([1, 2])
    assert made.take(COPY_EVERY_S / 2) == []
    assert made.take(COPY_EVERY_S) == [Copy(1, 1, 8), Copy(2, 0, 4)]


def test_a_source_hears_of_copies_that_made_room() -> None:
    sent: list[tuple[Member, Meta]] = []

    def send(member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append((member, meta))
        return True

    kv = KVCache(3, 1, 1, 4, 1, "float32")
    store = KvStore(3, 4, 4, 8)
    holder = Replicator(store, kv, here, send)
    data = bytes(kv.block_bytes)
    blocks = tuple(Block(rid, 0, 4, zlib.crc32(data)) for rid in (1, 2))
    done(holder.store_copies(HOLDER, KvMeta("p0", Fence(1), blocks), memoryview(data * 2)))
    done(holder.pump(0.0))
    sent.clear()
    assert store.begin("p1", Rows(pack_rows([(7, 0, 8, True)]))) is not None  # two blocks: one copy has to go
    done(holder.pump(0.1))
    assert sent == [(HOLDER, KvAckMeta("p0", Fence(1), ((1, 0),), refused=True))]
    done(holder.pump(0.2))
    assert len(sent) == 1  # told once

    # Who has only asked relies on what is here as well: a node that took over, of its predecessor's KV.
    successor = Member("n9", "b")
    holder.answer_query(successor, KvQueryMeta("p0", Fence(2)))
    sent.clear()
    assert store.begin("p1", Rows(pack_rows([(8, 0, 4, True)]))) is not None
    done(holder.pump(0.3))
    assert sent == [(successor, KvAckMeta("p0", Fence(2), ((2, 0),), refused=True))]

    told = source({1: 8})
    told.take(0.0)
    told.acknowledged(((1, 8),), whole=False, refused=False, now=0.0)
    told.acknowledged(((1, 0),), whole=False, refused=True, now=0.1)
    assert told.lag_tokens([1]) == 8
    assert told.take(0.2) == []  # there is no room yet
    assert [copy.index for copy in told.take(0.1 + REFUSED_PAUSE_S)] == [0, 1]


def test_what_is_unsound_in_a_message_is_refused_and_the_rest_of_it_is_kept() -> None:
    """Of a spoilt block nothing is stored, nor of what follows it in the same request: that would leave a gap."""
    sent: list[tuple[Member, Meta]] = []

    def send(member: Member, meta: Meta, _payload: Buffer) -> bool:
        sent.append((member, meta))
        return True

    kv = KVCache(8, 1, 1, 4, 1, "float32")
    holder = Replicator(KvStore(8, 4, 4, 8), kv, here, send)
    data = bytearray(np.random.default_rng(1).bytes(4 * kv.block_bytes))
    wanted = [(1, 0), (2, 0), (2, 1), (1, 1)]  # (request, index)
    blocks = tuple(
        Block(rid, index, 4 * (index + 1), zlib.crc32(data[k * kv.block_bytes : (k + 1) * kv.block_bytes]))
        for k, (rid, index) in enumerate(wanted)
    )
    data[kv.block_bytes] ^= 1  # of (2, 0)
    message = KvMeta("p0", Fence(1), blocks)
    done(holder.store_copies(HOLDER, message, memoryview(data)))
    done(holder.pump(0.0))
    assert sent == [
        (HOLDER, KvAckMeta("p0", Fence(1), ((2, 0),), refused=True)),
        (HOLDER, KvAckMeta("p0", Fence(1), ((1, 8),))),
    ]
    assert (holder.stats.checksum_failures, holder.stats.blocks_refused, holder.stats.blocks_stored) == (
        1,
        2,
        2,
    )
    # Cut short: the last block is not sound.
    done(holder.store_copies(HOLDER, message, memoryview(data)[:-1]))
    assert holder.stats.checksum_failures == 3
