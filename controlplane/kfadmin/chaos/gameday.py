"""The course of a game day (pure): which fault begins, ends, is over, and when the day is called off.

Guard rails: no fault begins while it would make more than `max_unavailable` processes unavailable, those included that
are away by themselves; none begins on a process that is away. A stream that suffers, a cluster that does not come home,
and a fault that cannot be undone end the day: what is under way is undone, and no other fault begins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

from controlplane.kfadmin.chaos.plan import LASTING, Fault, FaultKind, Plan, Role, role_of
from controlplane.kfadmin.chaos.sight import Sight

# After a fault has been undone a look may still show the cluster as it was: reports take a moment.
SETTLE_S = 1.0


class Phase(StrEnum):
    PENDING = "pending"  # of its time, or held back by a guard rail
    BEGINNING = "beginning"
    UNDER_WAY = "under way"
    ENDING = "ending"
    HEALING = "healing"  # undone; not everything is home yet
    HOME = "home"  # over
    REFUSED = "refused"  # it could not begin: nothing was changed
    NOT_BEGUN = "not begun"  # the day was over before
    STUCK = "stuck"  # it could not be undone


OPEN = frozenset({Phase.BEGINNING, Phase.UNDER_WAY, Phase.ENDING, Phase.HEALING})


@dataclass(slots=True)
class Course:
    """How far one fault is. Times are those of `now`, seconds; 0: not yet."""

    number: int
    fault: Fault
    phase: Phase = Phase.PENDING
    target: str = ""  # the process
    began: float = 0.0
    undone: float = 0.0
    home: float = 0.0
    said: str = ""  # why it was refused, or is stuck


@dataclass(frozen=True, slots=True)
class Looked:
    """A look that was begun after the last event was taken in. `sight` None: no controller answered."""

    sight: Sight | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Begun:
    number: int


@dataclass(frozen=True, slots=True)
class Undone:
    number: int


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked for could not be done."""

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class Suffered:
    """A stream did: an error, a token that differs, a pause over the limit."""

    why: str


@dataclass(frozen=True, slots=True)
class CalledOff:
    """By the operator."""


Event = Looked | Begun | Undone | Failed | Suffered | CalledOff


@dataclass(frozen=True, slots=True)
class Begin:
    number: int
    kind: FaultKind
    target: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Undo:
    number: int
    kind: FaultKind
    target: str


@dataclass(frozen=True, slots=True)
class Finish:
    """No more faults; `why` the day was cut short, or ""."""

    why: str


Effect = Begin | Undo | Finish


@dataclass(slots=True)
class GameDay:
    """`processes`: names of all that belong to the cluster. `began`: the clock's `now` as faults begin."""

    plan: Plan
    processes: Sequence[str]
    began: float
    courses: list[Course] = field(init=False)
    why: str = field(default="", init=False)  # it was cut short
    finished: bool = field(default=False, init=False)
    _rng: random.Random = field(init=False)
    _last_home: float = field(init=False)

    def __post_init__(self) -> None:
        self.courses = [Course(number, fault) for number, fault in enumerate(self.plan.faults, 1)]
        self._rng = random.Random(self.plan.seed)
        self._last_home = self.began

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; what is to be done, in this order."""
        match event:
            case Begun(number):
                self._begun(self.courses[number - 1], now)
            case Undone(number):
                course = self.courses[number - 1]
                course.phase, course.undone = Phase.HEALING, now
            case Failed(number, why):
                self._failed(self.courses[number - 1], why)
            case Suffered(why):
                self._call_off(why)
            case CalledOff():
                self._call_off("called off by the operator")
            case Looked(sight, why):
                return self._looked(sight, why, now)
            case _:
                assert_never(event)
        return self._undo(now)

    def _begun(self, course: Course, now: float) -> None:
        if course.fault.kind in LASTING:
            course.phase = Phase.UNDER_WAY
        else:
            course.phase, course.undone = Phase.HEALING, now

    def _failed(self, course: Course, why: str) -> None:
        course.said = why
        if course.phase is Phase.BEGINNING:
            course.phase = Phase.REFUSED
        else:
            course.phase = Phase.STUCK
            self._call_off(f"fault {course.number} could not be undone: {why}")

    def _call_off(self, why: str) -> None:
        self.why = self.why or why

    def _looked(self, sight: Sight | None, why: str, now: float) -> list[Effect]:
        if sight is not None and sight.home:
            for course in self._open():
                if course.phase is Phase.HEALING and now >= course.undone + SETTLE_S:
                    course.phase, course.home = Phase.HOME, now
        effects = self._undo(now)
        opened = self._open()
        if not opened and sight is not None and sight.home:
            self._last_home = now
        elif any(course.phase is not Phase.HEALING for course in opened):
            self._last_home = now  # it cannot be home yet
        elif now - self._last_home > self.plan.home_max_s:
            seen = sight.why if sight is not None else f"no controller answers: {why}"
            self._call_off(f"not home after {self.plan.home_max_s:g} s: {seen}")
        if not self.why and sight is not None:
            effects += self._begin(sight, now)
        effects += self._finish(now)
        return effects

    def _open(self) -> list[Course]:
        return [course for course in self.courses if course.phase in OPEN]

    def _undo(self, now: float) -> list[Effect]:
        """Those whose time is over; all of them, once the day has been called off."""
        effects: list[Effect] = []
        for course in self.courses:
            if course.phase is Phase.UNDER_WAY and (self.why or now >= course.began + course.fault.for_s):
                course.phase = Phase.ENDING
                effects.append(Undo(course.number, course.fault.kind, course.target))
        return effects

    def _begin(self, sight: Sight, now: float) -> list[Effect]:
        """The next ones that are due and that the guard rails let pass."""
        effects: list[Effect] = []
        if sight.amiss and not self._open():
            return effects
        taken = {course.target for course in self._open()}
        for course in self.courses:
            if course.phase is not Phase.PENDING or now < self.began + course.fault.at_s:
                continue
            if self._over(now) or len(taken | sight.away.keys()) >= self.plan.max_unavailable:
                break
            target = self._target(course.fault, sight, taken)
            if not target:
                break  # whom it is about is away; it waits, and those behind it, too
            course.phase, course.target, course.began = Phase.BEGINNING, target, now
            taken.add(target)
            effects.append(Begin(course.number, course.fault.kind, target, course.fault.for_s))
        return effects

    def _target(self, fault: Fault, sight: Sight, taken: set[str]) -> str:
        """A process that is there and that no other fault is about; "": there is none."""
        if fault.target == Role.LEADER:
            named = [sight.leader]
        else:
            named = [name for name in self.processes if fault.target in (name, role_of(name))]
        there = sorted(set(named) - taken - sight.away.keys() - {""})
        return self._rng.choice(there) if there else ""

    def _over(self, now: float) -> bool:
        return bool(self.plan.for_s) and now >= self.began + self.plan.for_s

    def _finish(self, now: float) -> list[Effect]:
        pending = any(course.phase is Phase.PENDING for course in self.courses)
        lasts = now < self.began + self.plan.for_s or (pending and not self._over(now))
        if self.finished or any(course.phase is not Phase.HEALING for course in self._open()):
            return []
        if self._open() and now - self._last_home <= self.plan.home_max_s:
            return []
        if lasts and not self.why:
            return []
        for course in self.courses:
            if course.phase is Phase.PENDING:
                course.phase = Phase.NOT_BEGUN
        self.finished = True
        return [Finish(self.why)]
