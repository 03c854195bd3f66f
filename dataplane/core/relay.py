"""The relay of a host: what its nodes say goes to each controller on one stream, in batches. No clock and no socket.

    a node's stream: join, report, beat, leave  ->  Relay  ->  Line.next(now): a RelayedBatch for each controller

News go at once, everything else at the pace that a controller asks for. Only who was heard just before is passed on
then, and along with others' news, so that a stopped node falls silent behind a relay as well. What waits for a
controller that does not take it is bounded: of each node the newest report and the newest that has counters, and those
that tell recoveries, since no later one repeats them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field

import msgspec

from controlplane.contract.ids import Member
from controlplane.contract.reports import RelayedBatch

HEARD_BEATS = 1.5  # of a node's own: it speaks at each of them, and may be half of one late
LATE_BEATS = 3  # the relay's own lateness, which is not the nodes', counts for so many of them at most
RECOVERIES_MAX = 256  # reports that tell some and wait for one controller; then the oldest is dropped


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One node's stream of reports to the relay."""

    member: Member
    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    report: msgspec.Raw
    recoveries: bool = False  # it tells some
    counters: bool = False  # it has them


@dataclass(slots=True, eq=False)
class Line:
    """One controller. `due_at`: call `next` then, or as soon as something was taken in."""

    heartbeat_s: float  # pause between two beats of a node ...
    beat_s: float  # ... and of the relay, as the controller wants it
    beat_at: float  # when the next one is due
    report_s: float = 0.0  # pause between two whole reports of a node without news, as it wants them
    acknowledged: bool = False  # the controller has answered on this stream
    urgent: set[int] = field(default_factory=set)  # slots whose report is to be sent at once
    waiting: dict[int, Waiting] = field(default_factory=dict)  # slot -> the report that is to be sent
    # Reports with recoveries or counters that are no longer the newest of their slot: sent before that one.
    earlier: deque[tuple[int, Waiting]] = field(default_factory=deque)
    dropped: int = 0  # of those that tell recoveries
    heard: dict[int, float] = field(default_factory=dict)  # slot -> when; none of what is sent already
    gone: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)  # of `gone`, those whose process has ended
    told: set[int] = field(default_factory=set)  # whose report is on this stream

    def due_at(self) -> float:
        """When `next` has something to say; 0: now."""
        return 0.0 if self.urgent or self.gone else self.beat_at

    def next(self, now: float) -> RelayedBatch | None:
        """What is to be sent now, if anything."""
        if self.gone:
            return self._goodbye()
        if not self.urgent and now < self.beat_at:
            return None
        # Who was heard before the beat was due is passed on, unless that is so long ago that he may have died since.
        due = max(self.beat_at, now - LATE_BEATS * self.heartbeat_s)
        since = min(now, due) - HEARD_BEATS * self.heartbeat_s
        heard = {slot for slot, when in self.heard.items() if when >= since}
        calm = not self.urgent
        reports = self._take((heard | self.urgent) & self.waiting.keys())
        beats: tuple[int, ...] = ()
        if now >= self.beat_at:
            beats = tuple(sorted(heard & self.heard.keys()))
            self.heard.clear()
            self.beat_at = max(self.beat_at + self.beat_s, now)
        return RelayedBatch(reports, beats, calm=calm) if reports or beats else None

    def _take(self, slots: Set[int]) -> tuple[tuple[int, msgspec.Raw], ...]:
        """What waits of these; it is on its way from now on."""
        earlier = [(slot, each.report) for slot, each in self.earlier if slot in slots]
        if earlier:
            self.earlier = deque(each for each in self.earlier if each[0] not in slots)
        for slot in slots:
            self.heard.pop(slot, None)
        self.urgent -= slots
        self.told.update(slots)
        return *earlier, *((slot, self.waiting.pop(slot).report) for slot in sorted(slots))

    def acknowledge(self, beat_s: float, report_s: float = 0.0) -> None:
        """The controller hears what is said here, and wants to hear beats and whole reports so often, seconds."""
        self.acknowledged, self.beat_s, self.report_s = True, beat_s, report_s

    def _goodbye(self) -> RelayedBatch:
        """Alone, since a receiver takes reports before it lets go of slots: a member that is back has another slot."""
        gone, self.gone = tuple(self.gone), []
        ended, self.ended = tuple(self.ended), []
        last = self._take({slot for slot in gone if slot in self.waiting})
        self.told.difference_update(gone)
        return RelayedBatch(last, gone=gone, ended=ended)

    def report(self, slot: int, report: Waiting, now: float, urgent: bool) -> None:
        self.heard[slot] = now
        if urgent:
            self.urgent.add(slot)
        before = self.waiting.get(slot)
        self.waiting[slot] = report
        if before is None:
            return
        if report.counters and not before.counters:  # those of an earlier one are of no use any more
            self.earlier = deque(each for each in self.earlier if each[0] != slot or each[1].recoveries)
        if before.recoveries or (before.counters and not report.counters):
            self.earlier.append((slot, before))
            self._bound()

    def _bound(self) -> None:
        told = [each for each in self.earlier if each[1].recoveries]
        if len(told) > RECOVERIES_MAX:
            self.earlier.remove(told[0])
            self.dropped += 1

    def leave(self, slot: int, ended: bool) -> None:
        self.heard.pop(slot, None)
        if slot in self.told:
            self.told.remove(slot)
            self.gone.append(slot)
            if ended:
                self.ended.append(slot)
        elif self.waiting.pop(slot, None) is not None:
            self.urgent.discard(slot)
            self.earlier = deque(each for each in self.earlier if each[0] != slot)


