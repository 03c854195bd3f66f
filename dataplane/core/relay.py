"""The relay of a host: what its nodes say goes to each controller on one stream, in batches. No clock and no socket.

    a node's stream: join, report, beat, leave  ->  Relay  ->  Line.next(now): a RelayedBatch for each controller

News go at once, everything else at the relay's own heartbeat. A beat is passed on only of a node that was heard since
the last one, so that a stopped node falls silent behind a relay as well. What waits for a controller that does not take
it is bounded: the newest report of each node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from controlplane.contract.ids import Member
from controlplane.contract.reports import RelayedBatch


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One node's stream of reports to the relay."""

    member: Member
    slot: int


@dataclass(slots=True, eq=False)
class Line:
    """One controller. `due_at`: call `next` then, or as soon as something was taken in."""

    beat_s: float  # pause between two beats, as the controller wants it
    beat_at: float  # when the next one is due
    acknowledged: bool = False  # the controller has answered on this stream
    urgent: bool = False
    waiting: dict[int, msgspec.Raw] = field(default_factory=dict)  # slot -> the report that is to be sent
    heard: set[int] = field(default_factory=set)  # since the last heartbeat
    gone: list[int] = field(default_factory=list)
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
        reports, self.waiting, self.urgent = self.waiting, {}, False
        self.told.update(reports)
        beats: tuple[int, ...] = ()
        if now >= self.beat_at:
            beats = tuple(sorted(self.heard.difference(reports)))
            self.heard.clear()
            self.beat_at = max(self.beat_at + self.beat_s, now)
        return RelayedBatch(tuple(reports.items()), beats) if reports or beats else None

    def acknowledge(self, beat_s: float) -> None:
        """The controller hears what is said here, and wants to hear beats so often, seconds."""
        self.acknowledged, self.beat_s = True, beat_s

    def _goodbye(self) -> RelayedBatch:
        """Alone, since a receiver takes reports before it lets go of slots: a member that is back has another slot."""
        gone, self.gone = tuple(self.gone), []
        last = tuple((slot, self.waiting.pop(slot)) for slot in gone if slot in self.waiting)
        return RelayedBatch(last, gone=gone)

    def report(self, slot: int, report: msgspec.Raw, urgent: bool) -> None:
        self.waiting[slot] = report
        self.urgent = self.urgent or urgent

    def leave(self, slot: int) -> None:
        self.heard.discard(slot)
        if slot in self.told:
            self.told.remove(slot)
            self.gone.append(slot)
        else:
            self.waiting.pop(slot, None)


class Relay:
    """All nodes of a host that report here, and all controllers (by address)."""

    def __init__(self, heartbeat_s: float) -> None:
        self.lines: dict[str, Line] = {}
        self._heartbeat_s = heartbeat_s
        self._sources: dict[Member, Source] = {}
        self._reports: dict[int, msgspec.Raw] = {}  # slot -> the last one
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

    def report(self, source: Source, report: msgspec.Raw, urgent: bool = True) -> None:
        if self._speaks(source):
            self._reports[source.slot] = report
            for line in self.lines.values():
                line.report(source.slot, report, urgent)

    def beat(self, source: Source) -> None:
        """It is heard, and its last report still holds."""
        if self._speaks(source):
            for line in self.lines.values():
                line.heard.add(source.slot)

    def leave(self, source: Source) -> None:
        """Its stream ended: each controller is told at once."""
        if self._speaks(source):
            del self._sources[source.member]
            self._reports.pop(source.slot, None)
            for line in self.lines.values():
                line.leave(source.slot)

    def heard_by(self, source: Source) -> tuple[str, ...]:
        """Addresses of the controllers that this member's reports are passed on to."""
        return tuple(
            address
            for address, line in self.lines.items()
            if line.acknowledged and source.slot in line.told and self._speaks(source)
        )

    def _speaks(self, source: Source) -> bool:
        return self._sources.get(source.member) is source

    # ---- controllers

    def open(self, address: str, now: float) -> Line:
        """A stream to a controller began: it is told everything, whatever was said on one before."""
        line = self.lines[address] = Line(self._heartbeat_s, now)
        line.waiting.update(self._reports)
        line.urgent = bool(line.waiting)
        return line

    def close(self, address: str) -> None:
        """Its stream ended, or the controller is gone."""
        self.lines.pop(address, None)
