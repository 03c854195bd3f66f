"""The block store: nothing is lost, nothing is held twice, served KV is never evicted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import Key, KvStore
from dataplane.core.messages import pack_rows


def grow(store: KvStore, key: Key, tokens: int) -> bool:
    """Compute positions of a request up to `tokens`. False: there was no room."""
    pipeline, rid = key
    start = min(store.tokens(key), tokens - 1)
    rows = Rows(pack_rows([(rid, start, tokens - start, False)]))
    table_rows = store.begin(pipeline, rows)
    if table_rows is None:
        return False
    assert store.tokens(key) == start
    store.table.commit(table_rows, rows.starts, rows.counts)
    return True


def test_replicas_give_way_to_serving_requests() -> None:
    store = KvStore(8, 4, 8, 8)
    for index in range(4):
        block = store.replica_block(("p1", 1), index, (index + 1) * 4)
        assert block is not None
        store.replica_written(("p1", 1), index, (index + 1) * 4, checksum=0)
    assert grow(store, ("p0", 7), 6 * 4)
    assert ("p1", 1) not in store.replicas
    assert store.replicas_evicted == 1
    store.check()


def test_a_copy_never_evicts_anything() -> None:
    store = KvStore(4, 4, 8, 8)
    assert grow(store, ("p0", 7), 16)
    assert store.replica_block(("p1", 1), 0, 4) is None
    assert not grow(store, ("p0", 8), 1)


def test_a_gap_in_a_copy_is_refused() -> None:
    store = KvStore(8, 4, 8, 8)
    assert store.replica_block(("p1", 1), 1, 8) is None
    assert store.replica_block(("p1", 1), 0, 4) is not None
    store.replica_written(("p1", 1), 0, 4, checksum=0)
    assert store.replica_block(("p1", 1), 2, 12) is None
    assert store.replica_block(("p1", 1), 1, 6) is not None


def test_promotion_moves_the_same_blocks() -> None:
    store = KvStore(8, 4, 8, 8)
    blocks = []
    for index in range(2):
        block = store.replica_block(("p1", 1), index, (index + 1) * 4)
        assert block is not None
        blocks.append(block)
        store.replica_written(("p1", 1), index, (index + 1) * 4, checksum=index)
    assert store.promote(("p1", 1)) == 8
    assert store.table.blocks(store.own["p1"][1]) == blocks


def test_demotion_keeps_only_blocks_with_tokens() -> None:
    store = KvStore(8, 4, 8, 8)
    grow(store, ("p0", 1), 12)
    store.table.set_valid(store.own["p0"][1], 5)
    for index in range(3):
        assert store.checksums.copied(store.own["p0"][1], index, 4 * index + 4, index)
    store.demote(("p0", 1))
    assert store.replica_tokens(("p0", 1)) == 5
    assert len(store.replicas[("p0", 1)].checksums) == 2
    assert store.blocks_free == 6
    store.check()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "copy", "release", "drop", "promote", "demote", "sweep"]),
        st.sampled_from(["p0", "p1"]),
        st.integers(1, 3),
        st.integers(1, 40),
    ),
    max_size=60,
)


@given(OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_no_block_is_lost_or_held_twice(operations: list[tuple[str, str, int, int]]) -> None:
    store = KvStore(12, 4, 5, 10)
    for what, pipeline, rid, tokens in operations:
        key = (pipeline, rid)
        match what:
            case "grow" if key not in store.replicas:
                grow(store, key, tokens)
            case "copy":
                index = store.replica_tokens(key) // 4
                if index < 10 and store.replica_block(key, index, index * 4 + 4) is not None:
                    store.replica_written(key, index, index * 4 + 4, 1)
            case "release":
                store.release(key)
            case "drop":
                store.drop_replica(key)
            case "promote" if not store.serves(key):
                store.promote(key)
            case "demote" if store.serves(key):
                store.demote(key)
            case "sweep":
                store.release_pipeline(pipeline, keep=(rid,))
        store.check()


def test_the_check_can_fail() -> None:
    store = KvStore(4, 4, 4, 4)
    grow(store, ("p0", 1), 4)
    store._free.append(store.table.blocks(store.own["p0"][1])[0])
    with pytest.raises(AssertionError, match="held twice"):
        store.check()
