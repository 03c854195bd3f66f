"""Whom a node keeps links to: few, the same seen from both ends, and there before a failover needs them."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord
from controlplane.contract.reports import LinkReport
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane.core.blocks import KvStore
from dataplane.core.messages import Fence, HeldMeta, Meta, RejoinMeta
from dataplane.core.peers import LINGER_S, PING_S, WATCHED, Peers, neighbours_of, pipelines_of, ring
from dataplane.inbox import LinkChanged, Message
from dataplane.worker import Worker
from tests.core.control.world import make_config, make_record
from tests.core.data.line import oracles, topology


class Group:
    """`instances` x `stages` nodes; who serves at home copies to the next pipeline, as `replicate` has it."""

    def __init__(self, instances: int, stages: int, mode: Mode = Mode.REPLICATE) -> None:
        config = make_config(instances, stages, mode=mode)
        self.stages = stages
        self.records: dict[str, NodeRecord] = {}
        for k in range(instances * stages):
            self.records[f"n{k}"] = make_record(config, f"n{k}", "a", k % stages)
        self.topology = Topology("g", 1, mode, tuple(self.pipeline(p, instances) for p in range(instances)))
        self.peers = {name: Peers(record.member, record.stage) for name, record in self.records.items()}
        self.now = 100.0

    def member(self, number: int) -> Member:
        return self.records[f"n{number % len(self.records)}"].member

    def pipeline(self, index: int, instances: int) -> Pipeline:
        copies = self.topology_copies(index, instances)
        parts = []
        for s in range(self.stages):
            home = self.member(index * self.stages + s)
            parts.append(Stage((home.node,), (home,), copies[s]))
        return Pipeline(f"p{index}", 1, tuple(parts))

    def topology_copies(self, index: int, instances: int) -> list[tuple[Member, ...]]:
        if instances == 1:
            return [() for _ in range(self.stages)]
        return [(self.member((index + 1) * self.stages + s),) for s in range(self.stages)]

    def follow(self, name: str) -> set[str]:
        ours = pipelines_of(self.topology, self.records[name].member)
        return {r.member.node for r in self.peers[name].follow(ours, self.records, self.now)}

    def reports(self, name: str, heard: dict[str, float]) -> dict[str, LinkReport]:
        return {link.peer.node: link for link in self.peers[name].report(heard.get, self.now)}


def bare(group: Group) -> Group:
    """Nobody copies."""
    pipelines = tuple(
        Pipeline(p.id, p.epoch, tuple(Stage(s.homes, s.ranks) for s in p.stages))
        for p in group.topology.pipelines
    )
    group.topology = Topology("g", 2, Mode.NONE, pipelines)
    return group


@pytest.mark.parametrize("mode", [Mode.REPLICATE, Mode.NONE])
def test_a_node_has_as_many_links_among_a_thousand_as_among_few(mode: Mode) -> None:
    most = {}
    for instances in (8, 250):
        group = Group(instances, 4)
        if mode is Mode.NONE:
            bare(group)
        linked = {name: group.follow(name) for name in group.records}
        most[instances] = max(map(len, linked.values()))
        assert all(name in linked[peer] for name, peers in linked.items() for peer in peers), "one way only"
    assert most[8] == most[250] <= 3 * 4 - 1 + 2 * WATCHED


def test_a_failover_needs_no_link_that_is_not_there() -> None:
    group = Group(3, 4)
    linked = {name: group.follow(name) for name in group.records}
    for pipeline in group.topology.pipelines:
        for index, stage in enumerate(pipeline.stages):
            served = [s.leader for s in pipeline.stages]
            served[index] = stage.replicas[0]
            names = [m.node for m in served if m is not None]
            assert all(set(names) <= linked[name] | {name} for name in names), (pipeline.id, index)


def test_a_node_that_comes_back_is_linked_to_its_home_before_it_serves_there() -> None:
    group = Group(2, 3)
    group.records["n1"] = make_record(make_config(2, 3), "n1", "b", 1)
    assert {"n0", "n2"} <= group.follow("n1")
    assert "n1" in group.follow("n0")


def test_whoever_watches_is_watched() -> None:
    for count in (1, 2, 3, 4, 5, 6, 40):
        names = [f"n{k}" for k in range(0, 4 * count, 4)]
        near = {name: ring(names, name) for name in names}
        assert all(name in near[peer] for name in names for peer in near[name])
        assert all(len(peers) == min(2 * WATCHED, count - 1) for peers in near.values())
    assert ring(["n2", "n10", "n1", "n20", "n3", "n4"], "n4") == ["n10", "n2", "n20", "n3"]


def test_who_has_no_neighbours_is_watched_once_it_has_spoken() -> None:
    group = bare(Group(5, 1))
    assert neighbours_of(pipelines_of(group.topology, group.member(0)), group.member(0)) == set()
    group.follow("n0")
    peers = group.peers["n0"]
    assert {m.node for m in peers.to_ping(group.now)} == {"n1", "n2", "n3", "n4"}
    group.now += 3.0
    assert group.reports("n0", {}) == {}, "they may not know yet that they are watched"
    told = group.reports("n0", {"n1": 102.9, "n2": 101.0, "n3": 90.0})
    assert set(told) == {"n1", "n2"}
    assert all(link.watch and link.up for link in told.values())
    assert told["n2"].silent_s == pytest.approx(2.0)


def test_only_those_are_pinged_whom_nothing_was_sent_to() -> None:
    group = Group(2, 2)
    group.follow("n0")
    peers = group.peers["n0"]
    peers.sent(group.member(1), group.now)
    assert {m.node for m in peers.to_ping(group.now + PING_S / 2)} == {"n2"}
    assert {m.node for m in peers.to_ping(group.now + PING_S)} == {"n1", "n2"}
    # Where silence counts sooner, links are never silent that long.
    for dead_after_s in (0.2, 0.3, 0.6, 1.2, 60.0):
        peers.dead_after_s = dead_after_s
        every_s = min(PING_S, dead_after_s / 3)
        assert {m.node for m in peers.to_ping(group.now + 0.99 * every_s)} == {"n2"}
        assert {m.node for m in peers.to_ping(group.now + 1.01 * every_s)} == {"n1", "n2"}


def test_a_link_out_of_use_is_kept_while_its_other_end_speaks() -> None:
    group = Group(9, 1)
    assert "n8" in group.follow("n0")
    a, b = group.peers["n0"], group.peers["n8"]
    group.follow("n8")
    bare(group)
    config = make_config(9, 1)
    for name in ("n9", "n10", "n11"):  # the ring has grown between the two
        group.records[name] = make_record(config, name, "a", 0)
    assert "n8" not in group.follow("n0")
    assert a.unused(group.records, {}.get, group.now) == []
    group.now += LINGER_S
    assert a.unused(group.records, {"n8": group.now - 1.0}.get, group.now) == ["n7"], "n8 is behind"
    assert a.unused(group.records, {"n8": 100.0}.get, group.now) == ["n8"]
    assert a.unused(group.records, {"n8": 100.0}.get, group.now) == [], "told twice"
    b.broke(group.member(0), "closed by the peer")
    assert group.reports("n8", {})["n0"].up is False, "n8 counts on it"
    assert "n0" not in group.follow("n8")
    b.opened(group.member(0))
    b.broke(group.member(0), "closed by the peer")
    assert "n0" not in group.reports("n8", {}), "on purpose"


def test_a_broken_link_is_told_until_it_is_open_or_its_process_is_gone() -> None:
    group = Group(2, 2)
    group.follow("n0")
    peers = group.peers["n0"]
    n1 = group.member(1)
    peers.broke(n1, "reset")
    assert group.reports("n0", {})["n1"] == LinkReport(n1, False, 0.0, "reset")
    peers.broke(n1, "no link: the peer speaks protocol 2, we speak 1")
    assert group.reports("n0", {})["n1"].refused
    record = group.records.pop("n1")
    assert "n1" in group.follow("n0"), "it serves with us: etcd may have been away"
    assert group.reports("n0", {})["n1"].up is False
    peers.opened(n1)
    assert group.reports("n0", {})["n1"].up
    peers.broke(n1, "reset")
    bare(group)
    group.topology = Topology("g", 3, Mode.NONE, group.topology.pipelines[1:])
    group.follow("n0")
    assert "n1" not in group.reports("n0", {})
    group.records["n1"] = record


def test_an_answer_waits_for_the_link_to_who_asked() -> None:
    """Both open their links at the same news, and the question may be the faster one."""
    asker, me = Member("n0", "a"), Member("n1", "a")
    up: set[Member] = set()
    sent: list[Meta] = []

    def send(peer: Member, meta: Meta, _payload: object) -> bool:
        if peer in up:
            sent.append(meta)
        return peer in up

    async def play() -> None:
        executor = oracles(2)[1]
        worker = Worker(me, executor, KvStore(64, executor.kv.block_size, 64, 16), send)
        worker.put(topology(["p0"], 2))
        worker.put(Message(asker, RejoinMeta("p0", Fence(1), 7, (), False), b""))
        worker.put(LinkChanged("n0"))
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(20.0):
            while worker._inbox or not worker._unsent:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert sent == []
            up.add(asker)
            worker.put(LinkChanged("n5"))
            worker.put(LinkChanged("n0"))
            while not sent:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert [(m.ask, m.stage) for m in sent if isinstance(m, HeldMeta)] == [(7, 1)]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        worker.close()

    asyncio.run(play())
