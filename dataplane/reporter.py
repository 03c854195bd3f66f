"""The node's reports: through the relay of its host, or on one stream to every controller; a heartbeat at a fixed pace
and a report at once on news.

Most reports would say what the last one said: then a beat, a few bytes, says that it still holds (`_is_news`). Of a
large group controllers ask for fewer beats and reports (`ReportAck`): whether there is news is looked at each heartbeat
all the same.
Each stream has its own task, so that a receiver that hangs delays nobody. No report is queued: each is made from the
state at the moment it is sent. Which controllers need a stream of their own is decided in core/paths.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NoReturn

from msgspec.structs import replace

from controlplane.backoff import Backoff
from controlplane.contract.identity import PLAIN, Identity, ProcessName, ProcessRole
from controlplane.contract.records import ControllerRecord
from controlplane.contract.reports import REPORT_BEATS, NodeReport, ReportAck, ReportBatch
from dataplane.core.paths import Paths
from dataplane.report_stream import keep_reporting

SLOT = 0  # on a stream of its own a node is the only one
BEAT = ReportBatch(beats=(SLOT,), calm=True)

IDLE_BEATS = 10  # a node that rests sends a whole report so often, in heartbeats
# Counters go with each fourth of them: people look at them, and they are half of a report.
COUNTERS_REPORTS = 4
# A link that was silent for so long, twice the pause between two pings, is watched as well.
LINK_QUIET_S = 0.4
LATE_S = 0.02  # overdue timers since the last report: who hardly gets to run is watched at every heartbeat
LONG_BEATS = 3  # a step that takes so long is watched at every heartbeat
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
RELAY_BACKOFF_FIRST_S = 0.05  # one that died is back soon, one that is not there costs little
RELAY_BACKOFF_MAX_S = 10.0


@dataclass(slots=True)
class _Line:
    address: str
    task: asyncio.Task[NoReturn] | None = None
    due: asyncio.Event = field(default_factory=asyncio.Event)  # a heartbeat, or news
    news: bool = True
    recoveries_sent: int = 0
    told: NodeReport | None = None  # the last report on this stream
    beats: int = 0  # heartbeats since then
    quiet: int = 0  # heartbeats since anything was sent
    counters_in: int = 0  # heartbeats until counters are sent
    every: int = 1  # heartbeats in which something is to be sent, news or none ...
    whole: int = REPORT_BEATS  # ... and a whole report, if the node computes
    said: asyncio.Event = field(default_factory=asyncio.Event)  # a report has left since it was cleared


class Reporter:
    """`make(seq, recoveries_sent)` gives a report and the count of recoveries it brings the receiver up to; while
    `hurried()` controllers wait for each of them. Its counters come of `counters()`, when they are to be sent.
    `relay`: its address, for gRPC, where the host has one."""

    def __init__(
        self,
        token: str,
        heartbeat_s: float,
        make: Callable[[int, int], tuple[NodeReport, int]],
        hurried: Callable[[], bool] = lambda: False,
        relay: str = "",
        counters: Callable[[], dict[str, int]] = dict,
        identity: Identity = PLAIN,
    ) -> None:
        self.broken_off = 0  # streams of reports that ended, or could not be opened
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._make = make
        self._hurried = hurried
        self._counters = counters
        self._identity = identity
        self._names: dict[str, ProcessName] = {}  # of controllers, by address
        self._seq = 0
        self._paths = Paths(heartbeat_s, time.monotonic(), bool(relay))
        self._lines: dict[str, _Line] = {}  # by address
        self._relay = _Line(relay) if relay else None
        self._looking: asyncio.Task[None] | None = None

    def set_controllers(self, records: dict[str, ControllerRecord]) -> None:
        """Report to exactly these from now on."""
        if self._relay is not None and self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="report-paths")
            self._relay.task = asyncio.create_task(self._keep_relay(self._relay), name="report-relay")
        self._names = {
            record.rpc_address: ProcessName(ProcessRole.CONTROLLER, record.id) for record in records.values()
        }
        self._paths.set_controllers([record.rpc_address for record in records.values()], time.monotonic())
        self._settle()

    def kick(self) -> None:
        """There is news: report now."""
        for line in self._all():
            line.news = True
            line.due.set()

    async def flush(self, limit_s: float) -> None:
        """Report to everybody now, and wait until it has left, within `limit_s`."""
        lines = self._all()
        for line in lines:
            line.said.clear()
        self.kick()
        leaving = [asyncio.create_task(line.said.wait()) for line in lines]
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=limit_s)
            for task in late:
                task.cancel()

    async def close(self) -> None:
        tasks = [task for task in (self._looking, *(line.task for line in self._all())) if task is not None]
        self._lines.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _all(self) -> list[_Line]:
        return [*self._lines.values(), *([self._relay] if self._relay is not None else [])]

    # ---- streams

    def _settle(self) -> None:
        """Streams of our own to exactly those that need one."""
        for address in self._lines.keys() - self._paths.own:
            line = self._lines.pop(address)
            if line.task is not None:
                line.task.cancel()
        for address in sorted(self._paths.own - self._lines.keys()):
            line = self._lines[address] = _Line(address)
            line.task = asyncio.create_task(self._keep(line), name=f"report-{address}")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self._paths.look(time.monotonic())
            self._settle()

    async def _keep(self, line: _Line) -> NoReturn:
        def acknowledged(ack: ReportAck) -> None:
            line.every = max(1, round(ack.beat_s / self._heartbeat_s))
            self._heed(line, ack)
            self._paths.paced(line.address, line.every * self._heartbeat_s)

        def broken(_why: str) -> None:
            self.broken_off += 1

        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        await keep_reporting(
            line.address,
            self._token,
            backoff,
            lambda: self._batches(line),
            acknowledged,
            broken,
            identity=self._identity,
            peer=self._names[line.address],
        )

    async def _keep_relay(self, line: _Line) -> NoReturn:
        def broken(_why: str) -> None:
            self.broken_off += 1
            self._paths.broken(time.monotonic())
            self._settle()

        backoff = Backoff(RELAY_BACKOFF_FIRST_S, RELAY_BACKOFF_MAX_S)
        await keep_reporting(
            line.address,
            self._token,
            backoff,
            lambda: self._batches(line, True),
            lambda ack: self._answered(line, ack),
            broken,
        )

    def _heed(self, line: _Line, ack: ReportAck) -> None:
        line.whole = max(REPORT_BEATS, round(ack.report_s / self._heartbeat_s))

    def _answered(self, line: _Line, ack: ReportAck) -> None:
        """By the relay."""
        now = time.monotonic()
        self._heed(line, ack)
        late = self._paths.overdue(now)
        if self._paths.answered(ack.seq, ack.heard_by, now):
            # A controller that was not told of them.
            line.recoveries_sent, line.counters_in, line.news = 0, 0, True
            line.due.set()
        elif late:
            line.due.set()
        self._settle()

    async def _batches(self, line: _Line, to_relay: bool = False) -> AsyncIterator[ReportBatch]:
        line.told, line.news, line.recoveries_sent = None, True, 0
        line.every, line.whole, line.counters_in = 1, REPORT_BEATS, 0
        if to_relay:
            self._paths.opening()
        while True:
            line.due.clear()
            # To a relay that owes an answer for too long nothing more is sent: it would only wait there.
            silent = to_relay and self._paths.overdue(time.monotonic())
            if not silent and (batch := self._next(line)) is not None:
                if to_relay:
                    self._paths.sent(time.monotonic())
                yield batch
                line.said.set()
            timer = asyncio.get_running_loop().call_later(self._heartbeat_s, line.due.set)
            await line.due.wait()
            timer.cancel()

    def _next(self, line: _Line) -> ReportBatch | None:
        report, recoveries = self._make(self._seq + 1, line.recoveries_sent)
        news, line.news = line.news, False
        line.beats, line.quiet, line.counters_in = line.beats + 1, line.quiet + 1, line.counters_in - 1
        told = line.told
        news = news or told is None or self._is_news(report, told)
        if news or told is None or self._is_old(report, told, line):
            self._seq += 1
            line.recoveries_sent, line.told, line.beats, line.quiet = recoveries, report, 0, 0
            if line.counters_in <= 0:
                line.counters_in = COUNTERS_REPORTS * line.whole
                report = replace(report, counters=self._counters())
            return ReportBatch(reports=((SLOT, report),), calm=not news)
        if line.quiet < line.every:
            return None
        line.quiet = 0
        return BEAT

    def _is_old(self, report: NodeReport, told: NodeReport, line: _Line) -> bool:
        """Whether `told` is to be renewed although there is no news."""
        rests = report.progress == told.progress
        return line.beats >= (max(IDLE_BEATS, line.whole) if rests else line.whole)

    def _is_news(self, report: NodeReport, told: NodeReport) -> bool:
        """Whether a controller has to know now that `told` no longer holds."""
        if report.leaving or report.poisoned != told.poisoned or len(report.recoveries) > 0:
            return True
        long_s = LONG_BEATS * self._heartbeat_s
        if report.busy_s >= long_s or any(p.stalled_s >= long_s for p in report.pipelines):
            return True
        if report.overdue_s - told.overdue_s >= LATE_S:
            return True
        if any(link.up and link.silent_s >= LINK_QUIET_S for link in report.links):
            return True
        return (
            self._hurried()
            or _duties(report) != _duties(told)
            or report.broken_links() != told.broken_links()
            or report.troubles != told.troubles
        )


def _duties(report: NodeReport) -> list[tuple[str, int, int]]:
    return [(p.pipeline, p.stage, p.epoch) for p in report.pipelines]
