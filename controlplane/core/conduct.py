"""What members' own figures say of their health: hung, slow, or wrong numbers. The rules that weigh it: evidence.py.

A member that was found at fault is on probation for a while, under its node's name, so that a fresh process of a
broken machine does not bring the trouble back at once; each relapse doubles the time. On probation it gets no new
duty as long as anybody else is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import msgspec

from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.reports import NodeReport
from controlplane.core.pace import EVERY_S, TELLING, Paces, Slowness

SLOW_FOR_S = 0.8  # more time slow than not ...
SLOW_SURELY = 2.0  # ... of which what is this many times over the limit counts so many times
STUCK = 20.0  # times as long as such a computation usually takes
POISON_WINDOW_S = 10.0
PROBATION_S = 10.0  # doubled by each relapse ...
PROBATION_MAX_S = 600.0
RELAPSE_S = 600.0  # ... within so long after it ended


@dataclass(slots=True)
class _Figures:
    stage: int = -1
    busy_s: float = 0.0
    usual_s: float = 0.0
    still_s: float | None = None
    poisoned: int = 0
    poisonings: deque[tuple[float, int]] = field(default_factory=deque)  # when, how many requests
    slowness: Slowness = field(default_factory=Slowness)
    slow_s: float = 0.0  # grows while it is slow and shrinks while it is not


@dataclass(slots=True)
class _Probation:
    until: float
    length_s: float
    why: str


class Symptoms(msgspec.Struct, frozen=True):
    # Its computation takes far longer than usual, on a device that does not say whether it advances.
    stuck_s: float = 0.0
    still_s: float = 0.0  # its computation has not advanced for so long
    advances: bool = False  # it computes, and was seen to advance
    poisoned: int = 0  # requests whose numbers it spoilt lately
    peers_poisoned: bool = False  # and so did peers: it is the requests
    probation: str = ""  # why
    relapses: float = 1.0  # how many times the first probation this one lasts


class Conduct:
    def __init__(self, timing: TimingConfig) -> None:
        self.told: set[Member] = set()
        self._timing = timing
        self._paces = Paces()
        self._figures: dict[Member, _Figures] = {}
        self._probation: dict[NodeId, _Probation] = {}
        self._compared = 0.0
        self._poisoned: set[Member] = set()  # with poisonings
        self._slow: set[Member] = set()  # slow, or so a moment ago

    def reported(self, report: NodeReport, now: float) -> bool:
        """Note a report; whether it says something unusual."""
        figures = self._figures.get(report.member)
        if figures is None:
            figures = self._figures[report.member] = _Figures()
        if report.pipelines:
            figures.stage = report.pipelines[0].stage
        figures.busy_s, figures.usual_s, figures.still_s = report.busy_s, report.usual_s, report.still_s
        if report.poisoned > figures.poisoned:
            figures.poisonings.append((now, report.poisoned - figures.poisoned))
            figures.poisoned = report.poisoned
            self._poisoned.add(report.member)
        self._paces.reported(report, now)
        return report.member in self._poisoned or self._stuck_s(figures) > 0.0 or self._still_s(figures) > 0.0

    def forget(self, member: Member) -> None:
        self._figures.pop(member, None)
        self._poisoned.discard(member)
        self._slow.discard(member)
        self._paces.forget(member)

    def compare(self, now: float, doubtful: Iterable[Member], demoted: Collection[Member] = ()) -> None:
        """Once for each evaluation, before `symptoms`; `told` then has of whom something is to be said."""
        self._paces.compare(now, doubtful, demoted)
        self._slow.update(self._paces.told)
        passed_s, self._compared = min(now - self._compared, EVERY_S), now
        for member in list(self._poisoned):
            poisonings = self._figures[member].poisonings
            while poisonings and now - poisonings[0][0] > POISON_WINDOW_S:
                poisonings.popleft()
            if not poisonings:
                self._poisoned.discard(member)
        self.told = self._poisoned | self._slow
        for member in list(self._slow):
            figures = self._figures[member]
            figures.slowness = self._paces.found(member)
            degree = figures.slowness.degree
            slow = degree >= (1.0 if self.probation(member.node, now) is None else TELLING)
            weighs_s = passed_s * min(max(degree, 1.0), SLOW_SURELY) if slow else -passed_s
            figures.slow_s = min(max(figures.slow_s + weighs_s, 0.0), SLOW_FOR_S)
            if figures.slow_s >= SLOW_FOR_S:
                self.put_on_probation(member.node, str(figures.slowness), now)
            elif not slow and figures.slow_s == 0.0:
                self._slow.discard(member)

    def _stuck_s(self, figures: _Figures) -> float:
        limit_s = max(1.5 * self._timing.dead_after_s, STUCK * figures.usual_s)
        stuck = figures.still_s is None and figures.usual_s > 0.0 and figures.busy_s >= limit_s
        return figures.busy_s if stuck else 0.0

    def _still_s(self, figures: _Figures) -> float:
        still_s = figures.still_s or 0.0
        return still_s if still_s >= self._timing.dead_after_s else 0.0

    def symptoms(self, member: Member, now: float) -> Symptoms:
        figures = self._figures.get(member)
        on = self.probation(member.node, now)
        probation, relapses = ("", 1.0) if on is None else (on.why, on.length_s / PROBATION_S)
        if figures is None:
            return Symptoms(probation=probation, relapses=relapses)
        still_s = self._still_s(figures)
        return Symptoms(
            stuck_s=self._stuck_s(figures),
            still_s=still_s,
            advances=figures.busy_s > 0.0 and figures.still_s is not None and not still_s,
            poisoned=sum(count for _, count in figures.poisonings),
            peers_poisoned=any(
                m != member and self._figures[m].stage == figures.stage for m in self._poisoned
            ),
            probation=probation,
            relapses=relapses,
        )

    def slowness(self, member: Member) -> float:
        """Its degree: 1 and above is slow."""
        return self._paces.found(member).degree

    def probation(self, node: NodeId, now: float) -> _Probation | None:
        found = self._probation.get(node)
        return found if found is not None and now < found.until else None

    def put_on_probation(self, node: NodeId, why: str, now: float, trusted: bool = False) -> None:
        """It begins, or goes on: only one that comes after the last was over counts as a relapse, or of a node that had
        duties again meanwhile (`trusted`)."""
        last = self._probation.get(node)
        if last is None or now - last.until >= RELAPSE_S:
            self._probation[node] = _Probation(now + PROBATION_S, PROBATION_S, why)
        elif now < last.until and not trusted:
            last.until, last.why = now + last.length_s, why
        else:
            length_s = min(2 * last.length_s, PROBATION_MAX_S)
            self._probation[node] = _Probation(now + length_s, length_s, why)
