"""What a game day has shown (pure): every fault with the pauses that streams had through it, every stream checked."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from controlplane.contract.incidents import Incident
from controlplane.kfadmin.chaos.gameday import Course, GameDay, Phase
from controlplane.kfadmin.chaos.load import Load, Outcome
from controlplane.kfadmin.chaos.plan import Plan, Role, role_of

MATCHED_S = 1.0  # an incident begins at the last sign of life, which is before the fault, by a beat at most


class FaultReport(msgspec.Struct, frozen=True):
    """Seconds; None: it did not come to that, or no stream ran."""

    number: int
    kind: str
    target: str  # the process
    outcome: str  # a Phase
    planned_s: float  # when it was due
    began_s: float | None = None
    lasted_s: float | None = None  # until it was undone
    home_s: float | None = None  # from its beginning until everything was home
    streams: int = 0  # that ran meanwhile
    pause_median_s: float | None = None  # of the longest wait of each of these
    pause_max_s: float | None = None
    # Of the cluster's own incident: detect, plan, connect, restore, first token.
    phases: dict[str, float] = {}
    said: str = ""


class Report(msgspec.Struct, frozen=True):
    ok: bool  # every stream was as its reference, no pause was over the limit, and the day came to its end
    why: str  # not ok, or called off
    cluster: str
    model: str
    began_unix_s: float
    lasted_s: float
    plan: Plan
    faults: list[FaultReport]
    streams: list[Outcome]
    tokens: int
    different: int  # streams that were not as their references, errors included
    calm_pause_max_s: float | None  # the longest wait while nothing was broken


def made(
    plan: Plan,
    day: GameDay,
    load: Load,
    times: tuple[float, float, float],
    named: tuple[str, str],
    incidents: Sequence[Incident],
) -> Report:
    """`times`: began (of the clock of the courses), the same in unix seconds, ended. `named`: cluster and model."""
    began, began_unix_s, ended = times
    different = sum(not one.equal or bool(one.error) for one in load.outcomes)
    slow = sum(one.pause_max_s > plan.pause_max_s for one in load.outcomes)
    why = day.why or (
        f"{different} streams differ" if different else f"{slow} streams paused too long" if slow else ""
    )
    if not why and not load.outcomes:
        why = "no stream came to its end"
    faults = [
        _fault(course, load, began, _incident(course, incidents, began_unix_s - began))
        for course in day.courses
    ]
    return Report(
        ok=not why,
        why=why,
        cluster=named[0],
        model=named[1],
        began_unix_s=round(began_unix_s, 3),
        lasted_s=round(ended - began, 3),
        plan=plan,
        faults=faults,
        streams=sorted(load.outcomes, key=lambda one: one.number),
        tokens=sum(one.tokens for one in load.outcomes),
        different=different,
        calm_pause_max_s=_rounded(load.pauses.worst(0)),
    )


def _fault(course: Course, load: Load, began: float, incident: Incident | None) -> FaultReport:
    pauses, number = load.pauses, course.number
    # Moments of the day are rounded before they are subtracted, so that durations add up to the next one's beginning.
    at, undone, home = (round(moment - began, 4) for moment in (course.began, course.undone, course.home))
    return FaultReport(
        number=number,
        kind=course.fault.kind.value,
        target=course.target or course.fault.target,
        outcome=course.phase.value,
        planned_s=course.fault.at_s,
        began_s=at if course.began else None,
        lasted_s=_rounded(undone - at) if course.undone else None,
        home_s=_rounded(home - at) if course.home else None,
        streams=pauses.streams(number),
        pause_median_s=_rounded(pauses.median(number)),
        pause_max_s=_rounded(pauses.worst(number)),
        phases=_phases(incident) if incident is not None else {},
        said=course.said,
    )


def _incident(course: Course, incidents: Sequence[Incident], to_unix_s: float) -> Incident | None:
    """What the cluster itself tells of a fault of a node."""
    if course.phase is not Phase.HOME or role_of(course.target) is not Role.NODE:
        return None
    first, last = course.began + to_unix_s - MATCHED_S, course.home + to_unix_s
    return next(
        (one for one in incidents if one.node == course.target and first <= one.began_unix_s <= last), None
    )


def _phases(incident: Incident) -> dict[str, float]:
    found = {"detect": incident.detect_s}
    if (last := incident.slowest) is not None:
        told = {
            "plan": last.plan_s,
            "connect": last.connect_s,
            "restore": last.restore_s,
            "first token": last.first_token_s,
        }
        found |= {name: seconds for name, seconds in told.items() if seconds is not None}
    return {name: round(seconds, 4) for name, seconds in found.items()}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
