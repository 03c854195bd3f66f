"""The block store: nothing is lost or miscounted, equal content is one block, served KV is never evicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import KvStore
from dataplane.core.copies import Key
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
        block = store.copies.place(("p1", 1), index, (index + 1) * 4)
        assert block is not None
        store.copies.written(("p1", 1), index, (index + 1) * 4, checksum=0)
    assert grow(store, ("p0", 7), 6 * 4)
    assert ("p1", 1) not in store.copies.rows
    assert store.copies.evictions == 1
    store.check()


def test_a_copy_never_evicts_anything() -> None:
    store = KvStore(4, 4, 8, 8)
    assert grow(store, ("p0", 7), 16)
    assert store.copies.place(("p1", 1), 0, 4) is None
    assert not grow(store, ("p0", 8), 1)


def test_a_gap_in_a_copy_is_refused() -> None:
    store = KvStore(8, 4, 8, 8)
    assert store.copies.place(("p1", 1), 1, 8) is None
    assert store.copies.place(("p1", 1), 0, 4) is not None
    store.copies.written(("p1", 1), 0, 4, checksum=0)
    assert store.copies.place(("p1", 1), 2, 12) is None
    assert store.copies.place(("p1", 1), 1, 6) is not None


def copied(store: KvStore, key: Key, blocks: int, names: Sequence[bytes] = ()) -> list[int]:
    """A copy of so many full blocks has come; where they are."""
    found = []
    for index in range(blocks):
        block = store.copies.place(key, index, (index + 1) * 4)
        assert block is not None
        store.copies.written(key, index, (index + 1) * 4, index, names[index] if names else b"")
        found.append(block)
    return found


def test_a_copy_is_taken_into_service_in_the_same_blocks() -> None:
    store = KvStore(8, 4, 8, 8)
    blocks = copied(store, ("p1", 1), 2, NAMES)
    assert store.take_up("p1", 1, NAMES[:2]) == 8
    assert store.table.blocks(store.own["p1"][1]) == blocks
    assert [check.block for check in store.checksums.next(9)] == blocks, "nobody has looked at them"
    store.check()


def test_who_leaves_keeps_copies_of_blocks_with_checksums() -> None:
    store = KvStore(8, 4, 8, 8)
    grow(store, ("p0", 1), 12)
    row = store.own["p0"][1]
    for index, block in enumerate(store.table.blocks(row)[:2]):
        assert store.copied(block, index, 4)
    store.table.set_valid(row, 9)
    store.leave("p0", demote=True)
    assert store.copies.tokens(("p0", 1)) == 8
    assert store.blocks_free == 6
    store.check()


# ---------------------------------------------------------------------- content that several have

NAMES = [bytes([index]) * 16 for index in range(8)]


def computed(store: KvStore, key: Key, tokens: int, names: Sequence[bytes] = NAMES) -> None:
    """It has computed so many positions, whose full blocks are called that."""
    start = store.tokens(key)
    rows = Rows(pack_rows([(key[1], start, tokens - start, False)]))
    table_rows = store.begin(key[0], rows)
    assert table_rows is not None
    store.commit(table_rows, rows, names[start // 4 : tokens // 4])
    store.check()


def test_what_one_has_computed_the_next_begins_with() -> None:
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 10)
    assert store.resume("p0", 2, NAMES[:2], 0)
    assert store.tokens(("p0", 2)) == 8
    computed(store, ("p0", 2), 12, [*NAMES[:2], NAMES[5]])
    assert store.blocks_free == 4, "two are shared"
    store.release(("p0", 1))
    assert store.blocks_free == 5, "its open block is free"
    store.release(("p0", 2))
    assert list(store.kept["p0"]) == [NAMES[1], NAMES[0], NAMES[5]]
    assert store.blocks_kept == 3
    store.evict("p0", [NAMES[5], NAMES[7]])
    assert store.blocks_free == 6
    store.check()


def test_equal_content_is_kept_once() -> None:
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 8)
    computed(store, ("p1", 1), 8)
    assert store.blocks_free == 6
    assert store.table.blocks(store.own["p0"][1]) == store.table.blocks(store.own["p1"][1])


def test_what_was_just_computed_is_better_than_a_copy_that_nobody_has_looked_at() -> None:
    store = KvStore(8, 4, 8, 8)
    (copy,) = copied(store, ("p1", 1), 1, NAMES)
    computed(store, ("p0", 1), 4)
    assert store.table.blocks(store.own["p0"][1]) != [copy]
    assert store.resume("p0", 2, NAMES[:1], 0)
    assert store.table.blocks(store.own["p0"][2]) == store.table.blocks(store.own["p0"][1])
    assert store.copies.tokens(("p1", 1)) == 4
    store.check()


@pytest.mark.parametrize("there", [True, False])
def test_a_block_whose_name_another_one_got_meanwhile_is_kept_as_that_one(there: bool) -> None:
    """Its scheduler counts on what it has sealed. Where the other one is gone, too, it is told."""
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p1", 1), 4)
    assert store.copies.share(("p0", 1), 0, 4, NAMES[0], 7)
    assert store.take_up("p0", 1, NAMES[:1]) == 4
    computed(store, ("p0", 2), 4)  # before anybody has looked at what p0 took over
    (computed_there,) = store.table.blocks(store.own["p0"][2])
    assert store.table.blocks(store.own["p1"][1]) != [computed_there]
    if not there:
        store.release(("p0", 2))
        store.evict("p0", NAMES[:1])
    store.check()
    store.release(("p1", 1))
    store.check()
    assert list(store.kept["p1"]) == NAMES[:1] * there
    assert store.lost == [("p1", NAMES[0])] * (not there)
    assert store.resume("p1", 2, NAMES[:1], 0) == there


def test_a_request_goes_on_in_the_block_that_it_has() -> None:
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 10)
    assert store.resume("p0", 1, NAMES[:2], 1)
    assert store.tokens(("p0", 1)) == 9
    assert not store.resume("p0", 1, NAMES[:2], 3), "so many positions of it are not here"
    assert not store.resume("p0", 1, NAMES[:3], 0)
    assert store.resume("p0", 1, NAMES[:1], 2), "full as it is: the same bits are computed again"
    assert store.tokens(("p0", 1)) == 6
    computed(store, ("p0", 1), 8)
    assert store.names_of(store.own["p0"][1]) == NAMES[:2]
    assert store.resume("p0", 1, NAMES[:1], 0)
    assert store.tokens(("p0", 1)) == 4
    assert store.blocks_free == 7
    store.check()


def test_it_is_taken_up_as_far_as_its_names_say() -> None:
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 10)
    other = [NAMES[0], NAMES[6]]
    assert store.take_up("p0", 1, NAMES[:2]) == 10
    assert store.take_up("p0", 1, NAMES[:1]) == 8, "its log is shorter where it is asked for now"
    computed(store, ("p0", 1), 10)
    assert store.take_up("p0", 1, other) == 4, "computed where other things decided the bits"
    assert store.take_up("p0", 9, [NAMES[7]]) == 0
    assert 9 not in store.own["p0"]
    store.check()


def test_an_open_block_is_taken_up_only_behind_blocks_that_are_known_by_name() -> None:
    """Nothing else says that it was computed under the numerics and the salt of now, and of the prompt of now."""
    store = KvStore(12, 4, 8, 8)
    computed(store, ("p0", 1), 3)
    assert store.take_up("p0", 1, ()) == 0, "of an earlier request, or beside a stage of other numerics"
    computed(store, ("p0", 1), 3)
    assert store.take_up("p0", 1, NAMES[:2]) == 0
    computed(store, ("p0", 1), 4)
    assert store.take_up("p0", 1, ()) == 0, "full, and named under another salt"
    block = store.copies.place(("p0", 2), 0, 3)
    assert block is not None
    store.copies.written(("p0", 2), 0, 3, checksum=0)
    assert store.take_up("p0", 2, ()) == 0, "its copy neither"
    computed(store, ("p0", 3), 6, NAMES[3:])
    computed(store, ("p1", 3), 4, NAMES)
    assert store.take_up("p0", 3, NAMES[:1]) == 4, (
        "another's first block: its own second one is behind its own"
    )
    store.check()


def test_what_copies_have_is_copied_once() -> None:
    store = KvStore(8, 4, 8, 8)
    copied(store, ("p1", 1), 2, NAMES)
    assert store.copies.share(("p1", 2), 0, 4, NAMES[0], 0)
    assert not store.copies.share(("p1", 2), 1, 8, NAMES[4], 0), "it is not here"
    assert not store.copies.share(("p1", 2), 1, 8, NAMES[1], 7), "it is not what its source has"
    assert store.copies.share(("p1", 2), 1, 8, NAMES[1], 1)
    assert store.blocks_free == 6
    store.copies.drop(("p1", 1))
    assert store.take_up("p1", 2, NAMES[:2]) == 8
    store.check()


def test_copies_of_what_is_kept_go_first() -> None:
    store = KvStore(4, 4, 8, 8)
    copied(store, ("p1", 1), 2, NAMES)
    copied(store, ("p1", 2), 2, NAMES[4:])
    assert store.copies.drop(("p1", 1)) == [NAMES[1], NAMES[0]]
    assert list(store.copies.spare) == [NAMES[1], NAMES[0]]
    copied(store, ("p1", 3), 1, NAMES[2:])
    assert list(store.copies.spare) == [NAMES[0]]
    assert grow(store, ("p0", 1), 8)
    assert not store.copies.spare
    assert list(store.copies.rows) == [("p1", 3)]
    store.check()


def test_what_is_needed_makes_no_room_for_the_rest() -> None:
    store = KvStore(8, 4, 8, 8)
    copied(store, ("p1", 1), 2, NAMES)
    copied(store, ("p1", 2), 1, NAMES[4:])
    store.copies.drop(("p1", 1))
    computed(store, ("p0", 1), 8, NAMES[5:])
    computed(store, ("p2", 1), 8)
    store.release(("p2", 1))
    store.idle = frozenset({"p2"})
    free = store.blocks_free
    needed = {NAMES[1]}
    room = store.room(needed)
    store.make_room(8, needed)
    assert store.blocks_free == room > free
    assert store.pool.has(NAMES[1])
    assert store.tokens(("p0", 1)) == 8, "it is served"
    store.check()


def test_room_is_looked_for_no_further_than_it_is_needed() -> None:
    """A pool is large, and who restores asks with every turn."""

    class Looks(frozenset[bytes]):
        count = 0

        def __contains__(self, name: object) -> bool:
            Looks.count += 1
            return super().__contains__(name)

    store = KvStore(64, 4, 8, 8)
    names = [b"%16d" % i for i in range(64)]
    for name in names:
        assert store.copies.place_spare("p1", name, 9) is not None
    needed = Looks(names[:1])
    store.make_room(4, needed)
    assert store.blocks_free == 4
    assert Looks.count == 5
    assert store.room(needed, 8) == 8
    assert Looks.count == 10
    assert store.room(needed) == 63
    store.check()


def test_what_nobody_claims_is_kept_if_it_has_a_name() -> None:
    store = KvStore(12, 4, 8, 8)
    copied(store, ("p0", 1), 2, NAMES)
    copied(store, ("p0", 2), 2)
    assert store.copies.place_spare("p0", NAMES[3], 9) is not None
    assert store.copies.place_spare("p1", NAMES[4], 9) is not None
    computed(store, ("p0", 3), 10, NAMES[5:])
    store.settle("p0", [3])
    assert store.keeps("p0") == [NAMES[1], NAMES[0], NAMES[3]]
    assert store.blocks_free == 12 - 3 - 1 - 3
    store.check()


def test_what_two_pipelines_keep_is_there_until_neither_does() -> None:
    """A holder that said yes to both dropped it for both, and gave it to one of them only."""
    store = KvStore(12, 4, 8, 8)
    assert store.copies.place_spare("p0", NAMES[0], 9) is not None
    assert store.copies.place_spare("p1", NAMES[0], 9) is None
    for pipeline in ("p0", "p1"):
        assert store.copies.share((pipeline, 1), 0, 4, NAMES[0], 9)
        assert store.copies.drop((pipeline, 1)) == [NAMES[0]]
    assert store.copies.owners() == {"p0", "p1"}
    store.copies.evict_spare([NAMES[0]], "p2")
    store.copies.evict_spare([NAMES[0]], "p0")
    assert (store.copies.spare_of("p0"), store.copies.spare_of("p1")) == ([], [NAMES[0]])
    store.check()
    store.copies.place_spare("p0", NAMES[0], 9)
    assert store.keeps("p1") == [NAMES[0]]
    assert store.copies.spare_of("p0") == [NAMES[0]]
    store.check()
    store.evict("p1", NAMES[:1])
    store.copies.drop_pipeline("p0")
    assert store.blocks_free == 12
    store.check()


@pytest.mark.parametrize("others", [False, True])
def test_who_takes_a_spare_copy_looks_at_it_whoever_has_it_already(others: bool) -> None:
    """Its memory may have failed since somebody else looked."""
    store = KvStore(12, 4, 8, 8)
    block = store.copies.place_spare("p1", NAMES[0], 9)
    assert block is not None
    if others:
        store.copies.place_spare("p0", NAMES[0], 9)
    assert store.resume("p2", 1, NAMES[:1], 0)
    checks = store.checksums.checks([block])
    assert store.checksums.looked_at(checks, np.array([9], np.uint32)) == []
    assert store.checksums.checks([block]) == []
    assert store.keeps("p1") == NAMES[:1]
    assert store.resume("p1", 1, NAMES[:1], 0)
    assert store.checksums.checks([block]) == checks
    store.check()


def test_a_copy_of_what_is_computed_here_stays_when_that_goes() -> None:
    store = KvStore(12, 4, 8, 8)
    computed(store, ("p0", 1), 4)
    assert store.copies.place_spare("p1", NAMES[0], 9) is None
    store.drop(("p0", 1))
    assert store.copies.spare_of("p1") == [NAMES[0]]
    store.check()


def test_damage_is_everybodys_who_has_the_block() -> None:
    store = KvStore(12, 4, 8, 8)
    blocks = copied(store, ("p0", 1), 2, NAMES)
    assert store.take_up("p0", 1, NAMES[:2]) == 8
    assert store.resume("p0", 2, NAMES[:2], 0)
    assert store.copies.share(("p1", 7), 0, 4, NAMES[0], 0)
    store.release(("p0", 2))
    assert store.damaged([blocks[0]]) == {store.own["p0"][1]}
    assert store.tokens(("p0", 1)) == 0
    assert store.copies.evicted == [("p1", 7)]
    assert list(store.kept["p0"]) == [NAMES[1]]
    assert store.lost == [("p0", NAMES[0])]
    assert store.take_up("p0", 1, NAMES[:2]) == 0
    store.check()


def looked_at_next(store: KvStore, block: int) -> bool:
    """Whether its next user looks at the block, which is damaged, and finds that."""
    checks = [check for check in store.checksums.next(9) if check.block == block]
    store.looked_at(checks, np.array([check.checksum + 1 for check in checks], np.uint32))
    return bool(checks) and store.checksum_failures == 1


def test_memory_that_fails_while_it_is_at_rest_is_found_by_who_takes_it_up() -> None:
    """Computed here, copied out, and a copy since the stage has moved away."""
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 8)
    blocks = store.table.blocks(store.own["p0"][1])
    for block in blocks:
        assert store.copied(block, 7, 4)
    store.leave("p0", demote=True)
    assert store.pool.at_rest(blocks[0])
    assert store.take_up("p0", 1, NAMES[:2]) == 8
    assert looked_at_next(store, blocks[0])
    assert store.tokens(("p0", 1)) == 0
    store.check()


def test_what_was_computed_here_and_only_others_rely_on_any_more_is_at_rest() -> None:
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 4)
    (block,) = store.table.blocks(store.own["p0"][1])
    assert store.copies.share(("p1", 1), 0, 4, NAMES[0], 7)
    assert not store.pool.at_rest(block), "p0 computes with it: memory that fails there is not survived"
    store.release(("p0", 1))
    assert not store.pool.at_rest(block), "it is kept for requests to come"
    store.evict("p0", NAMES[:1])
    assert store.pool.at_rest(block)
    assert store.take_up("p1", 1, NAMES[:1]) == 4
    assert looked_at_next(store, block)
    store.check()


def test_a_copy_is_looked_at_by_who_takes_it_up_though_another_computes_with_it() -> None:
    store = KvStore(8, 4, 8, 8)
    computed(store, ("p0", 1), 4)
    (block,) = store.table.blocks(store.own["p0"][1])
    assert store.copies.share(("p1", 1), 0, 4, NAMES[0], 7)
    assert store.take_up("p1", 1, NAMES[:1]) == 4
    assert looked_at_next(store, block)
    assert (store.tokens(("p1", 1)), store.tokens(("p0", 1))) == (0, 0), "both have the block"
    store.check()


def test_a_look_that_ends_after_the_block_has_come_to_rest_vouches_for_nothing() -> None:
    store = KvStore(8, 4, 8, 8)
    (block,) = copied(store, ("p1", 1), 1, NAMES)
    assert store.take_up("p1", 1, NAMES[:1]) == 4
    (check,) = store.checksums.next(9)
    store.leave("p1", demote=True)
    assert not store.looked_at([check], np.array([check.checksum], np.uint32))
    assert store.take_up("p1", 1, NAMES[:1]) == 4
    assert looked_at_next(store, block)


def test_a_spare_block_that_was_computed_again_can_be_looked_at() -> None:
    store = KvStore(8, 4, 8, 8)
    block = store.copies.place_spare("p1", NAMES[0], 9)
    assert block is not None
    computed(store, ("p0", 1), 4)
    (computed_here,) = store.table.blocks(store.own["p0"][1])
    assert computed_here != block, "nobody has looked at that one"
    store.release(("p0", 1))
    store.evict("p0", NAMES[:1])
    assert store.copies.spare[NAMES[0]] == (computed_here, "p1")
    store.check()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "grow",
                "copy",
                "share",
                "release",
                "drop",
                "take up",
                "leave",
                "sweep",
                "begin",
                "evict",
                "keep",
                "spoil",
                "copy out",
                "look",
            ]
        ),
        st.sampled_from(["p0", "p1"]),
        st.integers(1, 3),
        st.integers(1, 32),
    ),
    max_size=60,
)


@given(OPERATIONS)
@settings(max_examples=300, deadline=None)
def test_no_block_is_lost_or_miscounted(operations: list[tuple[str, str, int, int]]) -> None:
    store = KvStore(12, 4, 5, 8)
    for what, pipeline, rid, tokens in operations:
        key = (pipeline, rid)
        # Two families, three blocks each.
        names = [bytes([rid % 2 if i < 3 else rid, i]) * 8 for i in range(8)]
        match what:
            case "grow" if key not in store.copies.rows:
                start = min(store.tokens(key), tokens - 1)
                start -= start % 4 if start // 4 < store.tokens(key) // 4 else 0
                if store.resume(pipeline, rid, names[: start // 4], start % 4):
                    rows = Rows(pack_rows([(rid, start, tokens - start, False)]))
                    table_rows = store.begin(pipeline, rows)
                    if table_rows is not None:
                        store.commit(table_rows, rows, names[start // 4 : tokens // 4])
            case "copy":
                index = store.copies.tokens(key) // 4
                if index < 8 and store.copies.place(key, index, index * 4 + 4) is not None:
                    store.copies.written(key, index, index * 4 + 4, 1, names[index])
            case "share":
                index = store.copies.tokens(key) // 4
                if index < 8:
                    store.copies.share(key, index, index * 4 + 4, names[index], 1)
            case "release":
                store.release(key)
            case "drop":
                store.copies.drop(key)
            case "take up" if not store.serves(key):
                store.take_up(pipeline, rid, names[: tokens // 4])
            case "leave":
                store.leave(pipeline, demote=tokens % 2 == 0)
            case "sweep":
                store.settle(pipeline, [rid])
            case "begin" if key not in store.copies.rows:
                store.resume(pipeline, rid, names[: tokens // 4], 0)
            case "evict":
                store.evict(pipeline, names[: tokens // 4])
                store.copies.evict_spare(names[: tokens // 4], pipeline if tokens % 2 else None)
            case "keep":
                store.copies.place_spare(pipeline, names[tokens % 8], 1)
            case "spoil":
                store.damaged([tokens % 12] if tokens % 12 not in store.pool.free else [])
            case "copy out" if store.serves(key):
                for index, block in enumerate(store.table.blocks(store.own[pipeline][rid])):
                    store.copied(block, 1, min(4, max(0, store.tokens(key) - 4 * index)))
            case "look":
                checks = store.checksums.next(tokens)
                store.looked_at(checks, np.array([check.checksum for check in checks], np.uint32))
        store.check()


def test_the_check_can_fail() -> None:
    store = KvStore(4, 4, 4, 4)
    grow(store, ("p0", 1), 4)
    store.pool.free.append(store.table.blocks(store.own["p0"][1])[0])
    with pytest.raises(AssertionError, match="free and somebody's"):
        store.check()
