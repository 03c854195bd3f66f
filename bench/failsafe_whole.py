"""A whole trace of faults, from what each number of ranks serves without any: a year is too long to go step by step.

Of ours, a loss costs its pause, a return nothing; of standard, a restart and half of what is in flight.

How many times better ours is has four factors: what restarts cost standard, what it leaves idle, what our changes cost,
and what exact sums cost. The ceiling is a system that has each rank serve whenever it is alive, at the best rate that a
rank has with the usual sums in a group of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.failsafe_model import Model
from bench.failsafe_systems import DETECT_S, START_S, fits, restart_s
from bench.failsafe_traces import FaultTrace, Group

PAUSE_S = 0.5  # of ours, for a loss: more than any that was simulated
SLOW_START_S = (300.0, 600.0)  # of an engine, for what slower restarts would make of the comparison


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second by number of ranks; `in_flight`: tokens that standard has computed of requests under way."""

    ours: dict[int, float]
    usual: dict[int, float]  # ours with the usual sums
    standard: dict[int, float]
    in_flight: dict[int, float]


def whole_trace(trace: FaultTrace, model: Model, rates: Rates) -> dict[str, float | int | str]:
    """Tokens a second of all groups together."""
    ours, usual = (_all_of_ours(trace, of, START_S) for of in (rates.ours, rates.usual))
    standard = _standards(trace, model, rates, START_S)
    whole = len(trace.groups) * rates.ours[8]
    usual_free = _free(trace, lambda ranks: rates.usual.get(ranks, 0.0))
    standard_free = _free(trace, lambda ranks: rates.standard.get(_power(ranks, model), 0.0))
    row: dict[str, float | int | str] = {
        "whole_ours": ours / trace.seconds,
        "whole_float": usual / trace.seconds,
        "whole_standard": standard / trace.seconds,
        "whole_without_faults": whole,
        "ranks_mean": _free(trace, float) / trace.seconds / len(trace.groups),
        "factor_restarts": standard_free / standard,
        "factor_idle_ranks": usual_free / standard_free,
        "factor_changes": usual / usual_free,
        "factor_sums": ours / usual,
        "ceiling_ratio": ceiling(trace, rates) * trace.seconds / standard,
    }
    for start_s in SLOW_START_S:
        slow = _standards(trace, model, rates, start_s)
        row[f"ratio_start_{start_s:.0f}s"] = _all_of_ours(trace, rates.ours, start_s) / slow
        row[f"ratio_float_start_{start_s:.0f}s"] = _all_of_ours(trace, rates.usual, start_s) / slow
    return row


def ceiling(trace: FaultTrace, rates: Rates) -> float:
    """Tokens a second of all groups together, of a system that loses nothing."""
    best = max(rate / ranks for ranks, rate in rates.usual.items())
    return _free(trace, lambda ranks: ranks * best) / trace.seconds


def _free(trace: FaultTrace, rate: Callable[[int], float]) -> float:
    """Tokens of all groups together, if ranks came and went at no cost."""
    total = 0.0
    for group in trace.groups:
        now, alive = 0.0, len(group.up)
        for event in group.events:
            total += (event.at_s - now) * rate(alive)
            now, alive = event.at_s, alive + (1 if event.up else -1)
        total += (trace.seconds - now) * rate(alive)
    return total


def _standards(trace: FaultTrace, model: Model, rates: Rates, start_s: float) -> float:
    """Tokens of all groups, each with the better of the two rules for growing."""
    return sum(
        max(_standard(group, trace.seconds, model, rates, grows, start_s) for grows in (True, False))
        for group in trace.groups
    )


def _all_of_ours(trace: FaultTrace, rates: dict[int, float], start_s: float) -> float:
    return sum(_ours(group, trace.seconds, rates, start_s) for group in trace.groups)


def _ours(group: Group, seconds: float, rates: dict[int, float], start_s: float) -> float:
    """A rank that is back serves after it has started, unless it is lost before."""
    ready, now, total = set(group.up), 0.0, 0.0
    starting: dict[int, float] = {}
    for event in [*group.events, None]:
        until = event.at_s if event else seconds
        for rank, at in sorted(starting.items(), key=lambda each: each[1]):
            if at <= until:
                total, now = total + (at - now) * rates.get(len(ready), 0.0), at
                ready.add(rank)
                del starting[rank]
        total, now = total + (until - now) * rates.get(len(ready), 0.0), until
        if event is None:
            break
        starting.pop(event.rank, None)
        if event.up:
            starting[event.rank] = event.at_s + start_s
        elif event.rank in ready:
            ready.discard(event.rank)
            total -= min(PAUSE_S * rates.get(len(ready), 0.0), total)
    return total


def _standard(group: Group, seconds: float, model: Model, rates: Rates, grows: bool, start_s: float) -> float:
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
            used, ready_at = again, now + DETECT_S + restart_s(model, start_s)
    return total


def _used(alive: set[int], used: frozenset[int], model: Model) -> frozenset[int]:
    count = _power(len(alive), model)
    return frozenset(sorted(alive, key=lambda rank: (rank not in used, rank))[:count])


def _power(ranks: int, model: Model) -> int:
    """The largest power of two of so many ranks, if the model has room on it; else 0."""
    count = 1 << (ranks.bit_length() - 1) if ranks else 0
    return count if count and fits(model, count) else 0
