"""Who is alive: evidence of several kinds for each process, weighed by the table of rules in evidence.py.

Silence alone is slow and often wrong on a loaded machine; a killed process is seen by its peers at once. So two
independent kinds of evidence make a member red at once, one kind alone never does while the member is registered, and
whoever is still heard by anybody is not dead (the path to this controller is broken, not the member).

Every candidate for leader feeds one, so that a new leader decides at once.

What is taken in costs the same however many there are, and only who may have changed is judged: those of whom there is
news, those whose silence has lasted (a heap of deadlines, one a member), and, each time, all of whom anything is
unusual.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.reports import LinkReport, NodeReport
from controlplane.contract.status import NodeState
from controlplane.core.conduct import Conduct
from controlplane.core.evidence import Evidence, fault, judge, may_live, plain, severed
from controlplane.core.phi import Arrivals

GAP_S = 0.1  # ticks come every 50 ms: in a longer gap between two events this process did not get to run
PAUSE_S = 0.3  # ... and here it was away
STEADY_S = 2.0  # a member that was red has to be heard this long without a gap
# A step that takes long on a slow machine is no stall as long as its node computes and advances; a lost one, on a node
# that is busy with others, is not excused for ever.
EXCUSED_MAX_S = 300.0
FORGET_S = 60.0  # a process that is neither registered nor in the topology is remembered this long


@dataclass(frozen=True, slots=True)
class Verdict:
    """A change of one member's state."""

    member: Member
    before: NodeState
    after: NodeState
    evidence: str
    silent_s: float
    left: bool = False  # it went on purpose
    known: bool = True  # it was green or red before


@dataclass(slots=True)
class _Watched:
    since: float  # silence is counted from here at the earliest
    arrivals: Arrivals
    heard: float | None = None
    broken_at: float | None = None  # its report stream ended then, and nothing came since
    abrupt: bool = False  # ... in the middle of talking
    leaving: bool = False
    ended: bool = False
    superseded: bool = False
    known: bool = False
    state: NodeState = NodeState.YELLOW
    evidence: str = "registered, not heard yet"
    steady_since: float | None = None
    changed_at: float = 0.0
    links: tuple[LinkReport, ...] = ()
    faulty: bool = False  # answers, and has to be restarted
    severed: bool = False  # red for a broken link: its process is sound
    excused_s: float = 0.0  # of the time for which a pipeline waits for it: until when it was seen to compute
    may_live: bool = False  # red, but not beyond doubt
    returning: bool = False  # red without reason: heard again, not yet for long
    demoted: bool = False  # nothing but a probation speaks against it

    @property
    def broken(self) -> bool:
        return self.broken_at is not None

    @property
    def public(self) -> tuple[object, ...]:
        """What others ask for: a change of it is told."""
        return self.state, self.evidence, self.demoted, self.faulty, self.may_live, self.returning

    def silent_s(self, now: float) -> float:
        return max(now - max(self.since, self.heard or 0.0), 0.0)


@dataclass(slots=True)
class _Links:
    """What living neighbours say of one member."""

    down: str = ""
    silent_s: float = 0.0
    heard: bool = False
    heard_at: float = 0.0  # by whoever heard it last, on the clock of this controller
    lost_by: str = ""  # a neighbour whose link is down, or has been silent for too long
    cut_off: str = ""  # the same, and both are heard here


