"""Watches against real etcd: nothing missed, nothing twice, never silent, whatever happens to etcd."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from controlplane.etcd.client import EtcdClient
from controlplane.etcd.values import KeyValue, WatchBatch, fold
from controlplane.etcd.watch import Watch, WatchTiming
from tests.io.etcd_proxy import etcd_proxy, eventually, no_task_left
from tests.io.etcd_server import EtcdMember, etcd_cluster, etcd_member

LIMIT_S = 10.0


async def next_batch(watch: Watch) -> WatchBatch:
    return await asyncio.wait_for(anext(watch), LIMIT_S)


def changed(batch: WatchBatch) -> list[tuple[str, bytes | None]]:
    return [(event.key, event.now.value if event.now else None) for event in batch.events]


def reached(watch: Watch, revision: int) -> bool:
    return watch.revision >= revision


def test_a_snapshot_then_every_change_in_order(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            await client.put("p/a", b"1")
            await client.put("q/other", b"")
            watch = client.watch_prefix("p/")
            first = await next_batch(watch)
            assert first.is_snapshot
            assert changed(first) == [("p/a", b"1")]
            await client.put("p/b", b"2")
            await client.put("q/other", b"2")
            deleted_after = await client.put("p/a", b"3")
            await client.delete("p/a")
            batches: list[WatchBatch] = []
            while sum(len(batch.events) for batch in batches) < 3:
                batches.append(await next_batch(watch))
            assert [one for batch in batches for one in changed(batch)] == [
                ("p/b", b"2"),
                ("p/a", b"3"),
                ("p/a", None),
            ]
            assert batches[-1].revision == deleted_after + 1
            items: dict[str, KeyValue] = {}
            for batch in (first, *batches):
                items = fold(items, batch)
            assert items == dict((await client.get_prefix("p/")).items)
            await watch.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(watch)

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_it_goes_on_through_a_restart_of_etcd(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            await client.put("p/a", b"1")
            watch = client.watch_prefix("p/")
            assert (await next_batch(watch)).is_snapshot
            member.kill()
            await eventually(lambda: watch.age_s() > 0.8, LIMIT_S, "the watch grows old")
            await eventually(lambda: watch.reconnects > 0, LIMIT_S, "the watch tries again")
            member.start()
            await client.put("p/b", b"2", timeout_s=LIMIT_S)
            batch = await next_batch(watch)
            assert not batch.is_snapshot
            assert changed(batch) == [("p/b", b"2")]
            await eventually(lambda: watch.age_s() < 0.7, LIMIT_S, "the watch is fresh again")
            assert client.counters.watch_snapshots == 1

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_it_knows_that_a_stopped_etcd_is_silent(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            watch = client.watch_prefix("p/")
            await next_batch(watch)
            # No events, yet never older than the progress interval and a little.
            until = time.monotonic() + 2.5
            oldest = 0.0
            while time.monotonic() < until:
                oldest = max(oldest, watch.age_s(time.monotonic()))
                await asyncio.sleep(0.01)
            assert oldest < WatchTiming().progress_s + 0.5
            member.pause()
            paused = time.monotonic()
            await eventually(lambda: watch.age_s() > 3.0, 6, "the age grows past the silence limit")
            assert watch.age_s() >= time.monotonic() - paused - 0.1
            member.resume()
            await client.put("p/a", b"1", timeout_s=LIMIT_S)
            assert changed(await next_batch(watch)) == [("p/a", b"1")]
            assert watch.age_s() < 1.0
            assert client.counters.watch_snapshots == 1

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_a_compacted_history_gives_a_new_snapshot(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with (
            etcd_proxy(member.client_port) as proxy,
            EtcdClient([member.endpoint]) as client,
            EtcdClient([proxy.endpoint]) as cut_off,
        ):
            await client.put("p/gone", b"")
            watch = cut_off.watch_prefix("p/")
            items = fold({}, await next_batch(watch))
            proxy.cut()
            await client.put("p/a", b"1")
            await client.delete("p/gone")
            await client.compact(await client.put("p/a", b"2"))
            proxy.heal()
            batch = await next_batch(watch)
            assert batch.is_snapshot
            items = fold(items, batch)
            assert {key: kv.value for key, kv in items.items()} == {"p/a": b"2"}
            assert cut_off.counters.watch_compactions == 1
            await client.put("p/b", b"3")
            assert changed(await next_batch(watch)) == [("p/b", b"3")]

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_changes_made_while_cut_off_arrive_once(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with (
            etcd_proxy(member.client_port) as proxy,
            EtcdClient([member.endpoint]) as client,
            EtcdClient([proxy.endpoint]) as cut_off,
        ):
            watch = cut_off.watch_prefix("p/")
            await next_batch(watch)
            expected = []
            for number in range(3):
                proxy.cut()
                for step in range(5):
                    expected.append((f"p/{step}", b"%d" % number))
                    await client.put(*expected[-1])
                proxy.heal()
                expected.append(("p/after", b"%d" % number))
                last = await client.put(*expected[-1])
                await eventually(partial(reached, watch, last), LIMIT_S, "it catches up")
            seen: list[tuple[str, bytes | None]] = []
            while len(seen) < len(expected):
                seen += changed(await next_batch(watch))
            assert seen == expected
            assert cut_off.counters.watch_snapshots == 1
            assert watch.reconnects >= 3

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_a_store_that_lost_its_data_gives_a_new_snapshot(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            for number in range(20):
                await client.put(f"p/{number}", b"")
            watch = client.watch_prefix("p/")
            assert len((await next_batch(watch)).events) == 20
            member.kill()
            shutil.rmtree(tmp_path / member.name)
            member.start()
            batch = await next_batch(watch)
            assert batch.is_snapshot
            assert batch.events == ()
            assert client.counters.watch_resets == 1
            await client.put("p/new", b"1", timeout_s=LIMIT_S)
            assert changed(await next_batch(watch)) == [("p/new", b"1")]

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_a_consumer_with_deadlines_loses_nothing(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with EtcdClient([member.endpoint]) as client:
            watch = client.watch_prefix("p/")
            await next_batch(watch)

            async def write() -> None:
                for number in range(200):
                    await client.put(f"p/{number:03}", b"")

            writer = asyncio.create_task(write())
            seen: list[str] = []
            until = time.monotonic() + LIMIT_S
            while len(seen) < 200 and time.monotonic() < until:
                try:
                    batch = await asyncio.wait_for(anext(watch), 0.0005)
                except TimeoutError:
                    continue
                seen += [event.key for event in batch.events]
            await writer
            assert seen == [f"p/{number:03}" for number in range(200)]

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_closing_the_client_ends_its_watches(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        client = EtcdClient([member.endpoint])
        watch = client.watch_prefix("p/")
        await next_batch(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await client.close()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, LIMIT_S)
        await no_task_left()

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))


def test_a_member_without_a_quorum_does_not_pass_for_fresh(tmp_path: Path) -> None:
    async def main(members: list[EtcdMember]) -> None:
        async with EtcdClient([members[0].endpoint]) as client:
            watch = client.watch_prefix("p/")
            await next_batch(watch)
            for member in members[1:]:
                member.kill()
            await eventually(lambda: watch.age_s() > 2.5, 15, "the age grows though the member answers")
            members[1].start()
            await client.put("p/a", b"1", timeout_s=LIMIT_S)
            assert changed(await next_batch(watch)) == [("p/a", b"1")]

    with etcd_cluster(tmp_path, 3, election_ms=500) as members:
        asyncio.run(main(members))


def test_many_interruptions_leak_nothing(tmp_path: Path) -> None:
    async def main(member: EtcdMember) -> None:
        async with etcd_proxy(member.client_port) as proxy, EtcdClient([member.endpoint]) as client:
            cut_off = EtcdClient([proxy.endpoint])
            watch = cut_off.watch_prefix("p/")
            keeper = await cut_off.lease_keeper(10)
            await next_batch(watch)
            tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
            for number in range(15):
                proxy.cut()
                proxy.heal()
                await client.put("p/a", b"%d" % number)
                assert changed(await next_batch(watch)) == [("p/a", b"%d" % number)]
            assert watch.reconnects >= 15
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 1, LIMIT_S, "tasks end")
            await eventually(
                lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2, LIMIT_S, "connections are closed"
            )
            assert keeper.valid()
            await cut_off.close()

    with etcd_member(tmp_path) as member:
        asyncio.run(main(member))
