"""Room as a vector, one entry a rank."""

from __future__ import annotations

import pytest

from dataplane.core.ranks.accounts import RankAccounts, planes_for_all, planes_for_owned
from dataplane.core.ranks.routing import Router
from dataplane.core.ranks.starting import Start
from kernels.ranks.layout import Shape, first_layout

SHAPE = Shape(80, 8, 112)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_all_planes_are_counted_once(ranks: int) -> None:
    layout = first_layout(SHAPE, ranks)
    assert sum(planes_for_all(layout).values()) + planes_for_owned(layout) == 80 * 8
    assert set(planes_for_all(layout).values()) == {80 * (8 // ranks)}


def test_an_owner_pays_for_data_parallel_heads_and_everybody_for_the_others() -> None:
    # 2 heads each, 2 of all.
    account = RankAccounts(first_layout(Shape(2, 8, 8), 3), dict.fromkeys(range(3), 100))
    account.take(1, owner=2, blocks=3)
    assert account.used() == {0: 3 * 4, 1: 3 * 4, 2: 3 * 8}
    assert account.spread() == 2.0
    assert account.can_take(0, 9)
    assert not account.can_take(2, 10)  # 24 + 80 > 100
    assert account.release(1) == 3
    assert account.release(1) == 0
    assert account.used() == {0: 0, 1: 0, 2: 0}
    assert account.spread() == 1.0


def test_what_there_is_no_room_for_is_refused() -> None:
    account = RankAccounts(first_layout(Shape(1, 2, 2), 2), {0: 5, 1: 4})
    with pytest.raises(ValueError, match="no room for 5 blocks at owner 0"):
        account.take(1, 0, 5)
    account.take(1, 0, 2)
    with pytest.raises(ValueError, match="request 1: no room"):
        account.take(1, 1, 1)  # another owner
    with pytest.raises(ValueError, match=r"ranks \[1\] have no capacity"):
        RankAccounts(first_layout(Shape(1, 2, 2), 2), {0: 5})


@pytest.mark.parametrize("ranks", [5, 6, 7])
def test_routed_requests_fill_ranks_evenly(ranks: int) -> None:
    """Bytes of KV of the fullest rank are at most 1.05 times those of the emptiest."""
    layout = first_layout(SHAPE, ranks)
    account, router = RankAccounts(layout, dict.fromkeys(layout.ranks, 1 << 40)), Router(layout.ranks)
    for number in range(200):
        tokens = 500 + 1300 * (number * number % 17)
        router.submit(number, tokens, tokens)
        owner = router.owner(number)
        assert owner is not None
        account.take(number, owner, -(-tokens // 16))
    assert account.spread() <= 1.05


def test_a_start_that_moves_another_takes_both_or_nothing() -> None:
    account = RankAccounts(first_layout(Shape(1, 3, 3), 2), {0: 20, 1: 20})  # 1 head each, 1 of all
    account.take(1, owner=1, blocks=6)
    before = account.used()
    assert before == {0: 6, 1: 12}
    assert not account.begin(Start(2, 1, moves=1, target=0), 9)  # 12 + 9 at rank 0
    assert not account.begin(Start(2, 1), 5)  # 12 + 10 at rank 1
    assert account.used() == before
    assert account.begin(Start(2, 1, moves=1, target=0), 5)
    assert account.used() == {0: 12 + 5, 1: 6 + 10}
    assert account.release(1) == 6
    with pytest.raises(ValueError, match="request 1 has no blocks"):
        account.begin(Start(3, 0, moves=1, target=1), 1)
