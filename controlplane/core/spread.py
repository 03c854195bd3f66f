"""Nodes in an order, of which those outside of a fault domain are found without a look at those inside.

A zone is often a long run of the ring: whoever looks for a node in another one would pass half of the group, and do so
for each stage again.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from controlplane.contract.ids import NodeId

Path = tuple[str | None, ...]  # the domains that a node is in, outermost first
Place = tuple[int, NodeId]


class Spread:
    """Nodes by their places, as a whole and for each domain that somebody asks for."""

    def __init__(self) -> None:
        self._paths: dict[Place, Path] = {}
        self._depths: dict[int, dict[Path, list[Place]]] = {}  # those of the depths that were asked for

    def add(self, place: Place, path: Path) -> None:
        self._paths[place] = path
        for depth, domains in self._depths.items():
            bisect.insort(domains.setdefault(path[:depth], []), place)

    def remove(self, place: Place) -> None:
        path = self._paths.pop(place)
        for depth, domains in self._depths.items():
            places = domains[path[:depth]]
            del places[bisect.bisect_left(places, place)]

    def _inside(self, domain: Path) -> list[Place]:
        depth = len(domain)
        if depth not in self._depths:
            domains = self._depths[depth] = dict[Path, list[Place]]()
            for place in sorted(self._paths):
                domains.setdefault(self._paths[place][:depth], []).append(place)
        return self._depths[depth].get(domain, [])

    def between(self, within: Path, apart: Path | None, start: int, end: int) -> Iterator[NodeId]:
        """Those inside of `within` and outside of `apart`, which is a part of it: once round from the number `start`
        on, and after that those from `end` on."""
        places = self._inside(within)
        passed = [] if apart is None else self._inside(apart)
        if len(passed) == len(places):
            return
        first, last = bisect.bisect_left(places, (start, "")), bisect.bisect_left(places, (end, ""))
        for at, until in ((first, last), (0, min(first, last)), (last, len(places))):
            while at < until:
                if run := _run(places, passed, at):
                    at += run
                else:
                    yield places[at][1]
                    at += 1


def _run(places: list[Place], passed: list[Place], at: int) -> int:
    """How many of `places` from `at` on are in `passed`, a part of them, one after the other: as long as they are, the
    two lists go on alike."""
    start = bisect.bisect_left(passed, places[at])
    limit = min(len(places) - at, len(passed) - start)

    def alike(count: int) -> bool:
        return places[at + count - 1] == passed[start + count - 1]

    longest = 1
    while longest <= limit and alike(longest):
        longest *= 2
    low, high = longest // 2, min(longest - 1, limit)  # so many are alike for sure, so many may be
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if alike(middle) else (low, middle - 1)
    return low


class Shelves:
    """Nodes in classes, each with its order. `classes` are sorted: the first is the best."""

    def __init__(self) -> None:
        self._spreads: dict[tuple[int, ...], Spread] = {}
        self._nodes: dict[NodeId, tuple[tuple[int, ...], int, Path]] = {}

    def add(self, node: NodeId, number: int, path: Path, of: tuple[int, ...]) -> None:
        self._nodes[node] = of, number, path
        self._spreads.setdefault(of, Spread()).add((number, node), path)

    def of(self, node: NodeId) -> tuple[int, ...] | None:
        """Its class, if it is here."""
        return self._nodes[node][0] if node in self._nodes else None

    def move(self, node: NodeId, to: tuple[int, ...]) -> None:
        before, number, path = self._nodes[node]
        if before != to:
            self._spreads[before].remove((number, node))
            self.add(node, number, path, to)

    def classes(self) -> list[tuple[int, ...]]:
        return sorted(self._spreads)

    def between(
        self, of: tuple[int, ...], within: Path, apart: Path | None, start: int, end: int
    ) -> Iterator[NodeId]:
        """See Spread.between."""
        spread = self._spreads.get(of)
        return iter(()) if spread is None else spread.between(within, apart, start, end)


def outwards(path: Path, base: int, least: int) -> Iterator[tuple[Path, Path | None]]:
    """The neighbourhood of whoever is in `path`, inside of its first `base` domains, from the farthest to the nearest:
    each as inside of one domain and outside of another. All that share no more than `least` count as the farthest."""
    yield path[:base], path[: least + 1] if least < len(path) else None
    for depth in range(least + 1, len(path) + 1):
        yield path[:depth], path[: depth + 1] if depth < len(path) else None
