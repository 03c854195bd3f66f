"""The server end of Control.Report: every host reports to every candidate, leader or not.

A member may be carried by more than one stream: its host's relay, and one of its own while the relay does not answer.
It is cut off when the last of them that still carries it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from controlplane.contract import rpc
from controlplane.contract.address import ANY_PORT, join
from controlplane.contract.auth import bearer_matches
from controlplane.contract.config import TimingConfig
from controlplane.contract.identity import HANDSHAKE_LIMIT, PLAIN, Identity, ProcessRole, no_role
from controlplane.contract.ids import Member
from controlplane.contract.reports import (
    REPORT_SCHEMA,
    NodeReport,
    ReportAck,
    ReportBatch,
    beat_every_s,
    report_every_s,
)
from controlplane.core.events import (
    CoreEvent,
    HeartbeatsReceived,
    ProcessEnded,
    ReportReceived,
    ReportStreamBroken,
)
from controlplane.shell.inbox import Inbox
from controlplane.unreadable import UNREADABLE

log = structlog.get_logger()

MESSAGE_BYTES_MAX = 4 << 20
SLOTS_MAX = 4096  # members that one stream may speak for
# How long ago a stream may last have carried a member to stand for it, in what it was told to leave between beats.
CARRIED_BEATS = 3
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),
    HANDSHAKE_LIMIT,
    *rpc.PINGS_WELCOME,
    # Notice peers that vanished without a goodbye.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
]

NOTHING_TOLD = ReportAck(0)


class _Refused(Exception):
    """A sender broke the protocol; the text says how."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One sender, and the members that it speaks for."""

    nodes: frozenset[str] | None = None  # of whom it may speak, by its certificate; None: of all
    relay: bool = False
    members: dict[int, Member] = field(default_factory=dict)  # by slot
    slots: dict[Member, int] = field(default_factory=dict)
    heard: float = 0.0  # when the last batch came
    told: ReportAck = NOTHING_TOLD  # the last acknowledgement


