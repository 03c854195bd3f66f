"""How slow each member is, compared with its peers of the same stage, with its own past, and with everybody.

Two things show it. Computations take longer: only steps of one size are compared, by the clock. And timers are
overdue: who does not get to run (a throttled or overcommitted processor) finishes a short step in the slice that it
woke up for, and what it sleeps through is seen nowhere else. How long they are overdue counts, not how often: on a
machine that is merely busy many timers come a little late. What slows all machines down alike (they may share a host)
is nobody's fault.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, StepTimes

WINDOW_S = 0.5  # what "now" means: who once lost its core for a moment is soon cleared
PAUSE_S_MAX = 3.0  # who is asked for a report more rarely: what ran between the last two of them is "now"
EVERY_S = 0.2  # between two comparisons
MARKS_MAX = 256
TIMED_MIN_S = 0.2  # less in a window says nothing
PAST_S = 60.0  # what is older was another time ...
FRESH_S = 5.0  # ... and at peers it is another time sooner
# Added to both sides of a comparison: a few steps that lost their core weigh little, a node that is busy with being
# slow weighs much.
CALM_S = 0.05
LEARN = 0.05  # share of a window in what the past is taken to be
LEARN_BELOW = 2.0  # a window this much slower than usual is not what is usual

SLOW = 4.0  # times as long for the same steps ...
SLOW_BESIDE = 20.0  # ... and more on a machine on which all timers are late: there times say less
LATE = 0.35  # share of time in which a timer is overdue, beyond the others'

TELLING = 0.5  # a degree of slowness below this is nothing, also to who is on probation

Totals = dict[int, tuple[int, float]]  # size -> steps, seconds


@dataclass(frozen=True, slots=True)
class Slowness:
    slower: float = 0.0  # times, for the same computations; 0: unknown, or it does not compute
    late: float = 0.0  # share of the time in which its timer was overdue
    others_late: float = 0.0

    @property
    def degree(self) -> float:
        """1 and above is slow."""
        late = (self.late - self.others_late) / LATE
        return max(self.slower / (SLOW * (1.0 + SLOW_BESIDE * self.others_late)), late)

    def __str__(self) -> str:
        late = f"its timers are overdue {self.late:.0%} of the time, others' {self.others_late:.0%}"
        return f"{self.slower:.1f} times slower than its peers, {late}" if self.slower >= SLOW else late


CALM = Slowness()


class _Mark(NamedTuple):  # made for each report: a dataclass takes three times as long
    at: float
    timed_s: float
    overdue_s: float
    times: tuple[StepTimes, ...]


@dataclass(slots=True)
class _Runner:
    stage: int = -1
    # A report each, oldest first.
    marks: deque[_Mark] = field(default_factory=lambda: deque(maxlen=MARKS_MAX))
    late: float = 0.0  # share of the window in which its timer was overdue
    step: tuple[float, float] = (0.0, 0.0)  # age of the one under way, and how long such a step usually takes
    window: Totals = field(default_factory=dict)  # what ran lately
    # Of each size: what a step usually takes, and when that was learnt.
    past: dict[int, tuple[float, float]] = field(default_factory=dict)
    own: float | None = None  # times slower than its own past

    def look(self, now: float) -> None:
        while len(self.marks) > 2 and self.marks[1].at <= now - WINDOW_S:
            self.marks.popleft()
        first, last = self.marks[0], self.marks[-1]
        timed_s, silent_s = last.timed_s - first.timed_s, now - last.at
        if silent_s >= WINDOW_S:  # its step has ended, and its timers ring: else it would have said so
            self.step, timed_s = (0.0, 0.0), 0.0
        self.late = (last.overdue_s - first.overdue_s) / timed_s if timed_s >= TIMED_MIN_S else 0.0
        pause_s = 0.0 if first is last else last.at - self.marks[-2].at
        falls_silent = silent_s >= max(WINDOW_S, min(pause_s, PAUSE_S_MAX))  # that is not for us to judge
        self.window = {} if falls_silent else _since(first.times, last.times)
        self.own = self.times_slower(self._usual(now)) if self.window else None

    def _usual(self, now: float) -> dict[int, float]:
        """What the sizes that ran lately took here until then."""
        known = ((size, self.past[size]) for size in self.window if size in self.past)
        return {size: took_s for size, (took_s, at) in known if now - at < PAST_S}

    def learn(self, now: float) -> None:
        usual = self._usual(now)
        for size, (steps, busy_s) in self.window.items():
            took_s = busy_s / steps
            usual_s = usual.get(size, took_s)
            self.past[size] = (usual_s + LEARN * (took_s - usual_s), now)

    def mean_s(self, size: int, now: float) -> float | None:
        """What a step of this size takes here now, or took a moment ago."""
        if size in self.window:
            steps, busy_s = self.window[size]
            return busy_s / steps
        took_s, at = self.past.get(size, (0.0, -FRESH_S))
        return took_s if now - at < FRESH_S else None

    def times_slower(self, usual: dict[int, float]) -> float | None:
        """What ran lately against what is usual; None: too little of it is known."""
        known = [
            (steps, busy_s, usual[size]) for size, (steps, busy_s) in self.window.items() if size in usual
        ]
        steps = sum(k[0] for k in known)
        if not steps or 2 * steps < sum(steps for steps, _ in self.window.values()):
            return None
        return (CALM_S + sum(k[1] for k in known)) / (CALM_S + sum(k[0] * k[2] for k in known))


def _since(before: tuple[StepTimes, ...], after: tuple[StepTimes, ...]) -> Totals:
    """What ran between two reports of a member."""
    if before == after:
        return {}
    known = {time.size: time for time in before}
    ran: Totals = {}
    for time in after:
        was = known.get(time.size)
        steps, busy_us = (
            (time.steps, time.busy_us)
            if was is None
            else (time.steps - was.steps, time.busy_us - was.busy_us)
        )
        if steps > 0:
            ran[time.size] = (steps, busy_us / 1e6)
    return ran


class Paces:
    """Who has reported since the last comparison is compared; the others are as they were."""

    def __init__(self) -> None:
        self.told: list[Member] = []
        self._runners: dict[Member, _Runner] = {}
        self._found: dict[Member, Slowness] = {}
        self._fresh: set[Member] = set()  # reported since the last comparison
        # Of whom something was found: it ends by itself when they fall silent.
        self._telling: set[Member] = set()
        self._measure = _Measure(self._runners)
        self._next_at = 0.0

    def reported(self, report: NodeReport, now: float) -> None:
        runner = self._runners.get(report.member)
        if runner is None:
            runner = self._runners[report.member] = _Runner()
        if report.pipelines:
            runner.stage = report.pipelines[0].stage
        runner.step = (report.busy_s, report.usual_s)
        runner.marks.append(_Mark(now, report.timed_s, report.overdue_s, report.times))
        self._fresh.add(report.member)

    def forget(self, member: Member) -> None:
        self._runners.pop(member, None)
        self._measure.forget(member)
        self._found.pop(member, None)
        self._fresh.discard(member)
        self._telling.discard(member)

    def found(self, member: Member) -> Slowness:
        return self._found.get(member, CALM)

    def compare(
        self, now: float, doubtful: Iterable[Member], demoted: Collection[Member] = ()
    ) -> Mapping[Member, Slowness]:
        """Everybody as of the last comparison; `told` has who is slow, or was until now. `doubtful` members are no
        measure for others, but those of them that are only `demoted` are for how late timers are: on a full machine
        all may be on probation, and with nobody to be compared with none would ever be cleared."""
        self.told = []
        if now < self._next_at:
            return self._found
        self._next_at = now + EVERY_S
        looked = self._fresh | self._telling
        self._fresh = set()
        if not looked:
            return self._found
        for member in looked:
            self._runners[member].look(now)
        self._measure.renew(looked, set(doubtful), set(demoted), now)
        self.told = [member for member in looked if self._tell(member)]
        for member in looked:
            runner = self._runners[member]
            if runner.window and (runner.own or 0.0) < LEARN_BELOW:
                runner.learn(now)
        return self._found

    def _tell(self, member: Member) -> bool:
        """Compare one; whether anything is to be told of it."""
        before = self.found(member)
        self._found[member] = found = self._slowness(member)
        busy = found.degree >= TELLING
        if busy:
            self._telling.add(member)
        else:
            self._telling.discard(member)
        return busy or before.degree >= TELLING

    def _slowness(self, member: Member) -> Slowness:
        runner, measure = self._runners[member], self._measure
        age_s, usual_s = runner.step
        if not (runner.window or runner.late or usual_s):
            return CALM
        # Peers do the same things in the loop: those of stage 0 schedule and talk to gateways.
        late = max(measure.late(member, None), measure.late(member, runner.stage))
        slower = runner.times_slower(measure.usual(member, runner)) if runner.window else None
        if slower is None and runner.own is not None:
            # Nobody to compare with: its own past, unless times are bad for all.
            slower = runner.own / max(1.0, measure.others_own(member))
        unfinished = (CALM_S + age_s) / (CALM_S + usual_s) if usual_s else 0.0
        return Slowness(max(slower or 0.0, unfinished), runner.late, late)


class _Place(NamedTuple):
    """How a member counts as a measure for others."""

    stage: int
    late: float | None  # None: of whom it is not even known how late their timers are
    peer: bool  # its steps are a measure, too


class _Measure:
    """What a member is compared with: medians over the others, of all and of its stage. Lists are sorted, and a
    member's own value is left out of them without another pass. How late timers are is kept from one comparison to the
    next, so that it costs what those cost who reported since; of steps there is only what somebody asks for."""

    def __init__(self, runners: Mapping[Member, _Runner]) -> None:
        self._runners = runners
        self._apart: set[Member] = set()
        self._mute: set[Member] = set()
        self._now = 0.0
        self._places: dict[Member, _Place] = {}
        self._peers: dict[int, dict[Member, _Runner]] = {}  # by stage
        self._late: dict[int | None, list[float]] = {None: []}  # by stage, and of all
        self._own: list[float] | None = None
        self._means: dict[tuple[int, int], list[float]] = {}

    def renew(self, looked: Set[Member], doubtful: set[Member], demoted: set[Member], now: float) -> None:
        """`looked`: whose figures have changed."""
        mute = doubtful - demoted
        moved = looked | (doubtful ^ self._apart) | (mute ^ self._mute)
        self._apart, self._mute, self._now = doubtful, mute, now
        self._own, self._means = None, {}
        for member in moved:
            runner = self._runners.get(member)
            if runner is not None:
                late = None if member in mute else self._lateness(member, runner)
                self._put(member, _Place(runner.stage, late, member not in doubtful))

    def forget(self, member: Member) -> None:
        self._put(member, None)

    def _put(self, member: Member, place: _Place | None) -> None:
        before = self._places.get(member)
        if before == place:
            return
        if before is not None:
            del self._places[member]
            self._peers[before.stage].pop(member, None)
            if before.late is not None:
                for lates in (self._late[None], self._late[before.stage]):
                    del lates[bisect.bisect_left(lates, before.late)]
        if place is not None:
            self._places[member] = place
            peers = self._peers.setdefault(place.stage, {})
            if place.peer:
                peers[member] = self._runners[member]
            if place.late is not None:
                for lates in (self._late[None], self._late.setdefault(place.stage, [])):
                    bisect.insort(lates, place.late)

    def late(self, member: Member, stage: int | None) -> float:
        """How late the timers of the others are (of one stage; None: of all); 0 without others."""
        return _median_without(self._late.get(stage, []), self._places[member].late) or 0.0

    def _lateness(self, member: Member, runner: _Runner) -> float:
        """What a member says of how late timers are here. One that is demoted may be late by its own fault: it excuses
        as much as a sound one on a full machine would, and not a second slow one."""
        return min(runner.late, LATE) if member in self._apart else runner.late

    def others_own(self, member: Member) -> float:
        """How much slower than their own past the others are; 1: nobody knows."""
        if self._own is None:
            every = (r.own for peers in self._peers.values() for r in peers.values())
            self._own = sorted(own for own in every if own is not None)
        found = _median_without(self._own, self._mine(member, self._runners[member].own))
        return 1.0 if found is None else found

    def usual(self, member: Member, runner: _Runner) -> dict[int, float]:
        """What each size takes at the peers at the same time."""
        usual: dict[int, float] = {}
        for size in runner.window:
            key = (runner.stage, size)
            if key not in self._means:
                peers = self._peers.get(runner.stage, {})
                means = (peer.mean_s(size, self._now) for peer in peers.values())
                self._means[key] = sorted(mean_s for mean_s in means if mean_s is not None)
            own = self._mine(member, runner.mean_s(size, self._now))
            if (found := _median_without(self._means[key], own)) is not None:
                usual[size] = found
        return usual

    def _mine(self, member: Member, value: float | None) -> float | None:
        """A member's own value as it stands in the lists, if it does."""
        return None if member in self._apart else value


def _median_without(ordered: list[float], own: float | None) -> float | None:
    """The median of a sorted list, without one element that equals `own` (None: of all); None: nothing is left."""
    count = len(ordered) - (own is not None)
    if count <= 0:
        return None
    out = len(ordered) if own is None else bisect.bisect_left(ordered, own)

    def at(index: int) -> float:
        return ordered[index + (index >= out)]

    return at(count // 2) if count % 2 else (at(count // 2 - 1) + at(count // 2)) / 2
