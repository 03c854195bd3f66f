"""The server end of Control.Report: every node streams its reports to every candidate, leader or not."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec
import structlog

from controlplane.contract import rpc
from controlplane.contract.auth import bearer_matches
from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, ReportAck
from controlplane.core.events import ReportReceived, ReportStreamBroken
from controlplane.shell.inbox import Inbox

log = structlog.get_logger()

STREAMS_MAX = 1024
MESSAGE_BYTES_MAX = 1 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),
    # Notice peers that vanished without a goodbye; nodes may ping us as often.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]


class ReportServer:
    """Reports become ReportReceived; the end of a member's newest stream becomes ReportStreamBroken at once."""

    def __init__(self, token: str, inbox: Inbox) -> None:
        self.reports = 0
        self.refused = 0
        self._token = token
        self._inbox = inbox
        self._newest: dict[Member, object] = {}
        self._stopping = False
        self._server: Any = None

    @property
    def streams(self) -> int:
        return len(self._newest)

    async def start(self, host: str) -> str:
        """Begin to listen on a free port; the address."""
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=STREAMS_MAX)
        handler = rpc.stream_handler(rpc.CONTROL, "Report", self._report, None)
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return f"{host}:{port}"

    async def stop(self) -> None:
        """Cut every stream; no event comes of it."""
        self._stopping = True
        if self._server is not None:
            await self._server.stop(grace=0)

    async def _report(self, _requests: Any, context: Any) -> None:
        headers = {key: value for key, value in context.invocation_metadata() or ()}
        if not bearer_matches(headers.get("authorization"), self._token):
            self.refused += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        me, member = object(), None
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                report = await self._parse(message, member, context)
                first, member = member is None, report.member
                self._newest[member] = me
                self.reports += 1
                await self._inbox.put(ReportReceived(report))
                if first:
                    await context.write(ReportAck(report.seq))
        finally:
            # Also when the peer was killed: grpc cancels this task as soon as the connection breaks. A stream
            # that its own member has replaced by a newer one tells nothing.
            if member is not None and self._newest.get(member) is me:
                del self._newest[member]
                if not self._stopping:
                    self._inbox.put_own(ReportStreamBroken(member))

    async def _parse(self, message: bytes, member: Member | None, context: Any) -> NodeReport:
        # Decoded here rather than by grpc, whose answer to an error would be silence.
        try:
            report = rpc.decode_report(message)
        except msgspec.MsgspecError as error:
            self.refused += 1
            log.warning("a node report cannot be read", member=str(member), error=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a NodeReport: {error}")
            raise
        if member is not None and report.member != member:
            self.refused += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "one stream speaks for one member")
        return report