@dataclass(slots=True)
class Detector:
    timing: TimingConfig
    conduct: Conduct = field(init=False)
    _watched: dict[Member, _Watched] = field(default_factory=dict)
    _leased: dict[NodeId, Member] = field(default_factory=dict)
    _newest: dict[NodeId, Member] = field(default_factory=dict)  # the last one registered, leased or not
    _last_event: float | None = None
    _about: dict[Member, set[Member]] = field(default_factory=dict)  # whose links have to do with a member
    _news: set[Member] = field(default_factory=set)  # to be judged at the next evaluation
    _unusual: set[Member] = field(default_factory=set)  # ... and at each
    _silences: list[tuple[float, Member]] = field(default_factory=list)  # heap: one entry each, never late
    _red: frozenset[Member] = frozenset()
    _dead: frozenset[Member] = frozenset()
    _unsure: frozenset[Member] = frozenset()
    _faulty: frozenset[Member] = frozenset()
    _demoted: frozenset[Member] = frozenset()
    _changed: set[Member] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.conduct = Conduct(self.timing)

    def advance(self, now: float) -> None:
        """Call before each event. While this process does not run, nobody is silent: what they say waits in the
        inbox. After a long pause everybody gets a fresh window."""
        gap_s = 0.0 if self._last_event is None else now - self._last_event
        self._last_event = now
        if gap_s <= GAP_S:
            return
        for watched in self._watched.values():
            if gap_s > PAUSE_S:
                watched.since = now
                watched.arrivals.restart()
            else:
                watched.since = max(watched.since, watched.heard or 0.0) + gap_s - GAP_S

    def registered(self, member: Member, now: float) -> None:
        """What etcd says last is true for every controller alike, even if two processes fight for a name."""
        self._watch(member, now).superseded = False
        self._news.add(member)
        # Only who was registered before is outlived: reports may be faster than the watch, and so a process
        # that reports without being registered may as well be newer than this one.
        old = self._newest.get(member.node)
        if old is not None and old != member and old in self._watched:
            self._watched[old].superseded = True
            self._news.add(old)
        self._leased[member.node] = self._newest[member.node] = member

    def lease_gone(self, node: NodeId) -> None:
        member = self._leased.pop(node, None)
        if member is not None:
            self._news.add(member)

    def expect(self, members: Iterable[Member], now: float) -> None:
        """These are in the topology: watch them even if they never said a word to this controller."""
        for member in members:
            self._watch(member, now)

    def reported(self, report: NodeReport, now: float) -> None:
        member = report.member
        watched = self._hear(member, now)
        if report.leaving:
            watched.leaving = True
            self._news.add(member)
        if [link.peer for link in report.links] != [link.peer for link in watched.links]:
            self._reindex(member, watched.links, report.links)
        watched.links = report.links
        suspect_s = self.timing.suspect_after_s
        for link in report.links:
            if not link.up or link.silent_s >= suspect_s:
                self._news.update((member, link.peer))
        if self.conduct.reported(report, now):
            self._news.add(member)

    def heard(self, member: Member, now: float) -> None:
        """A heartbeat that says nothing new."""
        self._hear(member, now)

    def _hear(self, member: Member, now: float) -> _Watched:
        watched = self._watched.get(member) or self._watch(member, now)
        if watched.broken_at is not None:
            watched.arrivals.restart()
            watched.broken_at, watched.abrupt = None, False
            watched.steady_since = None
        # Two comparisons cost less than a maximum, and one is mostly enough.
        limit_s = self.timing.suspect_after_s
        gap = now - (watched.heard or 0.0) >= limit_s and now - watched.since >= limit_s
        if gap or watched.steady_since is None:
            watched.steady_since = now
        watched.arrivals.heard(now)
        watched.heard = now
        if watched.state is not NodeState.GREEN:
            self._news.add(member)
        return watched

    def stream_broken(self, member: Member, now: float) -> None:
        watched = self._watch(member, now)
        watched.abrupt = watched.heard is not None and watched.silent_s(now) < self.timing.suspect_after_s
        watched.broken_at = now
        self._news.add(member)

    def ended(self, member: Member, now: float) -> None:
        """Its process has. Whatever is still on its way says nothing else."""
        self._watch(member, now).ended = True
        self._news.add(member)

    def evaluate(self, now: float, stalled: Mapping[Member, float]) -> list[Verdict]:
        """Judge who may have changed; what changed, in a fixed order. `stalled`: who holds a pipeline up, seconds."""
        self._news.update(self._silent(now))
        deaf = self.deaf(now)
        self.conduct.compare(now, self._doubtful(), self._demoted)
        news, self._news = self._news, set()
        news.update(self._unusual, stalled, self.conduct.told)
        verdicts: list[Verdict] = []
        for member in sorted(news):
            watched = self._watched.get(member)
            if watched is None:
                continue
            verdict = self._judge(member, watched, stalled.get(member, 0.0), deaf, now)
            if verdict is not None:
                verdicts.append(verdict)
        return verdicts

    def _judge(
        self, member: Member, watched: _Watched, stalled_s: float, deaf: bool, now: float
    ) -> Verdict | None:
        evidence = self._evidence(member, watched, self._neighbours(member, now), stalled_s, deaf, now)
        state, why = judge(evidence, self.timing)
        defect, cut = fault(evidence, self.timing), severed(evidence, self.timing)
        before = watched.public
        if state is NodeState.RED:
            watched.may_live = may_live(evidence, self.timing)
        watched.returning = watched.state is NodeState.RED and state is not NodeState.RED
        if state is NodeState.RED and why in (defect, cut):
            watched.faulty = watched.faulty or why == defect
            watched.severed = not watched.faulty
            self.conduct.put_on_probation(member.node, why, now, trusted=watched.demoted)
        watched.demoted = state is NodeState.YELLOW and self._on_probation_only(evidence)
        verdict = None
        if not watched.returning or self._believed(watched, state, evidence, now):
            if state is not watched.state:
                left = watched.leaving and not watched.superseded
                silent_s = evidence.silent_s
                verdict = Verdict(member, watched.state, state, why, silent_s, left, watched.known)
                watched.changed_at, watched.known = now, True
            watched.state, watched.evidence = state, why
        else:
            watched.demoted = False
        if watched.state is not NodeState.RED:
            watched.severed = False
        self._keep(member, watched, evidence)
        if before != watched.public:
            self._changed.add(member)
        return verdict

    def _on_probation_only(self, evidence: Evidence) -> bool:
        """Whether nothing else speaks against it."""
        return (
            bool(evidence.probation)
            and judge(replace(evidence, probation=""), self.timing)[0] is NodeState.GREEN
        )

    def _believed(self, watched: _Watched, state: NodeState, evidence: Evidence, now: float) -> bool:
        """Once red, only a steady process is believed again, and then as a blank one.

        One that was behind a cut was sound all the time, and links that nobody needs do not tell whether it still is
        behind it. It becomes the last choice before its probation is over: a cut around a rack can take a stage from
        every pipeline, and then there is no other choice. Each relapse doubles the time until then.
        """
        steady_s = (watched.heard or now) - (watched.steady_since or now)
        if state is NodeState.GREEN:
            return steady_s >= STEADY_S
        red_s = now - watched.changed_at
        return watched.severed and watched.demoted and min(steady_s, red_s / evidence.relapses) >= STEADY_S

    def _keep(self, member: Member, watched: _Watched, evidence: Evidence) -> None:
        """Which sets the member is in from now on."""
        red = watched.state is NodeState.RED
        green = watched.state is NodeState.GREEN
        # A red one is judged when there is news of it, and now and then (`_silent`).
        if (red and not watched.returning) or (green and plain(evidence, self.timing)):
            self._unusual.discard(member)
        else:
            self._unusual.add(member)
        self._place(member, watched)

    def _place(self, member: Member, watched: _Watched | None) -> None:
        red = watched is not None and watched.state is NodeState.RED
        may_live = red and watched is not None and watched.may_live
        dead = red and not (may_live and watched is not None and watched.returning)
        self._red = _with(self._red, member, red)
        self._dead = _with(self._dead, member, dead)
        self._unsure = _with(self._unsure, member, dead and may_live)
        self._faulty = _with(self._faulty, member, red and watched is not None and watched.faulty)
        self._demoted = _with(self._demoted, member, watched is not None and watched.demoted)

    def _silent(self, now: float) -> list[Member]:
        """Whose silence has lasted as long as makes a member suspect. The heap's entries are where that could first
        be; who was heard since is looked at again later."""
        found = []
        limit_s = self.timing.suspect_after_s
        while self._silences and self._silences[0][0] <= now:
            member = self._silences[0][1]
            watched = self._watched.get(member)
            if watched is None:
                heapq.heappop(self._silences)
                continue
            left_s = limit_s - watched.silent_s(now)
            if left_s <= 0.0:
                found.append(member)
            # At least a millisecond later: what is left may be less than a step of the clock's own rounding.
            heapq.heapreplace(
                self._silences, (now + (max(left_s, 0.001) if left_s > 0.0 else limit_s), member)
            )
        return found

    def _doubtful(self) -> Iterable[Member]:
        """Who is no measure for others."""
        return [m for m in self._unusual if self._watched[m].state is not NodeState.GREEN] + list(self._red)

    def state(self, member: Member) -> NodeState:
        watched = self._watched.get(member)
        return NodeState.ABSENT if watched is None else watched.state

    def evidence(self, member: Member) -> str:
        watched = self._watched.get(member)
        return "" if watched is None else watched.evidence

    def silent_s(self, member: Member, now: float) -> float:
        watched = self._watched.get(member)
        return 0.0 if watched is None else watched.silent_s(now)

    def changed_at(self, member: Member) -> float | None:
        """When its state last changed, on the clock of the events."""
        watched = self._watched.get(member)
        return None if watched is None else watched.changed_at

    def red(self) -> frozenset[Member]:
        return self._red

    def dead(self) -> frozenset[Member]:
        """Red ones, but for those that may have been alive all the time and are heard again."""
        return self._dead

    def unsure(self) -> frozenset[Member]:
        """Dead ones that may be alive all the same."""
        return self._unsure

    def speaks(self, member: Member, now: float) -> bool:
        """Whether it was heard lately."""
        watched = self._watched.get(member)
        if watched is None or watched.heard is None or watched.broken:
            return False
        return now - watched.heard < self.timing.suspect_after_s

    def hears(self, now: float) -> int:
        """How many of those that are registered are heard. Who is not is under suspicion, or is about to be judged."""
        suspects = self._unusual | self._news | self._red
        mute = sum(self._leased.get(m.node) == m and not self.speaks(m, now) for m in suspects)
        return len(self._leased) - mute

    def deaf(self, now: float) -> bool:
        """Whether the fault may be here: few of those that are registered are heard, or nobody at all."""
        hears = self.hears(now)
        if 2 * hears < len(self._leased):
            return True
        return hears == 0 and not any(self.speaks(member, now) for member in self._watched)

    def faulty(self) -> frozenset[Member]:
        """Red ones that answer: their processes have to make way for fresh ones."""
        return self._faulty

    def demoted(self) -> frozenset[Member]:
        """Yellow for nothing but their probation: for new duties the last choice, but a choice."""
        return self._demoted

    def changed(self) -> set[Member]:
        """Whose state or evidence changed since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def forget(self, keep: frozenset[Member], now: float) -> list[Member]:
        """Drop processes that are long gone; returns them."""
        gone = [
            m
            for m, w in self._watched.items()
            if m not in keep and self._leased.get(m.node) != m and w.silent_s(now) >= FORGET_S
        ]
        for member in gone:
            self._reindex(member, self._watched[member].links, ())
            del self._watched[member]
            self._unusual.discard(member)
            self._place(member, None)
            self.conduct.forget(member)
        return gone

    def _watch(self, member: Member, now: float) -> _Watched:
        watched = self._watched.get(member)
        if watched is None:
            arrivals = Arrivals(self.timing.heartbeat_s, cap_s=self.timing.dead_after_s)
            watched = self._watched[member] = _Watched(since=now, arrivals=arrivals)
            self._news.add(member)
            heapq.heappush(self._silences, (now + self.timing.suspect_after_s, member))
        return watched

    def _reindex(
        self, reporter: Member, before: tuple[LinkReport, ...], after: tuple[LinkReport, ...]
    ) -> None:
        for link in before:
            others = self._about.get(link.peer)
            if others is not None:
                others.discard(reporter)
                if not others:
                    del self._about[link.peer]
        for link in after:
            self._about.setdefault(link.peer, set()).add(reporter)

    def _witness(self, member: Member, now: float) -> bool:
        """Whether it is alive and was heard lately: what it said longer ago speaks neither for nor against anybody."""
        watched = self._watched.get(member)
        return watched is not None and watched.state is not NodeState.RED and self.speaks(member, now)

    def _neighbours(self, member: Member, now: float) -> _Links:
        """What members that are alive and were heard lately say of one of their neighbours."""
        about = _Links()
        witness = self._witness(member, now)
        if witness:
            self._own_links(member, now, about)
        for reporter in sorted(self._about.get(member, ())):
            if reporter == member or not self._witness(reporter, now):
                continue
            watched = self._watched[reporter]
            for link in watched.links:
                if link.peer != member:
                    continue
                silent_s = link.silent_s + now - (watched.heard or now)
                if not link.up and not link.refused:  # who refuses it, as in an upgrade, is alive
                    about.down = about.down or link.reason or f"says {reporter.node}"
                elif link.silent_s > 0.0:  # 0: it is not expected to speak, which is no sign of life
                    about.silent_s = max(about.silent_s, silent_s)
                    about.heard |= silent_s < self.timing.dead_after_s
                    about.heard_at = max(about.heard_at, now - silent_s)
                if link.watch or (link.up and silent_s < self.timing.dead_after_s):
                    continue
                about.lost_by = reporter.node
                if witness:
                    # Which of the two is deaf, or mute, cannot be told: either may be the one to go.
                    about.cut_off = reporter.node
        return about

    def _own_links(self, member: Member, now: float, about: _Links) -> None:
        """Its own word on whom it cannot reach, although both are heard here."""
        watched = self._watched[member]
        for link in watched.links:
            silent_s = link.silent_s + now - (watched.heard or now)
            bad = not link.up or silent_s >= self.timing.dead_after_s
            if bad and not link.watch and link.peer != member and self._witness(link.peer, now):
                about.cut_off = link.peer.node

    def _evidence(
        self, member: Member, watched: _Watched, links: _Links, stalled_s: float, deaf: bool, now: float
    ) -> Evidence:
        silent_s = watched.silent_s(now)
        short = silent_s < self.timing.suspect_after_s
        symptoms = self.conduct.symptoms(member, now)
        if symptoms.advances and short:
            watched.excused_s = min(stalled_s, EXCUSED_MAX_S)
        watched.excused_s = min(watched.excused_s, stalled_s)
        # What a neighbour heard in the moments before the stream broke says nothing of the time after.
        since = watched.broken_at is not None and links.heard_at > watched.broken_at + self.timing.heartbeat_s
        return Evidence(
            silent_s=silent_s,
            phi=0.0 if watched.heard is None or short else watched.arrivals.phi(silent_s),
            heard_ever=watched.heard is not None,
            lease=self._leased.get(member.node) == member,
            broken=watched.broken,
            abrupt=watched.abrupt and not since,
            link_down=links.down,
            link_silent_s=links.silent_s,
            neighbour_hears=links.heard,
            cut_off=links.cut_off or (links.lost_by if links.heard else ""),
            stalled_s=stalled_s - watched.excused_s,
            deaf=deaf,
            superseded=watched.superseded,
            leaving=watched.leaving,
            ended=watched.ended,
            stuck_s=symptoms.stuck_s,
            still_s=symptoms.still_s,
            poisoned=symptoms.poisoned,
            peers_poisoned=symptoms.peers_poisoned,
            probation=symptoms.probation,
            relapses=symptoms.relapses,
        )


def _with(members: frozenset[Member], member: Member, inside: bool) -> frozenset[Member]:
    """The set with one member in or out; the same object where it is so already."""
    if (member in members) is inside:
        return members
    return members | {member} if inside else members - {member}
