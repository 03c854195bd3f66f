"""What a gateway makes of etcd's topology: one that goes back in time is not followed, and it is told what it knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, encode
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.etcd.register import Registration
from controlplane.etcd.values import KeyValue, WatchBatch, WatchEvent
from web.gateway.metrics import Metrics
from web.gateway.routing.cluster_watch import ClusterWatch
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.routing.policy import Policy


def served(counter: int) -> Topology:
    stage = Stage(homes=("n0",), ranks=(Member("n0", "0" * 12),))
    return Topology("default", counter, Mode.REPLICATE, (Pipeline("p0", counter, (stage,)),))


def test_an_etcd_that_goes_back_is_told_once_what_this_gateway_knows(tmp_path: Path) -> None:
    async def body() -> None:
        config = ClusterConfig(run_dir=str(tmp_path), model="demo", etcd=())
        keys = Keys.of(config)
        presence = Registration(cast(Any, None), keys.gateway("g1"), b'{"id":"g1","incarnation":"f"}', 5)
        presence.free.set()
        dispatcher = Dispatcher(Policy(), "t", Metrics())

        async def watched(_: str) -> AsyncIterator[WatchBatch]:
            for revision, counter in enumerate((3, 8, 2, 2, 9, 4), start=1):
                item = KeyValue(keys.topology(config.group), encode(served(counter)), 1, revision, 1, 0)
                yield WatchBatch(revision, (WatchEvent(item.key, revision, item),))
                known = dispatcher.router.topology
                assert known is not None
                record = msgspec.json.decode(presence._value)
                assert (record["id"], record["incarnation"]) == ("g1", "f")
                said.append((known.counter, record.get("topology_counter", 0)))

        said: list[tuple[int, int]] = []
        etcd = cast(Any, SimpleNamespace(watch_prefix=watched))
        await ClusterWatch(etcd, config, dispatcher, presence=presence).follow()
        assert said == [(3, 0), (8, 0), (8, 8), (8, 8), (9, 8), (9, 9)]
        await dispatcher.aclose()

    asyncio.run(body())
