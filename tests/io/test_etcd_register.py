"""A name belongs to one process: registered by compare-and-set, taken over only from what is gone, on real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from controlplane import process
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.errors import EtcdUnavailable, NameTaken
from controlplane.etcd.register import Registration, holder_of
from tests.io.controllers import until
from tests.io.etcd_server import EtcdMember, etcd_member

KEY = "nodes/n2"
WAITING = "waiting/nodes/n2"
TTL_S = 2
WAIT_S = 1.5


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdMember]:
    with etcd_member(tmp_path_factory.mktemp("etcd")) as member:
        yield member


def record(incarnation: str, where: str = "elsewhere") -> bytes:
    return msgspec.json.encode(
        {"member": {"node": "n2", "incarnation": incarnation}, "pid": 77, "process": where}
    )


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


class One:
    """A process that wants the name, with the watch on its own key that every process has."""

    def __init__(self, client: EtcdClient, incarnation: str, where: str = "elsewhere", **more: Any) -> None:
        more.setdefault("wait_s", WAIT_S)
        self.client = client
        self.value = record(incarnation, where)
        self.registration = Registration(client, KEY, self.value, TTL_S, **more)
        self.running = asyncio.create_task(self.registration.run())
        self.watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        await self.registration.held.wait()
        items: dict[str, Any] = {}
        async with contextlib.aclosing(self.client.watch_prefix(KEY)) as watch:
            async for batch in watch:
                items.update({event.key: event.now for event in batch.events})
                self.registration.saw(items.get(KEY), batch.revision)

    async def holds(self) -> bool:
        found = await self.client.get(KEY)
        return found is not None and found.value == self.value and found.lease != 0

    async def end(self) -> None:
        for task in (self.running, self.watching):
            task.cancel()
        await asyncio.gather(self.running, self.watching, return_exceptions=True)
        await self.registration.withdraw()


@contextlib.asynccontextmanager
async def clean(etcd: EtcdMember) -> AsyncIterator[EtcdClient]:
    async with EtcdClient([etcd.endpoint]) as client:
        await client.delete(KEY)
        await client.delete(WAITING)
        yield client


def test_a_stranger_does_not_replace_who_lives(etcd: EtcdMember, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with clean(etcd) as client:
            first = One(client, "a")
            await until(first.holds, 5, "the first has the name")
            began = time.monotonic()
            stranger = One(client, "b")

            async def told() -> bool:
                found = await client.get(WAITING)
                return (
                    found is not None
                    and b"incarnation a, pid 77" in found.value
                    and b"incarnation b" in found.value
                )

            await until(told, 5, "everybody can read who has the name and who wants it")
            with pytest.raises(
                NameTaken, match=r"nodes/n2 is taken by another process \(incarnation a, pid 77\)"
            ):
                await asyncio.wait_for(stranger.running, 10)
            assert WAIT_S <= time.monotonic() - began < WAIT_S + 3, "it waits, and not for ever"
            assert not stranger.registration.held.is_set()
            assert not stranger.registration.free.is_set()
            assert await first.holds()
            assert not first.running.done()
            await stranger.end()
            assert await first.holds(), "who leaves without the name takes nothing along"
            await first.end()

    asyncio.run(body())
    assert any("is taken (incarnation a" in line for line in caplog.messages)


def test_a_record_that_says_more_stays_the_same_processs(etcd: EtcdMember) -> None:
    async def body() -> None:
        async with clean(etcd) as client:
            one = One(client, "a")
            one.registration.amend(topology_counter=5)
            one.value = amended(5)
            await until(one.holds, 5, "what was added before it has its name is there from the beginning")
            one.registration.amend(topology_counter=9)
            one.value = amended(9)
            await until(one.holds, 5, "what was added later is there soon")
            await asyncio.sleep(1.5 * TTL_S)
            assert await one.holds(), "its new lease is kept alive"
            assert not one.running.done()
            await one.end()

    def amended(counter: int) -> bytes:
        return msgspec.json.encode(msgspec.json.decode(record("a")) | {"topology_counter": counter})

    asyncio.run(body())


def test_an_expired_lease_frees_the_name_and_a_dead_process_at_once(
    etcd: EtcdMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "controlplane.etcd.register.TELL_AT", 0.0
    )  # some try comes before the lease has ended

    async def body() -> None:
        async with clean(etcd) as client:
            lease, _ = await client.lease_grant(8)
            await client.put(KEY, record("gone"), lease=lease)
            after = One(client, "b", wait_s=30)

            async def told() -> bool:
                return await client.get(WAITING) is not None

            async def silent() -> bool:
                return not await told()

            await until(told, 8, "it is told who waits")
            await until(after.holds, 20, "the lease has ended, and the next one has the name")
            await until(silent, 5, "it has its name: nothing is wrong")
            await after.end()

            child = sleeper()
            parts = process.identity().split(" ")
            where = " ".join([*parts[:3], str(child.pid), str(process.start_ticks(child.pid))])
            assert not process.is_dead(where)
            lease, _ = await client.lease_grant(60)
            await client.put(KEY, record("killed", where), lease=lease)
            after = One(client, "c", wait_s=30)
            attempts = client.counters.calls
            await until(lambda: client.counters.calls > attempts + 3, 5, "it has looked a few times")
            assert not await after.holds(), "the holder lives"
            child.kill()
            child.wait(10)
            assert process.is_dead(where)
            killed_at = time.monotonic()
            await until(after.holds, 5, "the name of a process that died here is free at once")
            assert time.monotonic() - killed_at < 2
            await after.end()

    asyncio.run(body())


def test_who_waits_is_told_for_as_long_as_it_waits(etcd: EtcdMember, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where etcd does not take it the first time, and longer than one lease of what is told."""
    monkeypatch.setattr("controlplane.etcd.register.TOLD_S", 2)
    monkeypatch.setattr("controlplane.etcd.register.TELL_AT", 0.0)

    async def body() -> None:
        async with clean(etcd) as client:
            put, refused = client.put, []

            async def refuse_once(*args: Any, **more: Any) -> Any:
                if not refused:
                    refused.append(args)
                    raise EtcdUnavailable("not now")
                return await put(*args, **more)

            await client.put(KEY, record("a"))
            monkeypatch.setattr(client, "put", refuse_once)
            one = One(client, "b", wait_s=60)
            seen: set[int] = set()

            async def told_three_times() -> bool:
                found = await client.get(WAITING)
                seen.update([found.lease] if found is not None else [])
                return len(seen) == 3

            await until(told_three_times, 30, "it is told under one lease after the other")
            assert refused
            await one.end()

    asyncio.run(body())


