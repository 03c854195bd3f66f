"""Reports of newer code that this code cannot read: their senders are heard, and nobody is taken for dead."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from controlplane.contract import rpc
from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, ReportBatch
from controlplane.contract.schema import SCHEMA
from controlplane.core.events import HeartbeatsReceived, ReportReceived
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer, _Refused, _Stream

ME = Member("n0", "a")
REPORT = NodeReport(ME, 1, 0.0, 7)


def changed(batch: ReportBatch, schema: int) -> bytes:
    """The same batch with reports in another shape."""
    raw: list[Any] = msgspec.msgpack.decode(rpc.encode(batch))
    raw[0] = [[slot, [*report[:3], {"steps": 7}, *report[4:]]] for slot, report in raw[0]]
    return msgspec.msgpack.encode([*raw[:4], schema, False, "and one thing more"])


def test_what_is_added_is_ignored_and_what_is_changed_counts_as_a_sign_of_life() -> None:
    async def body() -> None:
        inbox = Inbox()
        server, stream = ReportServer("t", inbox, TimingConfig()), _Stream()
        good = ReportBatch(reports=((0, REPORT),))
        raw: list[Any] = msgspec.msgpack.decode(rpc.encode(good))
        raw[0][0][1].append({"by": "newer code"})
        await server._take(
            stream, msgspec.msgpack.encode([*raw[:4], SCHEMA + 1, False, "and one thing more"])
        )
        first = await inbox.get(1.0)
        assert first == ReportReceived(REPORT)
        await server._take(stream, changed(good, SCHEMA + 1))
        assert await inbox.get(1.0) == HeartbeatsReceived((ME,))
        assert (server.unread, server.refused) == (1, 0)
        with pytest.raises(_Refused, match="not a ReportBatch"):
            await server._take(stream, changed(good, SCHEMA))
        for junk in (b"", b"\x93nonsense", rpc.encode({"schema": SCHEMA + 1})):
            with pytest.raises(_Refused):
                await server._take(stream, junk)

    asyncio.run(body())
