"""Tells the other candidates how many nodes this controller hears (see controlplane/core/handover.py), and which
topology is the newest that it knows."""

from __future__ import annotations

import asyncio

import structlog

from controlplane.backoff import Backoff
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import Hearing
from controlplane.contract.topology import Topology
from controlplane.core.controller import Controller
from controlplane.core.handover import worth_telling
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError
from controlplane.etcd.register import Registration
from controlplane.etcd.values import Put
from controlplane.keyspace.view import View

log = structlog.get_logger()

PERIOD_S = 0.5
CALL_LIMIT_S = 1.0


async def tell_hearing(
    client: EtcdClient, keys: Keys, me: str, controller: Controller, presence: Registration, view: View
) -> None:
    """Until cancelled. What was told stays in etcd when this process is gone: of counts only candidates' are looked at,
    and who leads next goes on from the newest topology although nobody else who knew it lives."""
    await presence.held.wait()
    told: Hearing | None = None
    backoff = Backoff(PERIOD_S, 8 * PERIOD_S)
    while True:
        now = Hearing(me, controller.hears, controller.newest)
        if told is not None and not _worth_telling(now, told, controller.topology, view.hearing.get(me)):
            await asyncio.sleep(PERIOD_S)
            continue
        put = Put(keys.hearing(me), encode(now))
        try:
            result = await client.txn(presence.guard(), [put], timeout_s=CALL_LIMIT_S)
        except EtcdError as error:
            log.info("not told how many nodes are heard", count=now.nodes, error=str(error))
        else:
            if result.succeeded:
                told = now
                backoff.succeeded()
        await backoff.pause()


def _worth_telling(now: Hearing, told: Hearing, topology: Topology | None, in_etcd: Hearing | None) -> bool:
    # An etcd that went back may have lost what it was told as well.
    behind = topology is None or topology.counter < now.topology_counter
    return (
        worth_telling(now.nodes, told.nodes)
        or now.topology_counter > told.topology_counter
        or (behind and in_etcd != told)
    )
