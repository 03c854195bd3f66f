"""Tells the other candidates how many nodes this controller hears: see controlplane/core/handover.py."""

from __future__ import annotations

import asyncio

import structlog

from controlplane.backoff import Backoff
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import Hearing
from controlplane.core.controller import Controller
from controlplane.core.handover import worth_telling
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError
from controlplane.etcd.register import Registration
from controlplane.etcd.values import Put

log = structlog.get_logger()

PERIOD_S = 0.5
CALL_LIMIT_S = 1.0


async def tell_hearing(
    client: EtcdClient, keys: Keys, me: str, controller: Controller, presence: Registration
) -> None:
    """Until cancelled. The count stays in etcd when this process is gone: only candidates' counts are looked at."""
    await presence.held.wait()
    told: int | None = None
    backoff = Backoff(PERIOD_S, 8 * PERIOD_S)
    while True:
        count = controller.hears
        if not worth_telling(count, told):
            await asyncio.sleep(PERIOD_S)
            continue
        put = Put(keys.hearing(me), encode(Hearing(me, count)))
        try:
            result = await client.txn(presence.guard(), [put], timeout_s=CALL_LIMIT_S)
        except EtcdError as error:
            log.info("not told how many nodes are heard", count=count, error=str(error))
        else:
            if result.succeeded:
                told = count
                backoff.succeeded()
        await backoff.pause()
