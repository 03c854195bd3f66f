"""Five minutes without etcd, on a cluster of their own: `python -m tests.e2e.outage` ends with 0 if nobody noticed.

A process of its own, since it runs beside tests of the simulator, which replace the clocks of theirs. Streams are rare
while etcd stays away: it is the time that matters then, not the load.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

from controlplane.kfadmin.loadgen import sample_prompts
from tests.e2e.cluster import Cluster
from tests.e2e.test_moves import kfadmin
from tests.e2e.test_operations import changed, under_load

ROOT = Path(__file__).parents[2]
PROMPTS = sample_prompts(8, 200)
ETCD = ("etcd0", "etcd1", "etcd2")
AWAY_S = 300.0  # what operators are promised; leases, registrations and watches all run out in it
ASK_EVERY_S = 5.0
LIMIT_S = 590.0


def main() -> None:
    """No request fails, nothing is restarted; `check quorum` tells; then an operation works again, and a repair."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the session has ended"))  # the cluster with it
    with Cluster(instances=2, stages=2, controllers=3, etcd_members=3, gateways=2) as cluster:
        asyncio.run(cluster.wait_all_home())
        asyncio.run(cluster.references(PROMPTS))
        before = cluster.local.pids()
        asyncio.run(away(cluster))
        assert changed(before, cluster.local.pids()) == set(ETCD)
        assert kfadmin(cluster, "check", "quorum").returncode == 0
        assert kfadmin(cluster, "replace", "n3").returncode == 0
        assert changed(before, cluster.local.pids()) == {*ETCD, "n3"}
        asyncio.run(cluster.wait_all_home(60.0))
        cluster.kill("n2")  # a repair needs etcd
        asyncio.run(
            cluster.wait_for(
                lambda _: cluster.local.node_pids().get("n2") not in (None, before["n2"]), "n2 is back"
            )
        )
        asyncio.run(cluster.wait_all_home(60.0))


async def away(cluster: Cluster) -> None:
    async def go() -> None:
        for name in ETCD:
            cluster.local.hold(name)
            cluster.kill(name)
        await cluster.expect_equal(await cluster.generator.streams(PROMPTS[:2]))

    async def come() -> None:
        told = await asyncio.to_thread(kfadmin, cluster, "check", "quorum")
        assert told.returncode == 3, told.stdout
        assert "0 of 3 etcd members" in told.stdout
        for name in ETCD:
            cluster.local.release(name)
        await cluster.wait_for(lambda s: s.leader and s.etcd_age_s < 3.0, "etcd is back", 30.0)

    streams = await under_load(cluster, go)
    back = time.monotonic() + AWAY_S
    while time.monotonic() < back:
        streams += await cluster.resuming.streams(PROMPTS[:2])
        await asyncio.sleep(ASK_EVERY_S)
    streams += await under_load(cluster, come)
    await cluster.expect_equal(streams)


class Outage:
    """That process, begun before it is waited for if there is something to do meanwhile."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.outage"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # not held back with the tests that it runs beside
            )
        return self._process

    def end(self) -> tuple[int, str]:
        """Its exit status, and the little that it said, once it has ended by itself."""
        process = self.begin()
        said, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, said

    def close(self) -> None:
        """With its cluster, if it still runs: the session may have been cut short."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60.0)


OUTAGE = Outage()

if __name__ == "__main__":
    main()
