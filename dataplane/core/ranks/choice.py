"""Shrink, borrow or restart: what a stage that has lost ranks does, by what each is predicted to cost.

The cost of a way is what is not served because of it until the lost ranks are back, in tokens: nothing while it pauses,
then no more than its capacity. One unit for all ways, so a short pause with less capacity afterwards and a long one
with all of it can be weighed."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Way(enum.StrEnum):
    SHRINK = "shrink"  # go on with the ranks that are left
    BORROW = "borrow"  # another pipeline's stage serves this one, too
    RESTART = "restart"  # begin again, with what is there then


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one way. `pause_s`: until tokens flow again. `capacity`: tokens a second afterwards, of all that it changes: a
    pipeline that lends a stage serves less itself, which counts. `recomputed_tokens`: what has to be computed again."""

    way: Way
    pause_s: float
    capacity: float
    recomputed_tokens: int = 0


def unserved_tokens(of: Prediction, demand: float, repair_s: float) -> float:
    """What is not served within `repair_s` of a demand of so many tokens a second. Infinite without capacity."""
    if of.capacity <= 0:
        return float("inf")
    paused = min(of.pause_s, repair_s)
    return (
        paused * demand
        + (repair_s - paused) * max(0.0, demand - of.capacity)
        + min(of.recomputed_tokens, of.capacity * (repair_s - paused))
    )


def choose(ways: Iterable[Prediction], demand: float, repair_s: float) -> Prediction | None:
    """The way that leaves least unserved; of equals the one with the shortest pause, then in the order of Way.
    `demand`: tokens a second that are asked for; `repair_s`: until the ranks are expected back. None: no way serves."""
    order = list(Way)
    best = min(
        ways,
        key=lambda each: (unserved_tokens(each, demand, repair_s), each.pause_s, order.index(each.way)),
        default=None,
    )
    return best if best is not None and best.capacity > 0 else None
