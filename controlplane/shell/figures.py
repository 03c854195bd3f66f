"""Rows of figures: measured by every controller, kept for an hour in memory, written to the history by the leader.

Gateways tell each controller what they have counted. Nothing is decided on it: a gateway that is not heard leaves a gap
in a chart.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import msgspec
import structlog

from controlplane.contract import rpc
from controlplane.contract.auth import bearer_matches
from controlplane.contract.errors import Unavailable
from controlplane.contract.figures import Figures, ReportTaken
from controlplane.contract.identity import PLAIN, Identity, ProcessRole, no_role
from controlplane.contract.status import ClusterStatus
from controlplane.core.figures import Meter
from controlplane.history.writer import HistoryWriter
from controlplane.shell.lookups import Lookups
from controlplane.unreadable import UNREADABLE

log = structlog.get_logger()

PERIOD_S = 5.0
REST = 50.0  # times as long as a status took to make, until the next: a fiftieth of a core at most
KEPT_S = 3600.0
ROWS_MAX = int(KEPT_S / PERIOD_S)
TAKEN = ReportTaken()


class Recorder:
    """Makes the rows. `is_leader()`: whether this controller writes them."""

    def __init__(
        self, token: str, history: HistoryWriter, is_leader: Callable[[], bool], identity: Identity = PLAIN
    ) -> None:
        self.refused = 0  # reports of gateways
        self.failed = 0  # rows that could not be made
        self._told = ""  # why, the last time that it was logged
        self._token = token
        self._identity = identity
        self._history = history
        self._is_leader = is_leader
        self._meter = Meter()
        self.lookups = Lookups()
        self._rows: deque[Figures] = deque(maxlen=ROWS_MAX)
        self._read = False  # what was written before this process began is known

    def handler(self) -> grpc.GenericRpcHandler:
        """The service that gateways report to."""
        return rpc.unary_handler(rpc.FIGURES, "Report", self._report)

    def rows(self, after_unix_s: float) -> Sequence[Figures]:
        """Those of the last hour that are later, oldest first."""
        return [row for row in self._rows if row.unix_s > after_unix_s]

    async def run(self, status: Callable[[], Awaitable[ClusterStatus]]) -> NoReturn:
        """Until cancelled: a row every `PERIOD_S`, less often where the status takes long to make. Nothing is decided
        on rows: one that cannot be made leaves a gap in a chart, and the controller goes on."""
        while True:
            began = time.monotonic()
            try:
                row = self._meter.figures(await status(), time.time(), time.monotonic())
                took_s = time.monotonic() - began
                await self._keep(row)
            except Exception as error:
                took_s = time.monotonic() - began
                self.failed += 1
                if repr(error) != self._told:  # once for each cause
                    self._told = repr(error)
                    log.exception("a row of figures cannot be made", failed=self.failed)
            await asyncio.sleep(max(PERIOD_S, REST * took_s))

    async def _keep(self, row: Figures) -> None:
        self._rows.append(row)
        if self._is_leader():
            self._history.put(row)
        if not self._read and self._history.healthy:
            await self._read_earlier()

    async def _read_earlier(self) -> None:
        """Rows of the last hour that an earlier process wrote, or the leader before this controller began."""
        first = self._rows[0].unix_s
        try:
            earlier = await self._history.figures(first - KEPT_S, first, ROWS_MAX)
        except Unavailable as error:
            log.info("figures of the last hour cannot be read yet", error=str(error))
            return
        self._read = True
        room = ROWS_MAX - len(self._rows)
        self._rows.extendleft(
            reversed([row for row in earlier if row.unix_s < first][-room:] if room else [])
        )

    async def _report(self, message: bytes, context: Any) -> ReportTaken:
        headers = {key: value for key, value in context.invocation_metadata() or ()}
        if not bearer_matches(headers.get("authorization"), self._token):
            self.refused += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        taken = self._take(message, self._identity.callers(context, ProcessRole.GATEWAY))
        if isinstance(taken, str):
            self.refused += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, taken)
            return TAKEN  # not reached: it raises
        return taken

    def _take(self, message: bytes, names: frozenset[str] | None) -> ReportTaken | str:
        """The answer, or why the report is refused. `names`: for whom its sender may speak; None: for all."""
        try:
            report = rpc.decode_gateway_report(message)
        except UNREADABLE as error:
            return f"not a GatewayReport: {error}"
        if names is not None and report.gateway not in names:
            return f"{no_role(ProcessRole.GATEWAY)}; or it names another one than {report.gateway[:100]}"
        if why := self._meter.heard(msgspec.structs.replace(report, lives=()), time.monotonic()):
            return why
        self.lookups.heard(report.gateway, report.lives)
        wanted = self.lookups.wanted(report.gateway)
        return ReportTaken(wanted) if wanted else TAKEN
