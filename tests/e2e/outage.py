"""Five minutes without etcd, which pass beside other tests: a cluster of their own has lost all of it, and is asked."""

from __future__ import annotations

import asyncio
import threading
import time

from controlplane.kfadmin.loadgen import Prompt, Stream, sample_prompts
from tests.e2e.cluster import Cluster

ETCD = ("etcd0", "etcd1", "etcd2")
AWAY_S = 300.0  # what operators are promised; leases, registrations and watches all run out in it
ASK_EVERY_S = 5.0  # seldom: others measure, or compute, meanwhile


class Outage:
    """`begin` when there is something else to do, `wait` when there is not. What fails before then fails `wait`."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts
        self.streams: list[Stream] = []  # asked for, and ended, while etcd was away
        self.pids: dict[str, int] = {}  # of before
        self._cluster: Cluster | None = None
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._asking: threading.Thread | None = None
        self._since = 0.0

    def begin(self) -> None:
        """Start the cluster and take etcd away from it; once."""
        if self._cluster is not None or self._error is not None:
            return
        try:
            cluster = Cluster(instances=2, stages=2, controllers=3, etcd_members=3, gateways=2)
            cluster.__enter__()
            self._cluster = cluster
            asyncio.run(cluster.wait_all_home())
            asyncio.run(cluster.references(self.prompts))
            self.pids = cluster.local.pids()
            for name in ETCD:
                cluster.local.hold(name)
                cluster.kill(name)
            self._since = time.monotonic()
            self._asking = threading.Thread(target=self._ask, args=(cluster,), name="outage")
            self._asking.start()
        except Exception as error:
            self._error = error

    def wait(self) -> Cluster:
        """The cluster, once etcd has been away for long enough; nobody asks any more. Raises what went wrong."""
        while self._error is None and (left_s := self._since + AWAY_S - time.monotonic()) > 0:
            time.sleep(min(left_s, 1.0))
        self._end_asking()
        if self._error is not None:
            raise self._error
        assert self._cluster is not None
        return self._cluster

    def close(self) -> None:
        self._end_asking()
        running, self._cluster = self._cluster, None
        if running is not None:
            running.__exit__(None, None, None)

    def _end_asking(self) -> None:
        self._stop.set()
        if self._asking is not None:
            self._asking.join()

    def _ask(self, cluster: Cluster) -> None:
        try:
            while not self._stop.is_set():
                prompt = self.prompts[len(self.streams) % len(self.prompts)]
                self.streams += asyncio.run(cluster.generator.streams([prompt]))
                asyncio.run(cluster.expect_equal(self.streams[-1:]))
                self._stop.wait(ASK_EVERY_S)
        except Exception as error:
            self._error = error


OUTAGE = Outage(sample_prompts(8, 200))
