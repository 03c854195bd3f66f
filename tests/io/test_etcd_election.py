"""Leases and leadership against real etcd: one leader, soon another when it dies, and never two writers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election, Leadership, leader_of
from controlplane.etcd.values import Put
from tests.io.etcd_proxy import etcd_proxy, eventually, no_task_left
from tests.io.etcd_server import EtcdMember, etcd_member

LIMIT_S = 10.0
# TTL 2 s; etcd looks for expired leases every 0.5 s; and a busy machine.
TAKEOVER_LIMIT_S = 3.5

HOLDER = """
import asyncio, sys
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election

async def main():
    async with EtcdClient([sys.argv[1]]) as client:
        await Election(client, sys.argv[2], b'{"id": "holder"}').campaign()
        print("leads", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMember]:
    with etcd_member(tmp_path_factory.mktemp("etcd")) as member:
        yield member


async def campaign(client: EtcdClient, prefix: str, name: str) -> Leadership:
    identity = b'{"id": "%s"}' % name.encode()
    return await asyncio.wait_for(Election(client, prefix, identity).campaign(), LIMIT_S)


def test_a_lease_that_nobody_keeps_takes_its_keys_along(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            lease, ttl_s = await client.lease_grant(2)
            assert ttl_s == 2
            started = time.monotonic()
            await client.put("lease/left", b"", lease=lease)
            keeper = await client.lease_keeper(2)
            await client.put("lease/kept", b"", lease=keeper.lease_id)

            async def expired() -> bool:
                return "lease/left" not in (await client.get_prefix("lease/")).items

            await eventually(expired, 5, "the lease expires")
            assert time.monotonic() - started > 1.8
            assert await client.get("lease/kept") is not None
            assert keeper.valid()
            assert keeper.renewals >= 3

            reasons: list[str] = []
            keeper.on_lost(reasons.append)
            await client.lease_revoke(keeper.lease_id)
            await asyncio.wait_for(keeper.lost.wait(), 1.5)
            assert not keeper.valid()
            assert reasons == [keeper.lost_reason]
            assert "expired or was revoked" in keeper.lost_reason
            assert client.counters.leases_lost == 1

    asyncio.run(main())


def test_a_lease_is_lost_by_our_own_clock_when_etcd_is_silent(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            keeper = await client.lease_keeper(2)
            await eventually(lambda: keeper.renewals >= 2, LIMIT_S, "it is renewed")
            paused = time.monotonic()
            member.pause()
            await asyncio.wait_for(keeper.lost.wait(), LIMIT_S)
            assert 1.0 < time.monotonic() - paused < 2.0  # before etcd's own two seconds
            assert "not renewed" in keeper.lost_reason
            member.resume()

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_the_holder_is_killed_and_the_other_takes_over(etcd: EtcdMember) -> None:
    async def main(holder: subprocess.Popen[bytes]) -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            other = asyncio.create_task(campaign(client, "kill/", "other"))

            async def both_stand() -> bool:
                return len((await client.get_prefix("kill/")).items) == 2

            await eventually(both_stand, LIMIT_S, "both are candidates")
            assert not other.done()
            killed = time.monotonic()
            holder.kill()
            leadership = await other
            took_s = time.monotonic() - killed
            assert took_s < TAKEOVER_LIMIT_S
            assert leadership.valid()
            await leadership.resign()

    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, etcd.endpoint, "kill/"], stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"leads\n"
            asyncio.run(main(holder))
        finally:
            holder.kill()


def test_an_old_leader_stops_first_and_its_late_write_changes_nothing(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with (
            etcd_proxy(etcd.client_port) as proxy,
            EtcdClient([proxy.endpoint]) as slow,
            EtcdClient([etcd.endpoint]) as client,
        ):
            old = await campaign(slow, "fence/", "old")
            assert (await slow.txn([old.guard()], [Put("fenced", b"old")])).succeeded
            other = asyncio.create_task(campaign(client, "fence/", "new"))

            async def both_stand() -> bool:
                return len((await client.get_prefix("fence/")).items) == 2

            await eventually(both_stand, LIMIT_S, "both are candidates")
            lost_at: list[float] = []
            old._keeper.on_lost(lambda _: lost_at.append(time.monotonic()))
            proxy.silence()
            new = await other
            won_at = time.monotonic()
            assert lost_at
            assert lost_at[0] < won_at  # the old one had stopped before the new one began
            assert not old.valid()
            assert new.create_revision > old.create_revision
            assert (await client.txn([new.guard()], [Put("fenced", b"new")])).succeeded

            proxy.heal()
            late = await slow.txn([old.guard()], [Put("fenced", b"late")], timeout_s=LIMIT_S)
            assert not late.succeeded
            kv = await client.get("fenced")
            assert kv is not None
            assert kv.value == b"new"
            assert not old.valid()
            await new.resign()

    asyncio.run(main())


def test_resigning_hands_over_at_once_and_everyone_sees_it(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            seen: list[bytes | None] = []

            async def look() -> None:
                async for leader in Election(client, "resign/", b"").observe():
                    seen.append(leader.identity if leader else None)

            looking = asyncio.create_task(look())
            await eventually(lambda: seen == [None], LIMIT_S, "nobody leads yet")
            first = await campaign(client, "resign/", "a")
            assert await client.get(first.key) is not None
            second = asyncio.create_task(campaign(client, "resign/", "b"))
            withdrawn = asyncio.create_task(campaign(client, "resign/", "c"))

            async def all_stand() -> bool:
                return len((await client.get_prefix("resign/")).items) == 3

            await eventually(all_stand, LIMIT_S, "three candidates")
            assert not second.done()
            started = time.monotonic()
            await first.resign()
            assert not first.valid()
            # Whoever of b and c came first leads; cancel the other's candidacy.
            done, _ = await asyncio.wait({second, withdrawn}, return_when=asyncio.FIRST_COMPLETED)
            assert time.monotonic() - started < 1.0
            for candidate in {second, withdrawn} - done:
                candidate.cancel()
                await asyncio.gather(candidate, return_exceptions=True)
            items = (await client.get_prefix("resign/")).items
            (leadership,) = (task.result() for task in done)
            assert list(items) == [leadership.key]
            leader = leader_of(items)
            assert leader is not None
            assert leader.term == leadership.create_revision
            await leadership.resign()
            await eventually(lambda: len(seen) >= 4 and seen[-1] is None, LIMIT_S, "observers see the end")
            assert seen == [None, b'{"id": "a"}', leader.identity, None]
            looking.cancel()

    asyncio.run(main())


def test_a_deleted_key_ends_leadership(etcd: EtcdMember) -> None:
    async def main() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            leadership = await campaign(client, "deleted/", "a")
            await client.delete(leadership.key)
            await asyncio.wait_for(leadership.lost.wait(), 1.5)
            assert "deleted" in leadership.lost_reason
            assert not (await client.txn([leadership.guard()], [Put("deleted-effect", b"")])).succeeded
            await leadership.resign()

    asyncio.run(main())


def test_leadership_comes_back_after_etcd_was_away(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            first = await campaign(client, "away/", "a")
            member.kill()
            await asyncio.wait_for(first.lost.wait(), LIMIT_S)
            again = asyncio.create_task(campaign(client, "away/", "a"))
            await eventually(lambda: client.counters.unavailable > 0, LIMIT_S, "it cannot campaign now")
            member.start()
            second = await again
            assert second.valid()
            assert second.create_revision > first.create_revision
            # The old key's lease outlived the restart; only its end made the second candidacy win.
            assert list((await client.get_prefix("away/")).items) == [second.key]
        await no_task_left()

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))