class ReportServer:
    """Reports become ReportReceived, beats HeartbeatsReceived; ReportStreamBroken follows at once when the last stream
    that carries a member ends, and a moment later when that was a relay's. Of a process that has ended, as its host's
    relay says, ProcessEnded comes before."""

    def __init__(
        self,
        token: str,
        inbox: Inbox,
        timing: TimingConfig,
        identity: Identity = PLAIN,
        beside: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        """`beside`: other services on the same port."""
        self.reports = 0
        self.beats = 0
        self.batches = 0
        self.refused = 0
        self.unread = 0  # batches of newer code
        self._token = token
        self._identity = identity
        self._inbox = inbox
        self._timing = timing
        self._beside = tuple(beside)
        self._senders = 0  # open streams
        self._ack = ReportAck(0)  # how often each of so many is to speak
        self._carriers: dict[Member, list[_Stream]] = {}
        self._newest: dict[Member, tuple[int, _Stream]] = {}  # report of each, and what brought it
        self._stopping = False
        self._server: Any = None

    @property
    def streams(self) -> int:
        """Members that some stream speaks for."""
        return len(self._carriers)

    @property
    def senders(self) -> int:
        """Streams, of nodes and of relays."""
        return self._senders

    async def start(self, host: str, advertise: str = "", ports: Sequence[int] = ANY_PORT) -> str:
        """Begin to listen on one of `ports`; the address, with the host that others connect to. Raises ConfigError."""
        self._server = grpc.aio.server(options=OPTIONS)
        handler = rpc.stream_handler(rpc.CONTROL, "Report", self._report, None)
        self._server.add_generic_rpc_handlers((handler, *self._beside))
        port = self._identity.listen(self._server, "reports (controller_ports)", host, ports)
        await self._server.start()
        return join(advertise or host, port)

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
        nodes, relays = self._identity.callers(context, ProcessRole.NODE), ProcessRole.RELAY
        if nodes is not None and self._identity.callers(context, relays):
            nodes = None  # a relay speaks for the nodes of its host, whichever they are
        if nodes is not None and not nodes:
            self.refused += 1
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, no_role(ProcessRole.NODE))
        stream = _Stream(nodes)
        self._senders += 1
        self._count()
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                await self._take(stream, message)
                if stream.told is not self._ack:
                    stream.told = self._ack
                    await context.write(stream.told)
        except _Refused as error:
            self.refused += 1
            log.warning(
                "a report cannot be read", members=[str(m) for m in stream.slots][:8], error=str(error)
            )
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._senders -= 1
            self._count()
            # Also when the peer was killed: grpc cancels this task as soon as the connection breaks.
            if not self._stopping:
                self._ended(stream)

    def _count(self) -> None:
        timing = self._timing
        beat_s = beat_every_s(self._senders, timing.heartbeat_s, timing.suspect_after_s)
        ack = ReportAck(0, beat_s, report_s=report_every_s(self.streams, timing.heartbeat_s))
        if ack != self._ack:
            self._ack = ack

    async def _take(self, stream: _Stream, message: bytes) -> None:
        # Decoded here rather than by grpc, whose answer to an error would be silence.
        try:
            batch: ReportBatch = rpc.decode_reports(message)
        except UNREADABLE as error:
            await self._take_unread(stream, message, error)
            return
        self.batches += 1
        stream.heard, stream.relay = time.monotonic(), batch.relay
        events: list[CoreEvent] = []
        for slot, report in batch.reports:
            if stream.members.get(slot) != report.member:
                if stream.nodes is not None and report.member.node not in stream.nodes:
                    raise _Refused(f"its certificate does not name {report.member.node}")
                self._carry(stream, slot, report.member)
            newest = self._is_newest(stream, report)
            events.append(ReportReceived(report) if newest else HeartbeatsReceived((report.member,)))
        self.reports += len(events)
        try:
            beats = tuple([stream.members[slot] for slot in batch.beats])
        except KeyError as error:
            raise _Refused(f"slot {error} has not reported on this stream") from error
        if beats:
            self.beats += len(beats)
            events.append(HeartbeatsReceived(beats))
        if events:  # who only leaves does not wait for room
            await self._inbox.put(*events, calm=batch.calm or not batch.reports)
        for slot in batch.gone:
            member = stream.members.pop(slot, None)
            if member is not None:
                if slot in batch.ended:
                    self._inbox.put_own(ProcessEnded(member))
                del stream.slots[member]
                self._drop(member, stream)

    async def _take_unread(self, stream: _Stream, message: bytes, error: Exception) -> None:
        """A batch of newer code cannot be read, but whoever it speaks for is heard. Raises _Refused for one of older
        code, and for junk."""
        try:
            schema = rpc.decode_header(message).schema
        except UNREADABLE:
            schema = 0
        if 0 < schema < REPORT_SCHEMA:
            raise _Refused(rpc.refusal_of_reports(schema)) from error
        if schema <= REPORT_SCHEMA:
            raise _Refused(f"not a ReportBatch: {error}") from error
        self.unread += 1
        stream.heard = time.monotonic()
        if stream.members:
            await self._inbox.put(HeartbeatsReceived(tuple(stream.members.values())))

    def _is_newest(self, stream: _Stream, report: NodeReport) -> bool:
        """Not if another way of the same member, which still stands, was faster: a relay that was stopped, or a stream
        that was left, brings old reports. Of one stream the order is its own."""
        newest = self._newest.get(report.member)
        if newest is not None and newest[1] is not stream and report.seq < newest[0]:
            return False
        self._newest[report.member] = report.seq, stream
        return True

    def _carry(self, stream: _Stream, slot: int, member: Member) -> None:
        if slot in stream.members:
            raise _Refused("one slot speaks for one member")
        if member in stream.slots:
            raise _Refused(f"two slots speak for {member}")
        if len(stream.members) >= SLOTS_MAX:
            raise _Refused(f"one stream speaks for at most {SLOTS_MAX} members")
        stream.members[slot] = member
        stream.slots[member] = slot
        self._carriers.setdefault(member, []).append(stream)
        self._count()

    def _ended(self, stream: _Stream) -> None:
        members = list(stream.slots)
        if not stream.relay:
            for member in members:
                self._drop(member, stream)
        elif members:
            # A relay's death is nobody else's: its nodes connect by themselves, all at once, and on a busy machine
            # some are late. Silence alone tells of those that do not until then: of whoever its neighbours miss after
            # `suspect_after_s`, of whoever they hear after `dead_after_s` (evidence.py).
            asyncio.get_running_loop().call_later(self._timing.dead_after_s, self._forsaken, stream, members)

    def _forsaken(self, stream: _Stream, members: list[Member]) -> None:
        for member in members:
            if not self._stopping:
                self._drop(member, stream)

    def _drop(self, member: Member, stream: _Stream) -> None:
        """`stream` carries `member` no longer. Another one that has just carried it stands for it; it beats as often as
        it was told the last time, which it hears of with its next batch only."""
        carriers = self._carriers.get(member, [])
        if stream not in carriers:
            return
        carriers.remove(stream)
        # Older code, which no relay speaks for, counts its reports anew on each stream.
        ended = member in self._newest and self._newest[member][1] is stream
        if not carriers or (ended and not any(other.relay for other in carriers)):
            self._newest.pop(member, None)
        if not carriers:
            del self._carriers[member]
            self._count()
        now = time.monotonic()
        if not any(now - o.heard < CARRIED_BEATS * max(o.told.beat_s, self._ack.beat_s) for o in carriers):
            self._inbox.put_own(ReportStreamBroken(member))
