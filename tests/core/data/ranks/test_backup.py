"""Pages on the shelf: none is claimed that is not there, all get there, windows hold."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.core.ranks.backup import Backup, Page


def drain(backup: Backup) -> list[Page]:
    done = []
    while pages := backup.next():
        for page in pages:
            assert backup.acknowledge(page)
        done += pages
    return done


def test_pages_go_in_order_and_only_once() -> None:
    backup = Backup([0, 1], window_pages=2)
    backup.filled(7, 3)
    first = backup.next()
    assert [(page.block, page.rank) for page in first] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert backup.next() == []  # the window is full
    assert backup.behind() == {0: 3, 1: 3}
    assert backup.acknowledge(first[1])
    assert backup.there(7, [0]) == 0  # block 0 is not there
    assert backup.acknowledge(first[0])
    assert backup.there(7, [0]) == 2
    assert backup.there(7, [0, 1]) == 0
    assert [(page.block, page.rank) for page in backup.next()] == [(2, 0)]


def test_what_ends_is_dropped() -> None:
    backup = Backup([0])
    backup.filled(1, 1)
    (page,) = backup.next()
    assert backup.end(1)
    assert not backup.end(1)
    assert not backup.acknowledge(page)
    assert backup.next() == []
    assert backup.behind() == {0: 0}


def test_after_a_change_of_ranks_only_what_all_had_there_counts() -> None:
    backup = Backup([0, 1, 2], window_pages=4)
    backup.filled(1, 4)
    pages = backup.next()
    for page in pages:
        if page.rank != 2 or page.block < 2:
            backup.acknowledge(page)
    late = next(page for page in pages if page.rank == 2 and page.block == 2)
    assert backup.there(1, [2]) == 2
    backup.change([0, 1])
    assert backup.there(1, [0, 1]) == 2
    assert not backup.acknowledge(late)
    assert [(page.rank, page.block) for page in drain(backup)] == [(0, 2), (0, 3), (1, 2), (1, 3)]


def test_a_page_of_the_layout_before_is_not_taken_for_one_of_this() -> None:
    """It has other planes."""
    backup = Backup([0, 1])
    backup.filled(1, 1)
    before = backup.next()
    backup.change([0])
    (again,) = backup.next()
    assert not backup.acknowledge(before[0])
    assert backup.there(1, [0]) == 0
    assert backup.acknowledge(again)
    assert backup.there(1, [0]) == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_is_claimed_that_is_not_on_the_shelf(data: st.DataObject) -> None:
    ranks = [0, 1, 2]
    backup = Backup(ranks, window_pages=3)
    shelf: set[Page] = set()
    flying: deque[Page] = deque()
    full: dict[int, int] = {}
    ended: set[int] = set()
    layout = 0
    for _ in range(30):
        match data.draw(
            st.sampled_from(("fill", "fill", "send", "arrive", "arrive", "lose", "end", "rewind"))
        ):
            case "fill":
                request = data.draw(st.integers(0, 3))
                if request not in ended:
                    full[request] = full.get(request, 0) + data.draw(st.integers(1, 4))
                    backup.filled(request, full[request])
            case "send":
                flying += backup.next()
            case "arrive" if flying:
                page = flying[data.draw(st.integers(0, len(flying) - 1))]
                flying.remove(page)
                if backup.acknowledge(page):
                    shelf.add(page)
            case "lose" if len(ranks) > 1:
                ranks = ranks[:-1]
                for request in full:
                    full[request] = min(full[request], backup.there(request, [len(ranks)]))
                    backup.rewind(request, full[request])
                before, layout = shelf, layout + 1
                backup.change(ranks)
                # Those that every rank had there are there for whoever has the planes now.
                shelf = {
                    Page(page.request, page.block, rank, layout)
                    for page in before
                    for rank in ranks
                    if all(
                        Page(page.request, page.block, each, layout - 1) in before
                        for each in range(len(ranks) + 1)
                    )
                }
            case "end":
                request = data.draw(st.integers(0, 3))
                full.pop(request, None)
                backup.end(request)
                shelf = {page for page in shelf if page.request != request}
                ended.add(request)
            case "rewind":
                request = data.draw(st.integers(0, 3))
                if request in full:
                    full[request] = data.draw(st.integers(0, full[request]))
                    backup.rewind(request, full[request])
        for request in full:
            for rank in ranks:
                for block in range(backup.there(request, [rank])):
                    assert Page(request, block, rank, layout) in shelf
        assert all(sum(page.rank == rank and page.layout == layout for page in flying) <= 3 for rank in ranks)
    for page in flying:
        backup.acknowledge(page)
    drain(backup)
    assert set(backup.behind().values()) == {0}


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="a window of 0 pages"):
        Backup([0], 0)
    backup = Backup([0])
    backup.filled(1, 5)
    with pytest.raises(ValueError, match="request 1 had 5 blocks, now 4"):
        backup.filled(1, 4)
    backup.rewind(9, 0)  # not known: nothing to do
