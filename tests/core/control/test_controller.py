"""The controller from events to effects, in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from msgspec.structs import replace

from controlplane.contract.events import EventKind
from controlplane.contract.ids import Member
from controlplane.contract.reports import LAG_UNKNOWN, RecoveryReport
from controlplane.contract.status import NodeState, PipelineState
from controlplane.contract.topology import Mode
from controlplane.core import events
from controlplane.core.controller import Controller
from controlplane.core.events import Record, Reread, WriteTopology
from tests.core.control.sim import Sim, formed
from tests.core.control.world import make_config


def test_a_group_forms_from_its_homes_and_the_first_topology_counts_one() -> None:
    sim = formed()
    assert sim.written[0].counter == 1
    assert all(p.epoch == 0 for p in sim.written[0].pipelines)
    assert sim.serving("p0") == ["n0", "n1", "n2", "n3"]
    status = sim.cores["c2"].status(sim.now)
    assert status.available
    assert [p.state for p in status.pipelines] == [PipelineState.UP] * 2
    assert {n.state for n in status.nodes} == {NodeState.GREEN}
    sim.run(0.2)
    assert sim.cores["c2"].status(sim.now).pipelines[0].stages[1].lag_tokens == 0


def test_a_lag_that_is_not_known_yet_is_no_number_of_tokens() -> None:
    sim = formed()
    for lag, told in ((48, 48), (LAG_UNKNOWN, -1)):
        sim.lag = lag
        sim.run(2.0)
        assert sim.cores["c2"].status(sim.now).pipelines[0].stages[1].lag_tokens == told


@pytest.mark.parametrize("victim", [f"n{k}" for k in range(8)])
def test_a_killed_node_is_replaced_in_the_same_instant_and_gets_its_stage_back(victim: str) -> None:
    sim = formed()
    counter = sim.topology.counter if sim.topology else 0
    other = {p.id: p.epoch for p in sim.topology.pipelines} if sim.topology else {}
    sim.kill(victim)
    # No time has passed: two kinds of evidence were enough.
    mine = f"p{int(victim[1:]) // 4}"
    donor = f"n{(int(victim[1:]) + 4) % 8}"
    assert donor in sim.serving(mine)
    assert sim.topology is not None
    assert sim.topology.counter >= counter + 1
    for pipeline in sim.topology.pipelines:
        assert (pipeline.epoch == other[pipeline.id]) is (pipeline.id != mine)
    assert sim.cores["c1"].status(sim.now).pipelines[int(victim[1:]) // 4].state is PipelineState.DEGRADED
    died = next(e for e in sim.history if e.kind is EventKind.DIED)
    epoch = next(e for e in reversed(sim.history) if e.kind is EventKind.EPOCH)
    assert died.subject == victim
    assert float(died.details["silent_s"]) < 0.2
    assert "plan_s" in epoch.details
    assert sim.run_until(sim.home) < 15
    assert EventKind.MOVE in sim.kinds()


def test_a_second_kill_during_recovery() -> None:
    sim = formed()
    sim.kill("n1")
    sim.kill("n5")
    assert not sim.up()
    assert EventKind.UNAVAILABLE in sim.kinds()
    status = sim.cores["c1"].status(sim.now)
    assert [p.state for p in status.pipelines] == [PipelineState.DOWN] * 2
    assert not status.available
    assert sim.run_until(sim.up) < 2
    sim.run_until(sim.home)


def test_a_stopped_node_is_replaced_and_comes_back_blank() -> None:
    sim = formed()
    before = sim.nodes["n2"].member
    sim.stop("n2")
    assert sim.run_until(lambda: "n6" in sim.serving()) < 1.6
    sim.run(3.5)
    sim.cont("n2")
    written = len(sim.written)
    sim.run(1.5)
    assert not any(t for t in sim.written[written:] if before in list(t.pipelines[0].members()))
    sim.run_until(sim.home)
    assert sim.nodes["n2"].member == before


def test_a_broken_path_to_the_leader_is_not_a_death() -> None:
    sim = formed()
    sim.deaf.add(("c1", "n3"))
    counter = sim.topology.counter if sim.topology else 0
    sim.tell(events.ReportStreamBroken(sim.nodes["n3"].member))
    sim.run(20)
    assert sim.topology is not None
    assert sim.topology.counter == counter
    node = next(n for n in sim.cores["c1"].status(sim.now).nodes if n.node == "n3")
    assert node.state is NodeState.YELLOW
    assert "neighbours hear it" in node.evidence
    sim.deaf.clear()
    sim.run(0.5)
    assert EventKind.CLEARED in sim.kinds()


def test_a_leader_that_hears_nobody_condemns_nobody() -> None:
    sim = formed()
    sim.deaf.update(("c1", node) for node in sim.nodes)
    written = len(sim.written)
    sim.run(20)
    assert len(sim.written) == written


def test_a_paused_leader_condemns_nobody() -> None:
    sim = formed()
    written = len(sim.written)
    sim.now += 30.0  # nothing was processed meanwhile
    sim.tell(events.Tick())
    sim.run(1)
    assert len(sim.written) == written
    assert EventKind.DIED not in sim.kinds()


def test_a_new_leader_decides_at_once_on_what_it_saw_as_a_candidate() -> None:
    sim = formed()
    sim.leader = ""  # nobody leads while the node dies
    sim.cores["c1"].step(events.LostLeadership(), sim.now, 0.0)
    sim.kill("n0")
    sim.run(0.3)
    assert "n0" in sim.serving()
    sim.elect("c2")
    assert sim.serving()[0] == "n4"
    assert sim.kinds().count(EventKind.DIED) == 1
    sim.run_until(sim.home)


def test_a_leader_killed_while_a_node_is_down() -> None:
    sim = formed()
    sim.held.add("n1")
    sim.kill("n1")
    sim.kill_leader()
    assert "n5" in sim.serving()
    sim.held.clear()
    sim.run_until(sim.home)


def test_a_fresh_controller_finds_out_that_a_named_member_is_dead() -> None:
    """Nothing is left of the node but its name in the topology."""
    sim = formed(controllers=1)
    sim.held.add("n1")
    sim.leader = ""
    sim.cores["c1"].step(events.LostLeadership(), sim.now, 0.0)
    sim.kill("n1")
    sim.run(6)  # its lease is gone
    sim.cores["c1"] = Controller(sim.config, "c1")
    for node in sim.nodes.values():
        if node.leased:
            sim.tell(events.NodeRegistered(node.record))
    sim.tell(events.TopologySeen(sim.topology, sim.topology_revision))
    sim.elect("c1")
    assert "n1" in sim.serving()
    assert sim.run_until(lambda: "n5" in sim.serving()) < 2.5


@pytest.mark.parametrize("outcome", ["lost", "landed", "conflict"])
def test_after_a_write_that_may_have_failed_the_value_is_read_before_the_next(outcome: str) -> None:
    sim = formed()
    sim.outcomes.append(outcome)
    sim.kill("n0")
    assert sim.serving()[0] == "n4"
    counters = [t.counter for t in sim.written]
    assert counters == sorted(set(counters))
    sim.run_until(sim.home)


def test_one_write_at_a_time_and_none_before_the_reread() -> None:
    config = make_config(1, 1)
    core = Controller(config, "c1")
    core.step(events.TopologySeen(None, 0), 0.0, 0.0)
    first = [e for e in core.step(events.BecameLeader(), 0.0, 0.0) if isinstance(e, WriteTopology)]
    assert [w.expected_mod_revision for w in first] == [0]
    assert not core.step(events.Tick(), 0.05, 0.0)
    assert core.step(events.WriteUnknown(first[0]), 0.1, 0.0) == [Reread()]
    assert not core.step(events.Tick(), 0.15, 0.0)
    later = [e for t in range(3, 60) for e in core.step(events.Tick(), t * 0.05, 0.0)]
    assert later == [Reread()]  # etcd is away: asked again, with patience
    effects = core.step(events.TopologySeen(first[0].topology, 7), 3.0, 0.0)
    assert not [e for e in effects if isinstance(e, WriteTopology)]  # it had taken effect
    assert core.topology == first[0].topology


@pytest.mark.parametrize(
    "answer", [events.WriteConflict, events.WriteUnknown, partial(events.WriteDone, mod_revision=8)]
)
def test_an_answer_from_an_earlier_term_is_not_taken_for_the_newer_writes(
    answer: Callable[[events.Write], events.CoreEvent],
) -> None:
    """Leadership is lost and won again while a write waits for etcd; meanwhile there is another plan."""
    config = make_config(1, 1)
    core = Controller(config, "c1")
    core.step(events.TopologySeen(None, 0), 0.0, 0.0)
    old = write_of(core.step(events.BecameLeader(), 0.0, 0.0))
    core.step(events.LostLeadership(), 0.1, 0.0)
    seen = replace(old.topology, counter=3, mode=Mode.NONE)
    core.step(events.TopologySeen(seen, 7), 0.1, 0.0)
    new = write_of(core.step(events.BecameLeader(), 0.2, 0.0))
    assert new.topology.mode is config.mode
    assert core.step(answer(old), 0.3, 0.0) == []
    assert core.topology == seen
    assert core.step(events.Tick(), 0.35, 0.0) == []  # `new` is still waited for
    core.step(events.WriteDone(new, 9), 0.4, 0.0)
    assert core.topology == new.topology


def write_of(effects: list[events.Effect]) -> WriteTopology:
    (write,) = (effect for effect in effects if isinstance(effect, WriteTopology))
    return write


def test_a_candidate_writes_and_records_nothing() -> None:
    sim = Sim(make_config(2, 2), controllers=1)
    core = Controller(sim.config, "c9")
    for node in sim.nodes.values():
        assert core.step(events.NodeRegistered(node.record), 0.0, 0.0) == []
    assert core.step(events.TopologySeen(None, 0), 0.0, 0.0) == []
    assert core.step(events.Tick(), 0.1, 0.0) == []


def test_etcd_away_for_20_s_changes_nothing_that_serves() -> None:
    sim = formed()
    sim.etcd_up = False
    written = len(sim.written)
    for node in ("n0", "n5"):
        sim.nodes[node].leased = False
        sim.watch(events.NodeGone(node))  # their leases ran out while etcd was away; told when it is back
    sim.run(20)
    sim.etcd_back()
    sim.run(1)
    assert len(sim.written) == written
    assert EventKind.DIED not in sim.kinds()
    for node in ("n0", "n5"):
        sim.watch(events.NodeRegistered(sim.nodes[node].record))
    sim.kill("n0")
    sim.run_until(sim.home)


def test_a_lost_topology_is_written_again_and_counts_on() -> None:
    sim = formed()
    last = sim.topology
    assert last is not None
    sim.put_topology(None)
    assert sim.topology is not None
    assert sim.topology == replace(last, counter=last.counter + 1)


def test_an_older_topology_is_followed_by_the_newest_one_that_somebody_remembers() -> None:
    sim = formed()
    old = sim.topology
    assert old is not None
    sim.kill("n1")
    sim.run_until(sim.home)
    newest = sim.topology
    assert newest is not None
    assert newest.counter > old.counter + 1
    sim.put_topology(old)  # a snapshot was restored
    assert sim.topology == replace(newest, counter=newest.counter + 1)


def test_epochs_go_on_where_only_nodes_remember_what_etcd_has_lost() -> None:
    sim = formed(controllers=1)
    old = sim.topology
    assert old is not None
    sim.kill("n1")
    sim.run_until(sim.home)
    newest = sim.topology
    assert newest is not None
    core = sim.cores["c1"]
    core._topology.value, core._lost = None, None  # a controller that was away
    sim.put_topology(old)
    after = sim.topology
    assert after.counter > newest.counter
    assert all(p.epoch > newest.counter for p in after.pipelines)
    sim.run_until(sim.home)
    assert sim.topology.pipelines[0].stages[1].ranks != old.pipelines[0].stages[1].ranks


def test_a_pipeline_without_its_homes_borrows_only_after_the_grace() -> None:
    sim = Sim(make_config(2, 2))
    sim.held.update({"n0"})
    sim.kill("n0")
    sim.run(14)
    assert sim.serving("p0") == ["-", "-"]
    assert sim.serving("p1") == ["n2", "n3"]
    sim.run(2)
    assert sim.serving("p0") == ["n2", "n1"]


def test_pause_stops_all_automation() -> None:
    sim = formed()
    assert sim.topology is not None
    sim.put_topology(replace(sim.topology, counter=sim.topology.counter + 1, paused=True))
    written = len(sim.written)
    sim.kill("n0")
    sim.run(3)
    assert len(sim.written) == written
    assert sim.topology is not None
    sim.put_topology(replace(sim.topology, counter=sim.topology.counter + 1, paused=False))
    sim.run_until(sim.home)


def test_stop_restart_mode_stops_the_whole_instance_and_forms_it_from_its_homes() -> None:
    sim = formed(mode=Mode.STOP_RESTART, restart_s=2.0)
    before = {name: node.member for name, node in sim.nodes.items()}
    sim.kill("n1")
    assert sim.serving("p0") == ["-"] * 4
    assert sim.serving("p1") == ["n4", "n5", "n6", "n7"]
    assert sim.topology is not None
    assert {m.node for m in sim.topology.retired} == {"n0", "n2", "n3"}
    assert sim.run_until(sim.home) >= 2.0
    assert all(sim.nodes[n].member != before[n] for n in ("n0", "n1", "n2", "n3"))
    assert all(sim.nodes[n].member == before[n] for n in ("n4", "n5", "n6", "n7"))


def test_recoveries_are_recorded_once_with_their_phases() -> None:
    sim = formed(controllers=1)
    core, node = sim.cores["c1"], sim.nodes["n0"]
    recovery = RecoveryReport("p0", 9, 10.0, 10.1, 10.3, 10.35, 4, 12, False)
    report = replace(core._members.reports[node.member], recoveries=(recovery,))
    found = [
        e.event
        for _ in range(2)
        for e in core.step(events.ReportReceived(report), sim.now, 11.0)
        if isinstance(e, Record)
    ]
    assert [e.kind for e in found] == [EventKind.RECOVERED]
    assert found[0].details["connect_s"] == pytest.approx(0.1)
    assert found[0].details["restore_s"] == pytest.approx(0.2)
    assert found[0].details["first_token_s"] == pytest.approx(0.05)


def test_crash_loops_do_not_fill_the_memory() -> None:
    sim = formed(2, 2, restart_s=1.0)
    for _ in range(60):
        sim.kill("n3")
        sim.run(1.6)
    core = sim.cores["c1"]
    assert len(core._detector._watched) < 50
    assert len(core._members.reports) < 50
    assert Member("n3", "i3") not in core._members.reports


def test_a_fresh_leader_goes_on_from_a_topology_that_others_know_and_etcd_has_lost() -> None:
    """A snapshot was restored, and of nodes and controllers nobody is left that knew what came after it."""
    old = formed().topology
    assert old is not None
    core = Controller(make_config(2, 4), "c9")
    core.step(events.TopologySeen(old, 7), 0.0, 0.0)
    core.step(events.PeersSeen(forgotten=old.counter + 5), 0.0, 0.0)
    write = write_of(core.step(events.BecameLeader(), 0.0, 0.0))
    assert write.topology.counter == old.counter + 6
    assert [p.epoch for p in write.topology.pipelines] == [old.counter + 6] * len(old.pipelines)
    assert core.newest == old.counter + 5
