"""The simulated etcd and the real one answer the same client in the same way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election, leader_of
from controlplane.etcd.errors import EtcdCompacted, EtcdError, EtcdLeaseGone, EtcdUnavailable, EtcdUnknown
from controlplane.etcd.lease import LeaseKeeper
from controlplane.etcd.register import Registration
from controlplane.etcd.values import Compare, Delete, Deleted, Get, Put, PutDone, Snapshot, WatchBatch, fold
from controlplane.etcd.watch import Watch, WatchTiming
from tests.io.etcd_server import EtcdMember, etcd_cluster
from tests.sim.border import silence, simulated
from tests.sim.etcd import SimEtcd
from tests.sim.network import Network
from tests.sim.world import World

LIMIT_S = 10.0
FAST_WATCH = WatchTiming(progress_s=0.3, silence_s=1.0)


class Cluster(Protocol):
    """What a scenario may do to etcd."""

    endpoints: list[str]

    def pause(self, index: int) -> None: ...
    def resume(self, index: int) -> None: ...
    def kill(self, index: int) -> None: ...
    def start(self, index: int) -> None: ...


class Real:
    def __init__(self, members: list[EtcdMember]) -> None:
        self.members = members
        self.endpoints = [member.endpoint for member in members]

    def pause(self, index: int) -> None:
        self.members[index].pause()

    def resume(self, index: int) -> None:
        self.members[index].resume()

    def kill(self, index: int) -> None:
        self.members[index].kill()

    def start(self, index: int) -> None:
        self.members[index].start()


class Simulated:
    def __init__(self, etcd: SimEtcd) -> None:
        self.etcd = etcd
        self.endpoints = list(etcd.endpoints)

    def pause(self, index: int) -> None:
        self.etcd.members[index].process.paused = True

    def resume(self, index: int) -> None:
        self.etcd.members[index].process.resume()

    def kill(self, index: int) -> None:
        self.etcd.kill(self.etcd.members[index])

    def start(self, index: int) -> None:
        self.etcd.start(self.etcd.members[index])


Scenario = Callable[[Cluster], Awaitable[None]]
Run = Callable[[Scenario], None]


def run_simulated(size: int, scenario: Scenario) -> None:
    world = World(seed=size)
    net = Network(world)
    ended: list[bool] = []

    async def main() -> None:
        await scenario(Simulated(etcd))
        ended.append(True)

    with silence(), simulated(world, net):
        etcd = SimEtcd(world, net, size)
        world.process("client").spawn(main())
        while not ended and not world.failure and world.now < 120.0:
            world.run_until(world.now + 1.0)
        assert not world.failure, world.failure
    assert ended, "the scenario has not ended within two minutes"


@contextlib.contextmanager
def runner(kind: str, size: int, folder: Path) -> Iterator[Run]:
    if kind == "simulated":
        yield lambda scenario: run_simulated(size, scenario)
        return
    with etcd_cluster(folder, size, heartbeat_ms=50, election_ms=500) as members:

        async def main(scenario: Scenario) -> None:
            await scenario(Real(members))

        yield lambda scenario: asyncio.run(main(scenario))


@pytest.fixture(scope="module", params=["real", "simulated"])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One healthy member, shared by the scenarios that leave it so."""
    with runner(request.param, 1, tmp_path_factory.mktemp("etcd")) as run:
        yield run


