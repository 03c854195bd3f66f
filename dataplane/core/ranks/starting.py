"""Which request starts next, and at which rank, so that ranks have the same room taken and all have prompts to compute.

Ranks wait for each other in every layer, so a prompt is best owned by a rank that has none. In a full stage the room is
where a request has just ended, which may be elsewhere. Then a request that is decoded moves there from the rank that
has no prompt: only its data-parallel heads' KV goes over, some milliseconds' time between ranks of a host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

# Requests of a rank that are looked at, the oldest: a start costs no more in a stage of hundreds.
MOVABLE = 16


@dataclass(frozen=True, slots=True)
class Start:
    """A request begins at a rank, its owner. `moves`: another, which is decoded, goes to the rank `target` first."""

    request: int
    rank: int
    moves: int | None = None
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Sized:
    """A request and the positions that it will have, as far as that is known."""

    request: int
    room: int


def choose_start(
    rooms: Mapping[int, int],
    without_prompts: Collection[int],
    waiting: Iterable[Sized],
    decoded: Callable[[int], Iterable[Sized]],
) -> Start | None:
    """Of these starts the one after which the rooms of all ranks are closest together, of equals the one whose request
    waits longest. `rooms`: positions that each rank's requests have or will have; `decoded`: of a rank's requests those
    without prompt tokens to compute, oldest first. None: no request waits."""
    wait = list(waiting)
    if not wait:
        return None
    least = min(rooms, key=lambda rank: (rooms[rank], rank))
    if not without_prompts or least in without_prompts:
        return _closest(rooms, least, least, wait, ())
    rank = min(without_prompts, key=lambda each: (rooms[each], each))
    movable = list(itertools.islice(decoded(rank), MOVABLE))
    return _closest(rooms, rank, least, wait, movable) or _closest(rooms, least, least, wait, ())


def _closest(
    rooms: Mapping[int, int], rank: int, target: int, wait: Iterable[Sized], movable: Iterable[Sized]
) -> Start | None:
    """`rank` is `target`: nothing moves. None: nothing can move."""
    others = [room for each, room in rooms.items() if each not in (rank, target)]
    most, least = max(others, default=0), min(others, default=None)
    best: tuple[int, Start] | None = None
    nothing: Iterable[Sized | None] = (None,)
    for start, move in itertools.product(wait, nothing if rank == target else movable):
        here = rooms[rank] + start.room - (move.room if move else 0)
        there = rooms[target] + move.room if move else here
        low = min(here, there)
        spread = max(here, there, most) - (low if least is None else min(low, least))
        if best is None or spread < best[0]:
            found = Start(start.request, rank, move.request, target) if move else Start(start.request, rank)
            best = (spread, found)
    return best[1] if best else None
