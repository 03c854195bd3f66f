"""A controller that decides without a pause keeps its lease: its loss would begin everything anew, when it hurts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest

from controlplane.core.events import Effect, Tick
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.lease import _answer
from controlplane.shell.inbox import Inbox
from controlplane.shell.runtime import Runtime
from tests.io.etcd_proxy import eventually
from tests.io.etcd_server import etcd_member

DECISION_S = 1.0
TTL_S = 10
RENEWALS = 4  # more than one lease has time for
LIMIT_S = 60.0


class Busy:
    """A core to which every decision is a reason for the next one."""

    news = False
    writing = False

    def __init__(self, inbox: Inbox) -> None:
        self.decisions = 0
        self._inbox = inbox

    def take(self, event: object, now: float, unix_now: float) -> None:
        self.news = True

    def ready(self, now: float, unix_now: float) -> list[Effect]:
        time.sleep(DECISION_S)
        self.decisions += 1
        self._inbox.put_own(Tick())
        return []


def test_a_busy_controller_keeps_its_lease(tmp_path: Path) -> None:
    async def main(endpoint: str) -> None:
        async with EtcdClient([endpoint]) as client:
            election = Election(client, "busy/", b"{}", ttl_s=TTL_S)
            leadership = await asyncio.wait_for(election.campaign(), LIMIT_S)
            inbox = Inbox()
            core = Busy(inbox)
            unused: Any = None  # this core has no effects, and nobody else campaigns
            runtime = Runtime(cast(Any, core), inbox, unused, unused, election)
            deciding = asyncio.create_task(runtime.run())
            keeper = leadership._keeper
            enough = keeper.renewals + RENEWALS
            await eventually(
                lambda: keeper.renewals >= enough or keeper.lost.is_set(), LIMIT_S, "it is renewed or lost"
            )
            assert not leadership.lost.is_set(), leadership.lost_reason
            assert core.decisions > 1
            deciding.cancel()
            await asyncio.gather(deciding, return_exceptions=True)

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member.endpoint))


def test_an_answer_that_waits_to_be_read_is_not_missing() -> None:
    """The loop's turns are so long that to read it takes longer than an answer may take."""

    async def asking() -> str:
        for _ in range(10):
            await asyncio.sleep(0)
            work()
        return "answer"

    def work() -> None:
        time.sleep(0.03)

    assert asyncio.run(_answer(asking(), 0.1)) == "answer"


def test_an_answer_that_does_not_come_is_waited_for_no_longer_than_it_may_take() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(_answer(asyncio.sleep(3600.0), 0.1))