class Relay:
    """All nodes of a host that report here, and all controllers (by address)."""

    def __init__(self, heartbeat_s: float) -> None:
        self.lines: dict[str, Line] = {}
        self._heartbeat_s = heartbeat_s
        self._sources: dict[Member, Source] = {}
        self._reports: dict[int, msgspec.Raw] = {}  # slot -> the last one
        self._heard: dict[int, float] = {}  # slot -> when, of those that have reported
        self._next_slot = 0

    # ---- nodes

    def join(self, member: Member) -> Source:
        """A stream of this member began. If it had another one, that one speaks for it no longer."""
        before = self._sources.get(member)
        if before is None:
            self._next_slot += 1
        source = Source(member, self._next_slot if before is None else before.slot)
        self._sources[member] = source
        return source

    def report(
        self,
        source: Source,
        report: msgspec.Raw,
        now: float,
        urgent: bool = True,
        recoveries: bool = False,
        counters: bool = False,
    ) -> None:
        """`recoveries`, `counters`: the report has some, so that it is to be sent even if it is not the newest any
        more (of those with counters alone, the newest)."""
        if self._speaks(source):
            waiting = Waiting(report, recoveries, counters)
            self._reports[source.slot], self._heard[source.slot] = report, now
            for line in self.lines.values():
                line.report(source.slot, waiting, now, urgent)

    def beat(self, source: Source, now: float) -> None:
        """It is heard, and its last report still holds."""
        if self._speaks(source):
            self._heard[source.slot] = now
            for line in self.lines.values():
                line.heard[source.slot] = now

    def end(self, member: Member) -> None:
        """Its process has ended: each controller is told at once, before its stream breaks."""
        source = self._sources.get(member)
        if source is not None:
            self.leave(source, ended=True)

    def leave(self, source: Source, ended: bool = False) -> None:
        """Its stream ended: each controller is told at once."""
        if self._speaks(source):
            del self._sources[source.member]
            self._reports.pop(source.slot, None)
            self._heard.pop(source.slot, None)
            for line in self.lines.values():
                line.leave(source.slot, ended)

    def heard_by(self, source: Source) -> tuple[str, ...]:
        """Addresses of the controllers that this member's reports are passed on to."""
        return tuple(
            address
            for address, line in self.lines.items()
            if line.acknowledged and source.slot in line.told and self._speaks(source)
        )

    def report_s(self) -> float:
        """How often a node has to send a whole report although it has no news, for each controller to have enough."""
        return min((line.report_s for line in self.lines.values()), default=0.0)

    def _speaks(self, source: Source) -> bool:
        return self._sources.get(source.member) is source

    # ---- controllers

    def open(self, address: str, now: float) -> Line:
        """A stream to a controller began: it is told everything, whatever was said on one before. Nodes tell all their
        recoveries and counters again once it is among those that hear them.

        What a silent node said last waits until it is heard again: the controller takes a report for a sign of life.
        """
        line = self.lines[address] = Line(self._heartbeat_s, self._heartbeat_s, now)
        line.waiting.update((slot, Waiting(report)) for slot, report in self._reports.items())
        since = now - HEARD_BEATS * self._heartbeat_s
        line.urgent = {slot for slot in line.waiting if self._heard[slot] >= since}
        return line

    def close(self, address: str) -> None:
        """Its stream ended, or the controller is gone."""
        self.lines.pop(address, None)
