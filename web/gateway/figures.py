"""What this gateway has counted, told to every controller every few seconds: for charts, nothing depends on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import grpc
import structlog

from controlplane.contract import rpc
from controlplane.contract.figures import WANTED_MAX, GatewayReport
from controlplane.contract.identity import PLAIN, Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from controlplane.contract.lives import Life, Lives
from web.gateway.metrics import Metrics

log = structlog.get_logger()

PERIOD_S = 2.0
CALL_LIMIT_S = 1.5
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


class FiguresReporter:
    """`controllers()`: gRPC addresses of those that are registered now, by name."""

    def __init__(
        self,
        me: Member,
        token: str,
        metrics: Metrics,
        controllers: Callable[[], Mapping[str, str]],
        identity: Identity = PLAIN,
        find: Callable[[str], Sequence[Life]] = lambda request: (),
    ) -> None:
        """`find`: lives by request, for controllers that ask."""
        self.failures = 0
        self._me = me
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._metrics = metrics
        self._controllers = controllers
        self._identity = identity
        self._find = find
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}  # by name and address
        self._errors: dict[str, str] = {}  # by name: the last one that was logged
        self._began = time.monotonic()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                wanted = set(self._controllers().items())
                for gone in self._channels.keys() - wanted:
                    await self._channels.pop(gone).close()
                report = self.report()
                await asyncio.gather(*(self._tell(name, address, report) for name, address in sorted(wanted)))
        finally:
            for channel in self._channels.values():
                await channel.close()

    def report(self, wanted: Sequence[str] = ()) -> GatewayReport:
        """As of now, with the lives of requests that are `wanted`."""
        metrics = self._metrics
        return GatewayReport(
            gateway=self._me.node,
            incarnation=self._me.incarnation,
            age_s=time.monotonic() - self._began,
            tokens=metrics.tokens.given,
            first_token=metrics.first_token(),
            inter_token=metrics.tokens.waits(),
            lives=tuple(Lives(request, tuple(self._find(request))) for request in wanted[:WANTED_MAX]),
        )

    async def _tell(self, name: str, address: str, report: GatewayReport) -> None:
        channel = self._channels.get((name, address))
        if channel is None:
            peer = ProcessName(ProcessRole.CONTROLLER, name)
            channel = self._channels[name, address] = self._identity.channel(address, peer, OPTIONS)
        call = channel.unary_unary(
            rpc.FIGURES_REPORT, request_serializer=rpc.encode, response_deserializer=rpc.decode_taken
        )
        try:
            taken = await call(report, metadata=self._metadata, timeout=CALL_LIMIT_S)
            if taken.wanted:  # once: what it wants then has time until the next report
                await call(self.report(taken.wanted), metadata=self._metadata, timeout=CALL_LIMIT_S)
            self._errors.pop(name, None)
            return
        except grpc.aio.AioRpcError as error:
            why = error.code().name  # UNIMPLEMENTED: of a release that has no charts
        except asyncio.CancelledError:
            # grpc.aio reports a call that the other side cancelled as if our own task had been.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            why = "cancelled by the controller"
        self.failures += 1
        if self._errors.get(name) != why:
            log.info("a controller did not take our figures", controller=name, error=why)
        self._errors[name] = why
        # The next try has a connection of its own, with certificates as they are then.
        await self._channels.pop((name, address)).close()