@pytest.fixture(params=["real", "simulated"])
def single(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """One member that a scenario may do anything to."""
    with runner(request.param, 1, tmp_path) as run:
        yield run


@pytest.fixture(params=["real", "simulated"])
def three(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    with runner(request.param, 3, tmp_path) as run:
        yield run


async def next_batch(watch: Watch) -> WatchBatch:
    return await asyncio.wait_for(anext(watch), LIMIT_S)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(LIMIT_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {LIMIT_S:g} s: {what}") from None


def changed(batch: WatchBatch) -> list[tuple[str, bytes | None]]:
    return [(event.key, event.now.value if event.now else None) for event in batch.events]


async def put_until_known(client: EtcdClient, key: str, value: bytes) -> int:
    """A member has died or come back: what was sent to the last leader has no answer, and the same is put again."""
    unknown_max = 3
    for _ in range(unknown_max):
        with contextlib.suppress(EtcdUnknown):
            return await client.put(key, value, timeout_s=LIMIT_S)
    raise AssertionError(f"{unknown_max} puts of {key} in a row had no answer")


def test_revisions_count_changes_of_the_store(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client:
            first = await client.put("rev/a", b"\x00\xff")
            second = await client.put("rev/a", b"2")
            assert second == first + 1
            await client.put("rev0", b"a neighbour that the prefix must not take")
            kv = await client.get("rev/a")
            assert kv is not None
            assert (kv.value, kv.create_revision, kv.mod_revision, kv.version) == (b"2", first, second, 2)
            snapshot = await client.get_prefix("rev/")
            assert list(snapshot.items) == ["rev/a"]
            before = await client.revision()
            assert await client.delete("rev/none") == 0
            assert await client.revision() == before  # what changes nothing is no revision
            assert await client.delete("rev/", prefix=True) == 1
            assert await client.revision() == before + 1
            again = await client.put("rev/a", b"3")
            kv = await client.get("rev/a")
            assert kv is not None
            assert (kv.create_revision, kv.version) == (again, 1)  # a deleted key begins anew

    one(scenario)


def test_puts_guarded_by_a_create_revision(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client:
            created = await client.put("guard/key", b"mine")
            guard = Compare.create_revision("guard/key", created)
            assert (await client.txn([guard], [Put("guard/x", b"1")])).succeeded
            await client.put("guard/key", b"changed")  # its create-revision stays
            assert (await client.txn([guard], [Put("guard/x", b"2")])).succeeded
            await client.delete("guard/key")
            assert not (await client.txn([guard], [Put("guard/x", b"3")])).succeeded
            await client.put("guard/key", b"another's")
            assert not (await client.txn([guard], [Put("guard/x", b"4")])).succeeded
            kv = await client.get("guard/x")
            assert kv is not None
            assert kv.value == b"2"

    one(scenario)


def test_transactions(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client:
            created = await client.txn([Compare.absent("txn/k")], [Put("txn/k", b"1")])
            assert created.succeeded
            assert created.results == (PutDone(),)
            again = await client.txn([Compare.absent("txn/k")], [Put("txn/k", b"2")], [Get("txn/k")])
            assert not again.succeeded
            (found,) = again.results
            assert isinstance(found, Snapshot)
            assert found.items["txn/k"].value == b"1"
            swap = [Compare.mod_revision("txn/k", created.revision)]
            swapped = await client.txn(swap, [Put("txn/k", b"3"), Put("txn/l", b"4")])
            assert swapped.succeeded
            assert swapped.revision == created.revision + 1  # both in one
            assert not (await client.txn(swap, [Put("txn/k", b"5")])).succeeded
            read = await client.txn([], [Get("txn/", prefix=True)])
            assert isinstance(read.results[0], Snapshot)
            assert {key: kv.mod_revision for key, kv in read.results[0].items.items()} == {
                "txn/k": swapped.revision,
                "txn/l": swapped.revision,
            }
            guard = [Compare.create_revision("txn/k", created.revision), Compare.value("txn/k", b"3")]
            removed = await client.txn(guard, [Delete("txn/", prefix=True)])
            assert removed.results == (Deleted(2),)
            with pytest.raises(EtcdLeaseGone):
                await client.txn([], [Put("txn/a", b""), Put("txn/b", b"", lease=0x1234)])
            assert await client.get("txn/a") is None  # all or nothing

    one(scenario)


def test_refusals_are_named(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client:
            with pytest.raises(EtcdLeaseGone):
                await client.put("refused/k", b"", lease=0x1234)
            await client.lease_revoke(0x1234)  # ended leases may be ended again
            revision = await client.put("refused/k", b"1")
            await client.compact(revision)
            with pytest.raises(EtcdCompacted):
                await client.compact(revision)
            with pytest.raises(EtcdError, match="too large") as caught:
                await client.put("refused/large", bytes(2_000_000))
            assert not isinstance(caught.value, EtcdUnavailable | EtcdUnknown)
            (status,) = await client.status()
            assert status.is_leader
            assert status.problem == ""

    one(scenario)


def test_a_watch_gives_every_change_in_order_and_no_revision_in_two_batches(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client:
            await client.put("w/a", b"1")
            watch = client.watch_prefix("w/")
            first = await next_batch(watch)
            assert first.is_snapshot
            assert changed(first) == [("w/a", b"1")]
            await client.put("w/b", b"2")
            await client.put("other", b"2")
            await client.txn([], [Put("w/c", b"3"), Delete("w/a")])
            items = fold({}, first)
            seen: list[tuple[str, bytes | None]] = []
            while len(seen) < 3:
                batch = await next_batch(watch)
                items = fold(items, batch)
                seen += changed(batch)
            assert seen[0] == ("w/b", b"2")
            assert sorted(seen[1:]) == [("w/a", None), ("w/c", b"3")]
            assert items == dict((await client.get_prefix("w/")).items)

    one(scenario)


async def keeper_of(client: EtcdClient, ttl_s: int) -> LeaseKeeper:
    """A grant that takes nearly as long as the lease is given up; a real etcd on a busy disk may take that long."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            with contextlib.suppress(EtcdUnavailable):
                return await client.lease_keeper(ttl_s)
            await asyncio.sleep(0.1)


def test_a_lease_that_ends_takes_its_keys_with_it(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client:
            lease, ttl_s = await client.lease_grant(1)
            assert ttl_s >= 1
            await client.txn([], [Put("lease/a", b"1", lease), Put("lease/b", b"2", lease)])
            await client.put("lease/b", b"3")  # no longer the lease's
            watch = client.watch_prefix("lease/")
            first = await next_batch(watch)
            assert [kv.lease for kv in fold({}, first).values()] == [lease, 0]
            gone = await next_batch(watch)  # it expires: nobody renews it
            assert changed(gone) == [("lease/a", None)]
            keeper = await keeper_of(client, 1)
            await client.put("lease/c", b"", lease=keeper.lease_id)
            await asyncio.sleep(2.5 * keeper.ttl_s)
            assert keeper.valid()
            assert await client.get("lease/c") is not None
            await client.lease_revoke(keeper.lease_id)
            assert await client.get("lease/c") is None
            await eventually(keeper.lost.is_set, "the keeper hears that its lease is gone")

    one(scenario)


def test_one_candidate_leads_and_the_guard_holds_off_the_last_one(one: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints) as client, EtcdClient(etcd.endpoints) as other:
            old = await Election(client, "vote/", b"old", ttl_s=2).campaign()
            campaign = asyncio.create_task(Election(other, "vote/", b"new", ttl_s=2).campaign())
            await asyncio.sleep(0.3)
            assert not campaign.done()
            assert (await client.txn([old.guard()], [Put("led", b"old")])).succeeded
            await client.lease_revoke(old.lease_id)
            new = await asyncio.wait_for(campaign, LIMIT_S)
            assert new.create_revision > old.create_revision
            leader = leader_of((await client.get_prefix("vote/")).items)
            assert leader is not None
            assert leader.identity == b"new"
            assert not (await client.txn([old.guard()], [Put("led", b"late")])).succeeded
            assert (await other.txn([new.guard()], [Put("led", b"new")])).succeeded
            await new.resign()

    one(scenario)


def test_a_write_without_an_answer_is_unknown_and_one_never_sent_is_not(single: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints, timeout_s=0.6) as client:
            await client.put("k", b"old")
            etcd.pause(0)
            with pytest.raises(EtcdUnknown):
                await client.put("k", b"new")
            with pytest.raises(EtcdUnknown):
                await client.txn([], [Put("k", b"new")])
            with pytest.raises(EtcdUnavailable):
                await client.get("k")
            etcd.resume(0)
            kv = await client.get("k", timeout_s=5)
            assert kv is not None
            assert kv.value in (b"old", b"new")
            assert client.counters.unknown == 2
            etcd.kill(0)
            with pytest.raises(EtcdError) as first:  # the connection may break under this one
                await client.put("k", b"newer")
            assert isinstance(first.value, EtcdUnavailable | EtcdUnknown)
            with pytest.raises(EtcdUnavailable):
                await client.put("k", b"newer")
            etcd.start(0)
            await client.put("k", b"newest", timeout_s=10)
            kv = await client.get("k")
            assert kv is not None
            assert kv.value == b"newest"

    single(scenario)


def test_a_watch_resumes_after_the_last_revision(single: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints, watch_timing=FAST_WATCH) as client:
            await client.put("w/a", b"1")
            watch = client.watch_prefix("w/")
            assert (await next_batch(watch)).is_snapshot
            etcd.kill(0)
            await eventually(lambda: watch.reconnects > 0, "the watch tries again")
            etcd.start(0)
            await client.put("w/b", b"2", timeout_s=LIMIT_S)
            batch = await next_batch(watch)
            assert not batch.is_snapshot
            assert changed(batch) == [("w/b", b"2")]
            etcd.pause(0)
            await eventually(lambda: watch.age_s() > 0.6, "the watch grows old")
            etcd.resume(0)
            await client.put("w/c", b"3", timeout_s=LIMIT_S)
            assert changed(await next_batch(watch)) == [("w/c", b"3")]
            assert client.counters.watch_snapshots == 1

    single(scenario)


def test_a_compacted_history_gives_a_new_snapshot(three: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        far = EtcdClient(etcd.endpoints[:1], watch_timing=FAST_WATCH)
        async with far, EtcdClient(etcd.endpoints[1:]) as client:
            await client.put("w/gone", b"", timeout_s=LIMIT_S)
            watch = far.watch_prefix("w/")
            items = fold({}, await next_batch(watch))
            etcd.kill(0)
            await put_until_known(client, "w/a", b"1")
            await client.delete("w/gone")
            await client.compact(await client.put("w/a", b"2"))
            etcd.start(0)
            batch = await next_batch(watch)
            assert batch.is_snapshot
            items = fold(items, batch)
            assert {key: kv.value for key, kv in items.items()} == {"w/a": b"2"}
            assert far.counters.watch_compactions == 1

    three(scenario)


def test_a_lost_majority_stops_writes_and_ends_no_lease(three: Run) -> None:
    async def scenario(etcd: Cluster) -> None:
        async with EtcdClient(etcd.endpoints, timeout_s=1.0, watch_timing=FAST_WATCH) as client:
            registration = Registration(client, "leased/k", b"1", 5)
            running = asyncio.create_task(registration.run())
            await eventually(lambda: registration.times_registered == 1, "it has registered")
            watch = client.watch_prefix("leased/")
            await next_batch(watch)
            for index in (1, 2):
                etcd.kill(index)
            with contextlib.suppress(EtcdUnavailable, EtcdUnknown):
                await client.put("k", b"")  # perhaps before the members were missed
                await asyncio.sleep(1.0)
            with pytest.raises((EtcdUnavailable, EtcdUnknown)):
                await client.put("k", b"")
            await eventually(lambda: watch.age_s() > 1.5, "the age grows though a member answers")
            await asyncio.sleep(2.0)
            for index in (1, 2):
                etcd.start(index)
            await put_until_known(client, "k", b"")
            kv = await client.get("leased/k", timeout_s=LIMIT_S)
            assert kv is not None
            assert kv.version == 1 + (registration.times_registered - 1)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    three(scenario)
