"""A whole trace of faults, from what each number of ranks serves without any: a year is too long to go step by step.

Of ours, a loss costs its pause, a return nothing; of standard, a restart and half of what is in flight."""

from __future__ import annotations

from dataclasses import dataclass

from bench.failsafe_model import Model
from bench.failsafe_systems import DETECT_S, START_S, fits, restart_s
from bench.failsafe_traces import FaultTrace, Group

PAUSE_S = 0.5  # of ours, for a loss: more than any that was simulated


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second by number of ranks; `in_flight`: tokens that standard has computed of requests under way."""

    ours: dict[int, float]
    usual: dict[int, float]  # ours with the usual sums
    standard: dict[int, float]
    in_flight: dict[int, float]


def whole_trace(trace: FaultTrace, model: Model, rates: Rates) -> dict[str, float | int | str]:
    """Tokens a second of all groups together."""
    ours, usual = (
        sum(_ours(group, trace.seconds, of) for group in trace.groups) for of in (rates.ours, rates.usual)
    )
    standard = sum(
        max(_standard(group, trace.seconds, model, rates, grows) for grows in (True, False))
        for group in trace.groups
    )
    whole = len(trace.groups) * rates.ours[8]
    return {
        "whole_ours": ours / trace.seconds,
        "whole_float": usual / trace.seconds,
        "whole_standard": standard / trace.seconds,
        "whole_without_faults": whole,
        "ranks_mean": sum(_ranks(group, trace.seconds) for group in trace.groups)
        / trace.seconds
        / len(trace.groups),
    }


def _ranks(group: Group, seconds: float) -> float:
    total, now, alive = 0.0, 0.0, len(group.up)
    for event in group.events:
        total += (event.at_s - now) * alive
        now, alive = event.at_s, alive + (1 if event.up else -1)
    return total + (seconds - now) * alive


def _ours(group: Group, seconds: float, rates: dict[int, float]) -> float:
    """A rank that is back serves after it has started."""
    changes = [(e.at_s + START_S * e.up, e.rank, e.up) for e in group.events]
    lost_at = [(e.at_s, e.rank) for e in group.events if not e.up]
    ready, now, total = set(group.up), 0.0, 0.0
    for at, rank, up in [*sorted(changes), (seconds, -1, True)]:
        at = min(at, seconds)
        total += (at - now) * rates.get(len(ready), 0.0)
        now = at
        if up and rank >= 0 and not any(at - START_S < lost < at for lost, other in lost_at if other == rank):
            ready.add(rank)
        elif not up and rank in ready:
            ready.discard(rank)
            total -= min(PAUSE_S * rates.get(len(ready), 0.0), total)
    return total


def _standard(group: Group, seconds: float, model: Model, rates: Rates, grows: bool) -> float:
    alive, now, total = set(group.up), 0.0, 0.0
    used = _used(alive, frozenset(), model)
    ready_at = 0.0
    for event in [*group.events, None]:
        at = event.at_s if event else seconds
        total += max(0.0, at - max(now, ready_at)) * rates.standard.get(len(used), 0.0)
        now = at
        if event is None:
            break
        (alive.add if event.up else alive.discard)(event.rank)
        again = _used(alive, used, model)
        if event.rank in used or (event.up and (not used or (grows and len(again) > len(used)))):
            if now > ready_at:
                total -= min(rates.in_flight.get(len(used), 0.0), total)
            used, ready_at = again, now + DETECT_S + restart_s(model)
    return total


def _used(alive: set[int], used: frozenset[int], model: Model) -> frozenset[int]:
    most = len(alive)
    while most:
        count = 1 << (most.bit_length() - 1)
        if fits(model, count):
            return frozenset(sorted(alive, key=lambda rank: (rank not in used, rank))[:count])
        most = count - 1
    return frozenset()
