"""The node's reports: one stream to every controller, a heartbeat at a fixed pace and a report at once on news.

Each controller has its own task, so that one that hangs delays nobody. No report is queued: each is made
from the state at the moment it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from controlplane.contract import rpc
from controlplane.contract.records import ControllerRecord
from controlplane.contract.reports import NodeReport

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0


@dataclass(slots=True)
class _Line:
    address: str
    task: asyncio.Task[None]
    news: asyncio.Event = field(default_factory=asyncio.Event)
    seq: int = 0
    recoveries_sent: int = 0
    said: asyncio.Event = field(default_factory=asyncio.Event)  # a report has left since it was cleared


class Reporter:
    """`make(seq, recoveries_sent)` gives a report and the count of recoveries it brings the receiver up to."""

    def __init__(
        self, token: str, heartbeat_s: float, make: Callable[[int, int], tuple[NodeReport, int]]
    ) -> None:
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._make = make
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
            line.news.set()

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
        delay_s = BACKOFF_FIRST_S
        await asyncio.sleep(0)  # let set_controllers store our line first
        while True:
            line = self._lines[name]
            line.seq = 0
            try:
                async with grpc.aio.insecure_channel(address) as channel:
                    call = channel.stream_stream(
                        rpc.CONTROL_REPORT,
                        request_serializer=rpc.encode,
                        response_deserializer=rpc.decode_ack,
                    )(self._reports(line), metadata=(("authorization", f"Bearer {self._token}"),))
                    async for _ in call:
                        delay_s = BACKOFF_FIRST_S
            except grpc.aio.AioRpcError as error:
                log.debug("reports to %s: %s", name, error.code())
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # grpc.aio cancels the call, and so this task, when a report could not be made or encoded. To
                # end here would be to fall silent, which controllers take for death.
                log.warning("the stream of reports to %s broke off: a report could not be made", name)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, BACKOFF_MAX_S)

    async def _reports(self, line: _Line) -> AsyncIterator[NodeReport]:
        while True:
            report, line.recoveries_sent = self._make(line.seq, line.recoveries_sent)
            line.seq += 1
            line.news.clear()
            yield report
            line.said.set()
            timer = asyncio.get_running_loop().call_later(self._heartbeat_s, line.news.set)
            await line.news.wait()
            timer.cancel()
