"""What a decision costs as the group grows, counted in function calls and lines."""

from __future__ import annotations

import dataclasses
import gc

from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.keys import decode, encode
from controlplane.contract.records import NodeRecord, Operation, OperationKind
from controlplane.contract.reports import LinkReport, NodeReport, PipelineReport, StepTimes, TargetReport
from controlplane.contract.status import ClusterStatus, NodeState
from controlplane.contract.topology import Stage, Topology
from controlplane.core import events
from controlplane.core.controller import Controller
from controlplane.core.edit import initial
from controlplane.core.gather import gather
from controlplane.core.placement import Layout, replica_target
from controlplane.core.view import Overview
from tests.core.control.world import make_config, make_record
from tests.core.counting import calls, lines_of_pieces

STAGES = 4
TIMES = tuple(StepTimes(size, 1000, 20_000_000) for size in range(8))


class Group:
    """A leader, and nodes that serve at home and report as real ones do."""

    def __init__(self, nodes: int) -> None:
        self.core = Controller(make_config(nodes // STAGES, STAGES), "c1")
        self.now = 100.0
        self.writes = 0
        config = make_config(nodes // STAGES, STAGES)
        self.records = [
            make_record(config, f"n{k}", "a", k % STAGES, domain={"host": f"h{k // 8}", "node": f"n{k}"})
            for k in range(nodes)
        ]
        for record in self.records:
            self.take(events.NodeRegistered(record))
            self.take(events.ReportReceived(NodeReport(record.member, 1, 0.0, 1)))
        self.take(events.TopologySeen(None, 0))
        self.decide(events.BecameLeader())
        self.form_writes = self.writes
        for _ in range(8):
            self.second()

    def take(self, event: events.CoreEvent) -> None:
        self.core.take(event, self.now, self.now)

    def decide(self, event: events.CoreEvent) -> None:
        todo = [event]
        while todo:
            for effect in self.core.step(todo.pop(), self.now, self.now):
                if isinstance(effect, events.WriteTopology):
                    self.writes += 1
                    todo.append(events.WriteDone(effect, self.writes))

    def report(self, record: NodeRecord, *down: Member) -> NodeReport:
        topology, me = self.core.topology, record.member
        assert topology is not None
        pipeline = topology.pipelines[int(me.node[1:]) // STAGES]
        served = tuple(
            PipelineReport(
                pipeline.id,
                pipeline.epoch,
                index,
                7,
                round_s=0.05,
                targets=tuple(TargetReport(m, 0) for m in stage.replicas),
            )
            for index, stage in enumerate(pipeline.stages)
            if me in stage.ranks
        )
        links = tuple(LinkReport(peer, False, 0.0, "reset") for peer in down)
        return NodeReport(me, 1, 0.0, 1, pipelines=served, links=links, times=TIMES, timed_s=self.now)

    def second(self) -> None:
        for turn in range(20):
            self.now += 0.05
            if turn % 2 == 0:
                self.take(events.HeartbeatsReceived(tuple(r.member for r in self.records)))
            if turn % 10 == 0:
                for record in self.records:
                    self.take(events.ReportReceived(self.report(record)))
            self.decide(events.Tick())

    def kill(self, every: int) -> list[Member]:
        dead = self.records[3::every]
        for record in dead:
            self.take(events.ReportStreamBroken(record.member))
            before = self.records[int(record.member.node[1:]) - 1]
            self.take(events.ReportReceived(self.report(before, record.member)))
        self.decide(events.Tick())
        return [record.member for record in dead]


def test_a_calm_second_costs_as_much_for_a_node_whatever_their_number() -> None:
    each = {}
    for nodes in (64, 512):
        group = Group(nodes)
        writes = group.writes
        each[nodes] = calls(group.second) / nodes
        assert group.writes == writes, "nothing was to be done"
    assert each[512] < 1.2 * each[64]


def test_a_tick_in_which_nothing_happened_costs_nothing_for_a_node() -> None:
    costs = {}
    for nodes in (64, 512):
        group = Group(nodes)
        group.now += 0.05
        costs[nodes] = calls(lambda group=group: group.decide(events.Tick()))
    assert costs[512] < 1.2 * costs[64] + 20


def test_a_cluster_is_formed_by_one_write_for_all_pipelines() -> None:
    assert Group(256).form_writes == 2  # who is home where; who serves


def test_a_storm_is_one_write_and_grows_with_the_dead_alone() -> None:
    each = {}
    for nodes in (128, 512):
        group = Group(nodes)
        writes = group.writes
        dead: list[Member] = []
        cost = calls(lambda group=group, dead=dead: dead.extend(group.kill(20)))
        each[nodes] = cost / len(dead)
        assert group.core.topology is not None
        assert not set(dead) & {m for p in group.core.topology.pipelines for m in p.members()}
        assert group.writes - writes <= 2
    assert each[512] < 1.5 * each[128]


def test_a_storm_that_has_only_made_suspects_yet_is_no_reason_to_look_at_all_copies() -> None:
    """Ends of streams come first, and what the neighbours say of their links makes deaths of them a moment later."""
    each = {}
    for nodes in (64, 512):
        group = Group(nodes)
        writes = group.writes
        for record in group.records[3:35:8]:
            group.take(events.ReportStreamBroken(record.member))
        each[nodes] = calls(lambda group=group: group.decide(events.Tick()))
        assert group.writes == writes
    assert each[512] < 1.5 * each[64]


def test_what_is_not_urgent_is_planned_soon_after_a_suspicion_that_comes_to_nothing() -> None:
    group = Group(64)
    group.take(events.ReportStreamBroken(group.records[3].member))
    group.decide(events.Tick())
    group.take(events.ReportReceived(group.report(group.records[3])))
    assert group.core._urgent_until is not None
    for _ in range(6):
        group.now += 0.05
        group.decide(events.Tick())
    assert group.core._urgent_until is None


def test_where_borrowed_stages_may_gather_is_looked_for_at_a_cost_that_grows_with_the_group_alone() -> None:
    each = {}
    for nodes in (128, 512):
        group = Group(nodes)
        group.kill(20)
        topology = group.core.topology
        assert topology is not None
        situation = group.core._situation(topology, group.core._nodes())
        situation = dataclasses.replace(situation, now=group.now + situation.policy.limits.gather_s)
        each[nodes] = calls(lambda situation=situation: list(gather(situation))) / nodes
    assert each[512] < 1.5 * each[128]


def test_a_copy_where_nobody_serves_at_home_is_placed_without_a_look_at_everybody() -> None:
    costs = {}
    for nodes in (64, 512):
        group = Group(nodes)
        topology = group.core.topology
        assert topology is not None
        pipelines = topology.pipelines  # each served by the nodes of the next one
        shifted = [
            replace(p, stages=tuple(map(_served_by, p.stages, n.stages)))
            for p, n in zip(pipelines, (*pipelines[1:], pipelines[0]), strict=True)
        ]
        topology = replace(topology, pipelines=tuple(shifted))
        situation = group.core._situation(topology, group.core._nodes())
        layout = Layout(topology)
        first, then = topology.pipelines[:2]
        assert replica_target(situation, layout, first, 0) is not None
        costs[nodes] = calls(lambda s=situation, layout=layout, then=then: replica_target(s, layout, then, 0))
    assert costs[512] < 1.2 * costs[64]


def _served_by(stage: Stage, other: Stage) -> Stage:
    return replace(stage, ranks=other.ranks, replicas=())


def test_a_report_is_taken_in_at_a_constant_cost_while_something_moves() -> None:
    """Half of the nodes of a moving pipeline report, and a decision looks at that pipeline alone."""
    costs = {}
    for nodes in (64, 512):
        group = Group(nodes)
        group.kill(nodes)  # one node: its place is borrowed
        node = group.records[3]
        fresh = make_record(make_config(nodes // STAGES, STAGES), "n3", "b", 3, domain=node.fault_domain)
        group.records[3] = fresh
        group.take(events.ReportReceived(NodeReport(fresh.member, 1, 0.0, 1)))
        group.decide(events.NodeRegistered(fresh))
        assert group.core.topology is not None
        assert group.core.topology.pipelines[0].move is not None
        scheduler = group.records[0]

        def one(group: Group = group, scheduler: NodeRecord = scheduler) -> None:
            group.decide(events.ReportReceived(group.report(scheduler)))

        one()
        costs[nodes] = calls(one)
    assert costs[512] < 1.5 * costs[64]


def test_what_operations_under_way_cost_a_decision_is_bounded_and_each_has_its_turn() -> None:
    """Hundreds of drains were a tenth of a second of each decision in a group of a thousand nodes."""
    costs = {}
    for drains in (32, 128):
        group = Group(256)
        for k in range(drains):
            node = f"n{2 * k}"
            operation = Operation(f"drain-{k:03}", OperationKind.DRAIN, node, created_unix_s=1.0 + k)
            group.take(events.OperationSeen(operation, 10 + k))
        told: set[str] = set()
        for _ in range(drains + 16):
            group.now += 0.05
            for effect in group.core.step(events.Tick(), group.now, group.now):
                match effect:
                    case events.WriteTopology():
                        group.writes += 1
                        group.take(events.WriteDone(effect, 1000 + group.writes))
                    case events.WriteOperation(operation):
                        told.add(operation.id)
                        group.take(events.WriteDone(effect, 1000 + group.writes))
        assert len(told) == drains
        group.now += 0.05
        topology = group.core.topology
        assert topology is not None
        situation = group.core._situation(topology, group.core._nodes())
        costs[drains] = calls(lambda g=group, s=situation: g.core._next_operations(s, []))
    assert costs[128] < 1.5 * costs[32]


def fresh(group: Group) -> ClusterStatus:
    """The status by one that has never made any."""
    members, topology = group.core._members, group.core.topology
    pieces = Overview(group.core._config, "c1", members).pieces(
        topology, members.nodes(topology), {}, group.now
    )
    _, whole = lines_of_pieces(pieces)
    return replace(whole, blemishes=group.core.status(group.now).blemishes)


def test_a_status_looks_at_those_that_were_heard_of() -> None:
    costs, pieces = {}, {}
    for nodes in (64, 512):
        group = Group(nodes)
        group.core.status(group.now)
        for record in group.records[:8]:
            group.take(events.ReportReceived(group.report(record)))
        before = group.core.status_in_pieces(group.now)
        pieces[nodes] = sum(1 for _ in before)
        for record in group.records[:8]:
            group.take(events.ReportReceived(group.report(record)))
        costs[nodes] = calls(lambda group=group: group.core.status(group.now))
    assert pieces[64] == pieces[512] == 8 + 2  # theirs, and their two pipelines'
    assert costs[512] < 1.2 * costs[64] + 2 * 512  # putting it together is one small step for each


def test_no_piece_of_a_status_grows_with_the_group() -> None:
    longest, last = {}, {}
    for nodes in (64, 512):
        group = Group(nodes)
        costs, status = lines_of_pieces(group.core.status_in_pieces(group.now))
        assert len(status.nodes) == nodes
        # In the first one names are sorted anew after a write of the topology.
        longest[nodes] = max(costs[1:-1])
        last[nodes] = costs[-1]
    assert longest[512] == longest[64]
    assert last[512] - last[64] <= 2 * (512 - 64)  # putting it together is one small step for each


def test_a_status_is_what_one_from_scratch_would_be() -> None:
    group = Group(64)
    assert group.core.status(group.now) == fresh(group)
    dead = group.kill(20)
    assert group.core.status(group.now) == fresh(group)
    group.second()
    found = group.core.status(group.now)
    assert found == fresh(group)
    states = {node.node: node.state for node in found.nodes}
    assert {node for node, state in states.items() if state is NodeState.RED} == {m.node for m in dead}
    first = group.records[0]
    report = group.report(first)
    group.take(events.ReportReceived(replace(report, blocks_used=7, counters={"steps": 3})))
    group.take(events.NodeRegistered(make_record(make_config(16, STAGES), "n1000", "a", 1)))
    for gone in dead:
        group.take(events.NodeGone(gone.node))
    found = group.core.status(group.now)
    assert found == fresh(group)
    assert found.nodes[0].blocks_used == 7
    assert found.nodes[-1].node == "n1000"
    for _ in range(30):  # nobody says anything for longer than makes one suspect
        group.now += 0.05
        group.decide(events.Tick())
    found = group.core.status(group.now)
    assert found == fresh(group)
    assert found.nodes[0].silent_s > 1.0


def test_two_statuses_that_are_made_at_once_know_what_the_later_one_knows() -> None:
    group = Group(64)
    early = group.core.status_in_pieces(group.now)
    next(early)
    group.kill(20)
    late = group.core.status_in_pieces(group.now)
    next(late)
    for _ in early:
        pass
    for _ in late:
        pass
    assert group.core.status(group.now) == fresh(group)


def test_a_topology_is_nothing_that_the_garbage_collector_looks_at() -> None:
    topology = initial(make_config(2, STAGES), 1)
    topology = decode(encode(topology), Topology, "topology")
    parts = [topology, *topology.pipelines, *(stage for p in topology.pipelines for stage in p.stages)]
    assert not any(map(gc.is_tracked, parts))


def test_a_beat_that_says_nothing_costs_a_few_calls() -> None:
    group = Group(64)
    group.now += 0.05
    beats = events.HeartbeatsReceived(tuple(record.member for record in group.records))
    assert calls(lambda: group.take(beats)) <= 64 * 5 + 20
