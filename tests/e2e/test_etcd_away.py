"""All of etcd is away for longer than anything in it lives. The waiting is done beside other tests: see outage.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.outage import ETCD, OUTAGE
from tests.e2e.test_moves import kfadmin
from tests.e2e.test_operations import changed, under_load


@pytest.fixture
def away(etcd_binary: None) -> Iterator[Cluster]:
    """A cluster whose etcd has been away for five minutes, since an earlier test or since now."""
    try:
        OUTAGE.begin()
        yield OUTAGE.wait()
    finally:
        OUTAGE.close()


@pytest.mark.timeout(600)
def test_all_of_etcd_is_away_for_five_minutes(away: Cluster) -> None:
    """No request fails, nothing is restarted; `check quorum` tells; then an operation works again."""
    assert OUTAGE.streams, "somebody has asked, and got what an undisturbed cluster answers"
    assert changed(OUTAGE.pids, away.local.pids()) == set(ETCD)

    async def end() -> None:
        await away.expect_equal(await away.generator.streams(OUTAGE.prompts[:2]))
        told = await asyncio.to_thread(kfadmin, away, "check", "quorum")
        assert told.returncode == 3, told.stdout
        assert "0 of 3 etcd members" in told.stdout
        for name in ETCD:
            away.local.release(name)
        await away.wait_for(lambda s: s.leader and s.etcd_age_s < 3.0, "etcd is back", 30.0)

    streams = asyncio.run(under_load(away, end))
    asyncio.run(away.expect_equal(streams))
    assert changed(OUTAGE.pids, away.local.pids()) == set(ETCD)
    assert kfadmin(away, "check", "quorum").returncode == 0
    assert kfadmin(away, "replace", "n3").returncode == 0
    assert changed(OUTAGE.pids, away.local.pids()) == {*ETCD, "n3"}
