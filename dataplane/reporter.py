"""The node's reports: one stream to every controller, a heartbeat at a fixed pace and a report at once on news.

Most reports would say what the last one said: then a beat, a few bytes, says that it still holds (`_is_news`). Of a
large group controllers ask for fewer beats (`ReportAck.beat_s`): whether there is news is looked at each heartbeat all
the same.
Each controller has its own task, so that one that hangs delays nobody. No report is queued: each is made from the
state at the moment it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from msgspec.structs import replace

from controlplane.backoff import Backoff
from controlplane.contract import rpc
from controlplane.contract.records import ControllerRecord
from controlplane.contract.reports import NodeReport, ReportBatch

log = logging.getLogger(__name__)

SLOT = 0  # on a stream of its own a node is the only one
BEAT = ReportBatch(beats=(SLOT,), calm=True)

FULL_BEATS = 5  # a whole report so often while the node computes, in heartbeats ...
FULL_IDLE_BEATS = 10  # ... and while it rests
COUNTERS_BEATS = (
    20  # counters go with a report so often: people look at them, and they are half of what is in it
)
LINK_QUIET_S = (
    0.4  # a link that was silent for so long, twice the pause between two pings, is watched as well
)
LATE_S = 0.02  # overdue timers since the last report: who hardly gets to run is watched at every heartbeat
LONG_BEATS = 3  # a step that takes so long is watched at every heartbeat
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
# A controller behind a path that has healed hears this node again within 3 s: TCP alone sends again, and tries to
# connect, at intervals that double for as long as the path is cut.
OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    (
        "grpc.keepalive_timeout_ms",
        2_000,
    ),  # also the longest time without TCP's acknowledgement of a heartbeat
    ("grpc.min_reconnect_backoff_ms", 2_000),  # the longest time that one connection attempt takes
    # Each attempt has its own connection: the back-off is ours, and not gRPC's as well.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


@dataclass(slots=True)
class _Line:
    address: str
    task: asyncio.Task[None]
    due: asyncio.Event = field(default_factory=asyncio.Event)  # a heartbeat, or news
    news: bool = True
    seq: int = 0
    recoveries_sent: int = 0
    told: NodeReport | None = None  # the last report on this stream
    beats: int = 0  # heartbeats since then
    quiet: int = 0  # heartbeats since anything was sent
    uncounted: int = COUNTERS_BEATS  # heartbeats since counters were sent
    every: int = 1  # heartbeats in which something is to be sent, news or none
    said: asyncio.Event = field(default_factory=asyncio.Event)  # a report has left since it was cleared


class Reporter:
    """`make(seq, recoveries_sent)` gives a report and the count of recoveries it brings the receiver up to; while
    `hurried()` controllers wait for each of them."""

    def __init__(
        self,
        token: str,
        heartbeat_s: float,
        make: Callable[[int, int], tuple[NodeReport, int]],
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._make = make
        self._hurried = hurried
        self._lines: dict[str, _Line] = {}

    def set_controllers(self, records: dict[str, ControllerRecord]) -> None:
        """Report to exactly these from now on."""
        for name, line in list(self._lines.items()):
            if name not in records or records[name].rpc_address != line.address:
                line.task.cancel()
                del self._lines[name]
        for name, record in records.items():
            if name not in self._lines:
                task = asyncio.create_task(self._run(name, record.rpc_address), name=f"report-{name}")
                self._lines[name] = _Line(record.rpc_address, task)

    def kick(self) -> None:
        """There is news: report now."""
        for line in self._lines.values():
            line.news = True
            line.due.set()

    async def flush(self, limit_s: float) -> None:
        """Report to everybody now, and wait until it has left, within `limit_s`."""
        for line in self._lines.values():
            line.said.clear()
        self.kick()
        leaving = [asyncio.create_task(line.said.wait()) for line in self._lines.values()]
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=limit_s)
            for task in late:
                task.cancel()

    async def close(self) -> None:
        tasks = [line.task for line in self._lines.values()]
        self._lines.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: str, address: str) -> None:
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        await asyncio.sleep(0)  # let set_controllers store our line first
        while True:
            line = self._lines[name]
            line.seq, line.told, line.news, line.every, line.uncounted = 0, None, True, 1, COUNTERS_BEATS
            try:
                async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                    call = channel.stream_stream(
                        rpc.CONTROL_REPORT,
                        request_serializer=rpc.encode,
                        response_deserializer=rpc.decode_ack,
                    )(self._batches(line), metadata=(("authorization", f"Bearer {self._token}"),))
                    async for ack in call:
                        line.every = max(1, round(ack.beat_s / self._heartbeat_s))
                        backoff.succeeded()
            except grpc.aio.AioRpcError as error:
                log.debug("reports to %s: %s", name, error.code())
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # grpc.aio cancels the call, and so this task, when a report could not be made or encoded. To
                # end here would be to fall silent, which controllers take for death.
                log.warning("the stream of reports to %s broke off: a report could not be made", name)
            await backoff.pause()

    async def _batches(self, line: _Line) -> AsyncIterator[ReportBatch]:
        while True:
            line.due.clear()
            if (batch := self._next(line)) is not None:
                yield batch
                line.said.set()
            timer = asyncio.get_running_loop().call_later(self._heartbeat_s, line.due.set)
            await line.due.wait()
            timer.cancel()

    def _next(self, line: _Line) -> ReportBatch | None:
        report, recoveries = self._make(line.seq, line.recoveries_sent)
        news, line.news = line.news, False
        line.beats, line.quiet, line.uncounted = line.beats + 1, line.quiet + 1, line.uncounted + 1
        told = line.told
        news = news or told is None or self._is_news(report, told)
        if news or told is None or self._is_old(report, told, line.beats):
            line.seq += 1
            line.recoveries_sent, line.told, line.beats, line.quiet = recoveries, report, 0, 0
            if line.uncounted >= COUNTERS_BEATS:
                line.uncounted = 0
            else:
                report = replace(report, counters={})
            return ReportBatch(reports=((SLOT, report),), calm=not news)
        if line.quiet < line.every:
            return None
        line.quiet = 0
        return BEAT

    def _is_old(self, report: NodeReport, told: NodeReport, beats: int) -> bool:
        """Whether `told` is to be renewed although there is no news."""
        return beats >= FULL_IDLE_BEATS or (report.progress != told.progress and beats >= FULL_BEATS)

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