def test_an_explicit_word_takes_the_name_and_the_other_ends(etcd: EtcdMember) -> None:
    async def body() -> None:
        async with clean(etcd) as client:
            first = One(client, "a")
            await until(first.holds, 5, "the first has the name")
            second = One(client, "b", supersedes=("a",))
            await until(second.holds, 5, "the second was told to take it")
            with pytest.raises(NameTaken, match=r"now belongs to another process \(incarnation b"):
                await asyncio.wait_for(first.running, 5)
            await first.end()
            assert await second.holds(), "the end of the first takes nothing from the second"
            await second.end()

    asyncio.run(body())


def test_its_own_key_is_registered_again_whatever_happens_to_it(etcd: EtcdMember) -> None:
    async def body() -> None:
        async with clean(etcd) as client:
            one = One(client, "a")
            await until(one.holds, 5, "it has the name")
            await client.delete(KEY)
            await until(one.holds, 5, "deleted by hand: registered again")
            found = await client.get(KEY)
            assert found is not None
            await client.lease_revoke(found.lease)
            await until(one.holds, 5, "the lease was lost: registered again")

            async def counted() -> bool:
                return one.registration.times_registered >= 3

            await until(counted, 5, "etcd may tell us of the write before it tells who wrote")
            assert not one.running.done()
            await one.end()
            assert await client.get(KEY) is None

    asyncio.run(body())


def test_who_lost_its_lease_and_its_name_ends(etcd: EtcdMember) -> None:
    """etcd was away from it for longer than its lease, and the next process was there first."""

    async def body() -> None:
        async with clean(etcd) as client:
            one = One(client, "a")
            await until(one.holds, 5, "it has the name")
            found = await client.get(KEY)
            assert found is not None
            one.watching.cancel()  # it does not even see it
            await client.put(KEY, record("b"))
            await client.lease_revoke(found.lease)
            with pytest.raises(NameTaken, match="incarnation b"):
                await asyncio.wait_for(one.running, 5)
            assert holder_of((await client.get(KEY)).value).fresh == "b"  # type: ignore[union-attr]

    asyncio.run(body())


def test_what_cannot_be_read_is_not_overwritten(etcd: EtcdMember) -> None:
    async def body() -> None:
        async with clean(etcd) as client:
            await client.put(KEY, b"\xff of newer code")
            one = One(client, "a", wait_s=0.5)
            with pytest.raises(NameTaken, match="cannot be read"):
                await asyncio.wait_for(one.running, 5)
            assert (await client.get(KEY)).value == b"\xff of newer code"  # type: ignore[union-attr]

    asyncio.run(body())


def test_only_who_has_its_name_may_stand_for_election(etcd: EtcdMember) -> None:
    async def body() -> None:
        async with clean(etcd) as client:
            first = One(client, "a")
            await until(first.holds, 5, "the first has the name")
            stranger = Registration(client, KEY, record("b"), TTL_S)
            election = Election(client, "leader/", b"b", guards=stranger.guard)
            campaign = asyncio.create_task(election.campaign())
            await until(lambda: election.campaigns >= 2, 5, "it tries")
            assert not (await client.get_prefix("leader/")).items
            assert not campaign.done()
            campaign.cancel()
            await asyncio.gather(campaign, return_exceptions=True)
            own = Election(client, "leader/", b"a", guards=first.registration.guard)
            leadership = await asyncio.wait_for(own.campaign(), 5)
            await leadership.resign()
            await first.end()

    asyncio.run(body())


def test_an_identity_is_of_one_process() -> None:
    me = process.identity()
    assert not process.is_dead(me)
    parts = me.split(" ")
    assert process.is_dead(" ".join([*parts[:4], "1"])), "the pid was given to another process"
    for elsewhere in ("", "x", " ".join([*parts[:1], "other-boot", *parts[2:4], "1"])):
        assert not process.is_dead(elsewhere), "nothing is known of another machine"
    assert process.describe(me) == f"pid {parts[3]} on {parts[0]}"
