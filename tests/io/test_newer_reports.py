"""Reports of other code that this code cannot read: senders of newer ones are heard, and nobody is taken for dead; what
is older is refused with what to do."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from controlplane.contract import rpc
from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.reports import REPORT_SCHEMA, NodeReport, ReportBatch
from controlplane.core.events import HeartbeatsReceived, ReportReceived
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer, _Refused, _Stream

ME = Member("n0", "a")
REPORT = NodeReport(ME, 1, 0.0, 7)


def changed(batch: ReportBatch, schema: int) -> bytes:
    """The same batch with reports in another shape."""
    raw: list[Any] = msgspec.msgpack.decode(rpc.encode(batch))
    raw[0] = [[slot, [*report[:3], {"steps": 7}, *report[4:]]] for slot, report in raw[0]]
    return msgspec.msgpack.encode([*raw[:4], schema, False, [], "and one thing more"])


def test_what_is_added_is_ignored_and_what_is_changed_counts_as_a_sign_of_life() -> None:
    async def body() -> None:
        inbox = Inbox()
        server, stream = ReportServer("t", inbox, TimingConfig()), _Stream()
        good = ReportBatch(reports=((0, REPORT),))
        raw: list[Any] = msgspec.msgpack.decode(rpc.encode(good))
        raw[0][0][1].append({"by": "newer code"})
        await server._take(
            stream, msgspec.msgpack.encode([*raw[:4], REPORT_SCHEMA + 1, False, [], "and one thing more"])
        )
        first = await inbox.get(1.0)
        assert first == ReportReceived(REPORT)
        await server._take(stream, changed(good, REPORT_SCHEMA + 1))
        assert await inbox.get(1.0) == HeartbeatsReceived((ME,))
        assert (server.unread, server.refused) == (1, 0)
        with pytest.raises(_Refused, match="not a ReportBatch"):
            await server._take(stream, changed(good, REPORT_SCHEMA))
        for junk in (b"", b"\x93nonsense", rpc.encode({"schema": REPORT_SCHEMA + 1})):
            with pytest.raises(_Refused):
                await server._take(stream, junk)

    asyncio.run(body())


def test_reports_of_the_first_schema_were_maps_and_are_refused_with_what_to_do() -> None:
    raw = msgspec.structs.asdict(REPORT) | {"member": msgspec.structs.asdict(ME)}

    async def body() -> None:
        server = ReportServer("t", Inbox(), TimingConfig())
        with pytest.raises(_Refused, match=r"have schema 1, .* reads 2: restart the sender with the newer"):
            await server._take(_Stream(), msgspec.msgpack.encode([[[0, raw]], [], [], False, 1]))

    asyncio.run(body())
