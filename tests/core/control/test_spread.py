"""Nodes outside of a fault domain are found in their order, also among those that come and go."""

from __future__ import annotations

import random

import pytest

from controlplane.core.spread import Path, Place, Spread, outwards
from tests.core.counting import calls


def naive(known: dict[Place, Path], within: Path, apart: Path | None, start: int, end: int) -> list[str]:
    found = [
        place
        for place, path in sorted(known.items())
        if path[: len(within)] == within and (apart is None or path[: len(apart)] != apart)
    ]
    first = [place for place in found if start <= place[0] < end]
    return [
        node
        for _, node in (
            *first,
            *(p for p in found if p[0] < min(start, end)),
            *(p for p in found if p[0] >= end),
        )
    ]


@pytest.mark.parametrize("seed", range(6))
def test_once_round_from_anywhere_and_without_a_domain(seed: int) -> None:
    rng = random.Random(seed)
    spread, known = Spread(), dict[Place, Path]()
    length = 2 + 20 * (seed % 3)  # of a domain in the order
    for step in range(400):
        number = rng.randrange(60)
        place = (number, f"n{rng.randrange(3)}-{number}")
        path = (f"z{number // length % 2}", rng.choice((None, "a", "b")))
        if place in known:
            spread.remove(place)
            del known[place]
        else:
            known[place] = path
            spread.add(place, path)
        if step % 4 == 0:
            start, end = rng.randrange(62), rng.choice((50, 60, 61))
            at = rng.choice(list(known.values())) if known else ("z0", "a")
            for within, apart in (
                *outwards(at, 0, 0),
                *outwards(at, 0, 1),
                *outwards(at, 1, 1),
                *outwards(at, 1, 2),
            ):
                found = list(spread.between(within, apart, start, end))
                assert found == naive(known, within, apart, start, end)


def test_a_long_run_of_one_domain_is_passed_in_a_few_steps() -> None:
    costs = {}
    for nodes in (64, 4096):
        spread = Spread()
        for number in range(nodes):
            spread.add((number, f"n{number}"), ("far" if number == nodes - 1 else "near",))
        assert next(spread.between((), ("near",), 0, 5000)) == f"n{nodes - 1}"
        costs[nodes] = calls(lambda spread=spread: next(spread.between((), ("near",), 0, 5000)))
    assert costs[4096] < 3 * costs[64]
