"""Which request starts where, and what moves for it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.core.ranks.accounts import RankAccounts
from dataplane.core.ranks.routing import OVERTAKEN_MAX, Router, crowded_budget
from dataplane.core.ranks.starting import Sized, Start, choose_start
from kernels.ranks.layout import Shape, first_layout


def nobody(rank: int) -> tuple[Sized, ...]:
    raise AssertionError(f"rank {rank} was asked for what it decodes")


def test_the_rank_with_most_room_gets_the_request_that_fits_best() -> None:
    waiting = [Sized(1, 900), Sized(2, 510), Sized(3, 40)]
    assert choose_start({0: 1000, 1: 500, 2: 1010}, {1}, waiting, nobody) == Start(2, 1)
    assert choose_start({0: 1000, 1: 500, 2: 1010}, set(), waiting, nobody) == Start(2, 1)
    assert choose_start({0: 1000}, {0}, [], nobody) is None


def test_of_equals_the_one_that_came_first() -> None:
    assert choose_start({0: 0, 1: 100}, {0, 1}, [Sized(7, 50), Sized(8, 50)], nobody) == Start(7, 0)


def test_a_request_moves_to_where_the_room_is_so_that_a_rank_without_prompts_has_one() -> None:
    decoded = {1: (Sized(20, 100), Sized(21, 400))}
    start = choose_start({0: 600, 1: 1000, 2: 1000}, {1}, [Sized(9, 390)], lambda rank: decoded[rank])
    assert start == Start(9, 1, moves=21, target=0)
    # It has nothing that could move: the prompt goes where the room is.
    assert choose_start({0: 600, 1: 1000, 2: 1000}, {1}, [Sized(9, 390)], lambda rank: ()) == Start(9, 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_start_leaves_ranks_further_apart_than_another_one_of_its_kind(data: st.DataObject) -> None:
    size = st.integers(1, 1000)
    rooms = dict(enumerate(data.draw(st.lists(st.integers(0, 5000), min_size=2, max_size=8))))
    idle = data.draw(st.sets(st.sampled_from(sorted(rooms))))
    waiting = [Sized(n, room) for n, room in enumerate(data.draw(st.lists(size, min_size=1, max_size=6)))]
    mine = {
        rank: [
            Sized(100 * (rank + 1) + n, room) for n, room in enumerate(data.draw(st.lists(size, max_size=5)))
        ]
        for rank in rooms
    }
    start = choose_start(rooms, idle, waiting, mine.__getitem__)
    assert start is not None
    sizes = {each.request: each.room for each in (*waiting, *itertools.chain(*mine.values()))}

    def apart(request: int, moves: int | None) -> int:
        after = dict(rooms)
        after[start.rank] += sizes[request]
        if moves is not None and start.target is not None:
            after[start.rank] -= sizes[moves]
            after[start.target] += sizes[moves]
        return max(after.values()) - min(after.values())

    moves = [None] if start.moves is None else [each.request for each in mine[start.rank]]
    assert start.moves in moves
    assert start.target in (None, min(rooms, key=lambda rank: (rooms[rank], rank)))
    assert apart(start.request, start.moves) == min(apart(w.request, m) for w in waiting for m in moves)


def test_nobody_is_overtaken_for_ever() -> None:
    """A long request among short ones, where each time one ends and its room is free."""
    router = Router(range(4))
    router.submit(0, 100_000)
    for number in range(1, 200):
        router.submit(number, 100)
    before = 0
    for _ in range(200):
        router.draw(400, may_start=lambda start: True)
        if router.owner(0) is not None:
            break
        before = sum(router.owner(number) is not None for number in range(1, 200))
    assert before <= OVERTAKEN_MAX


def full_stage(ranks: int, seed: int) -> Iterator[tuple[RankAccounts, dict[int, int]]]:
    """Batches of a stage with room for some dozens of long requests: what each rank has to do in the batch."""
    numbers = random.Random(seed)
    router, pairs = Router(range(ranks), token_pairs=5000), 5000
    layout = first_layout(Shape(ranks, 8, 48), ranks)
    # 400,000 positions in all, of 8 heads.
    account = RankAccounts(layout, dict.fromkeys(layout.ranks, 640_000 * ranks))
    needs: dict[int, int] = {}
    ends: dict[int, list[int]] = {}
    submitted, decoded = 0, dict[int, int]()
    for step in range(3500):
        while router.waiting < 4 * ranks:
            prompt = int(min(32_000, 500 + numbers.expovariate(1 / 9000)))
            needs[submitted] = prompt + 300
            decoded[submitted] = prompt
            router.submit(submitted, prompt, room=prompt + 300)
            submitted += 1
        total = dict.fromkeys(router.ranks, 0)
        for chunk in router.draw(8192, may_start=lambda start: account.begin(start, needs[start.request])):
            total[chunk.rank] += chunk.tokens * (pairs + chunk.start) + chunk.tokens * (chunk.tokens + 1) // 2
            decoded[chunk.request] -= chunk.tokens
            if not decoded[chunk.request]:
                ends.setdefault(step + 1 + numbers.randint(50, 600), []).append(chunk.request)
        for request in ends.pop(step, ()):
            router.end(request)
            account.release(request)
        yield account, total


def test_a_full_stage_of_long_requests_is_even() -> None:
    """Five ranks with one head of eight for all and three for each's own requests: KV within 1.05, and what a rank
    has to do in the attention so that a step of which it is a quarter takes at most 1.05 times the mean."""
    slowest = mean = spread = 0.0
    steps = 0
    for step, (account, total) in enumerate(full_stage(5, 3)):
        if step < 1500:
            continue
        steps += 1
        spread += account.spread()
        slowest += sum(total.values()) + 3 * max(total.values())
        mean += sum(total.values()) * (1 + 3 / 5)
    assert spread / steps <= 1.05
    assert slowest / mean <= 1.1


def test_a_crowded_batch_is_smaller_the_fewer_ranks_have_prompts() -> None:
    budgets = [crowded_budget(8192, ranks, 5) for ranks in range(1, 6)]
    assert budgets == sorted(budgets)
    assert budgets[-1] <= 8192 // 8
    assert budgets[0] >= 8192 // 8 // 5 // 4  # a prompt alone goes on
    assert all(a / (n + 1) <= b / (n + 2) for n, (a, b) in enumerate(itertools.pairwise(budgets)))
