"""Drain, undrain, replace: to the end, interrupted, cancelled, too late."""

from __future__ import annotations

import pytest

from controlplane.contract.events import EventKind
from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.status import OperationRequest, PipelineState
from controlplane.contract.topology import Mode
from controlplane.core import events
from tests.core.control.sim import Sim, formed
from tests.core.control.world import World, make_config


def done(sim: Sim, id: str = "op") -> bool:
    return sim.state(id) is OperationState.DONE


def levels(sim: Sim, kind: str, node: str, substitute: str | None = None) -> dict[str, str]:
    request = OperationRequest("dry", kind, node, substitute, dry_run=True)
    answer = sim.cores[sim.leader].preflight(request)
    assert not answer.accepted
    return {check.name: check.level for check in answer.checks}


def test_drain_moves_everything_away_and_undrain_brings_it_back() -> None:
    sim = formed()
    answer = sim.submit("drain", "n2")
    assert answer.accepted
    assert "n6 takes over" in next(c.message for c in answer.checks if c.name == "stage")
    assert answer.plan[0] == "cordon n2"
    sim.run_until(lambda: done(sim), limit_s=10)
    assert sim.topology is not None
    assert sim.topology.serving("n2") == []
    assert sim.topology.cordoned == ("n2",)
    assert not any(m.node == "n2" for p in sim.topology.pipelines for s in p.stages for m in s.replicas)
    assert EventKind.DRAINED in sim.kinds()
    sim.run(20)
    assert sim.topology.serving("n2") == []
    assert sim.submit("undrain", "n2", id="back").accepted
    sim.run_until(lambda: done(sim, "back") and sim.home(), limit_s=20)


def test_the_same_id_is_one_operation() -> None:
    sim = formed()
    first = sim.submit("drain", "n2").operation
    again = sim.submit("drain", "n2")
    assert again.accepted
    assert first is not None
    assert again.operation is not None
    assert (again.operation.id, again.operation.created_unix_s) == (first.id, first.created_unix_s)
    assert not sim.submit("drain", "n3").accepted  # same id, another node
    sim.run_until(lambda: done(sim), limit_s=10)
    assert sim.submit("drain", "n2").operation == sim.operations["op"][0]


def test_a_new_leader_resumes_a_drain_wherever_it_was() -> None:
    for turns in range(12):
        sim = formed()
        sim.submit("drain", "n0")
        sim.run(turns * 0.1)
        sim.kill_leader()
        sim.run_until(lambda s=sim: done(s), limit_s=15)  # type: ignore[misc]
        assert sim.serving()[0] == "n4"


def test_cancelled_half_way_it_stays_where_it_was_and_cordoned() -> None:
    sim = formed()
    sim.lag = 10_000  # the copy does not catch up
    sim.submit("drain", "n0")
    sim.run(2)
    assert sim.topology is not None
    assert sim.topology.pipelines[0].move is not None
    sim.cancel("op")
    sim.run(1)
    assert sim.topology.pipelines[0].move is None
    assert sim.serving()[0] == "n0"
    assert sim.topology.cordoned == ("n0",)
    assert sim.state() is OperationState.CANCELLED


def test_a_deleted_operation_is_a_cancelled_one() -> None:
    sim = formed()
    sim.quiet = False
    sim.submit("replace", "n0")
    sim.run(1)
    assert sim.topology is not None
    assert sim.topology.pipelines[0].move is not None
    del sim.operations["op"]
    sim.watch(events.OperationGone("op"))
    sim.run(0.3)
    assert sim.topology.pipelines[0].move is None
    assert sim.serving()[0] == "n0"


def test_the_deadline_fails_it_and_calls_its_move_off() -> None:
    sim = formed()
    sim.quiet = False
    sim.submit("drain", "n0", deadline_s=5)
    sim.run(4)
    assert sim.state() is OperationState.RUNNING
    sim.run(2)
    assert sim.state() is OperationState.FAILED
    assert "deadline" in sim.operations["op"][0].message
    assert sim.topology is not None
    assert sim.topology.pipelines[0].move is None


def test_replace_starts_a_fresh_process_and_hands_everything_back() -> None:
    sim = formed()
    before = sim.nodes["n1"].member
    assert sim.submit("replace", "n1").accepted
    sim.run_until(lambda: done(sim), limit_s=20)
    fresh = sim.nodes["n1"].member
    assert fresh != before
    assert sim.topology is not None
    assert fresh in sim.topology.pipelines[0].stages[1].ranks
    assert EventKind.REPLACED in sim.kinds()
    assert EventKind.LEFT in sim.kinds()
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize("another_leads", [False, True])
def test_a_node_that_was_asked_to_exit_has_left_although_nobody_heard_its_goodbye(
    another_leads: bool,
) -> None:
    sim = formed(controllers=2)
    assert sim.submit("replace", "n1").accepted
    sim.run_until(lambda: sim.topology is not None and bool(sim.topology.retired), limit_s=20)
    assert sim.nodes["n1"].alive
    if another_leads:
        sim.kill_leader()
    sim.kill("n1")
    sim.run_until(lambda: done(sim), limit_s=30)
    told = [event.kind for event in sim.history if event.subject == "n1"]
    assert EventKind.LEFT in told
    assert EventKind.DIED not in told


def test_a_new_leader_resumes_a_replace_wherever_it_was() -> None:
    for turns in range(0, 40, 3):
        sim = formed(2, 2)
        before = sim.nodes["n1"].member
        sim.submit("replace", "n1")
        sim.run(turns * 0.1)
        sim.kill_leader()
        sim.run_until(lambda s=sim: done(s), limit_s=20)  # type: ignore[misc]
        assert sim.nodes["n1"].member != before


def test_a_dead_node_is_replaced_when_a_fresh_process_serves() -> None:
    sim = formed()
    sim.held.add("n1")
    sim.kill("n1")
    sim.run(8)
    answer = sim.submit("replace", "n1")
    assert answer.accepted
    sim.run(5)
    assert sim.state() is OperationState.RUNNING
    assert "waiting for a fresh process" in sim.operations["op"][0].message
    sim.held.clear()
    sim.run_until(lambda: done(sim), limit_s=15)
    assert sim.serving()[1] == "n1"


def test_a_stopped_process_that_is_replaced_has_to_exit_when_it_wakes() -> None:
    sim = formed()
    before = sim.nodes["n1"].member
    sim.stop("n1")
    sim.run(3)
    sim.submit("replace", "n1")
    sim.run(1)
    assert sim.topology is not None
    assert before in sim.topology.retired
    sim.cont("n1")
    sim.run_until(lambda: done(sim), limit_s=15)
    assert sim.nodes["n1"].member != before


def test_replace_with_a_spare_changes_the_home() -> None:
    sim = formed(2, 2, spares=1)
    answer = sim.submit("replace", "n1", substitute="n5")
    assert answer.accepted, answer
    sim.run_until(lambda: done(sim), limit_s=15)
    assert sim.topology is not None
    assert sim.topology.pipelines[0].stages[1].homes == ("n5",)
    assert sim.serving() == ["n0", "n5"]
    assert sim.topology.cordoned == ("n1",)
    assert sim.nodes["n1"].alive
    assert sim.topology.retired == ()
    sim.kill("n5")
    sim.run_until(
        lambda: sim.serving() == ["n0", "n5"] and sim.topology.pipelines[0].move is None, limit_s=15
    )  # type: ignore[union-attr]


def test_replace_with_a_spare_cancelled_half_way_goes_back() -> None:
    sim = formed(2, 2, spares=1)
    sim.quiet = False
    sim.submit("replace", "n1", substitute="n5")
    sim.run(1)
    sim.cancel("op")
    sim.quiet = True
    sim.run(2)
    assert sim.serving() == ["n0", "n1"]
    assert sim.topology is not None
    assert sim.topology.cordoned == ()
    assert sim.topology.pipelines[0].stages[1].homes == ("n1",)


@pytest.mark.parametrize("turns", range(0, 12, 2))
def test_replace_with_a_spare_survives_the_leader_and_the_nodes_death(turns: int) -> None:
    sim = formed(2, 2, spares=1)
    sim.held.add("n1")
    sim.submit("replace", "n1", substitute="n5")
    sim.run(turns * 0.1)
    sim.kill("n1")
    sim.kill_leader()
    sim.run_until(lambda: done(sim), limit_s=15)
    assert sim.serving() == ["n0", "n5"]


def test_preflight_refuses_what_cannot_work() -> None:
    sim = formed(2, 2, spares=1)
    assert levels(sim, "drain", "n9") == {"node": "fail"}
    assert levels(sim, "explode", "n1") == {"request": "fail"}
    assert levels(sim, "replace", "n1", "n0")["substitute"] == "fail"  # has a home, and another stage
    assert levels(sim, "replace", "n1", "n4")["substitute"] == "fail"  # another stage
    assert levels(sim, "replace", "n1", "n1")["substitute"] == "fail"
    assert levels(sim, "replace", "n1", "n5")["substitute"] == "ok"
    assert levels(sim, "drain", "n1", "n5")["substitute"] == "fail"
    assert levels(sim, "undrain", "n1")["cordon"] == "warn"
    ok = levels(sim, "drain", "n1")
    assert (ok["capacity"], ok["replicas"], ok["peers"], ok["stage"]) == ("ok", "ok", "ok", "warn")
    alone = formed(1, 2)
    assert levels(alone, "drain", "n1")["stage"] == "fail"
    assert levels(formed(2, 2, mode=Mode.STOP_RESTART), "drain", "n1") == {"mode": "fail"}


def test_a_dry_run_changes_nothing() -> None:
    sim = formed(2, 2)
    answer = sim.cores["c1"].preflight(OperationRequest("op", "drain", "n1", dry_run=True))
    assert not answer.accepted
    assert answer.operation is None
    assert all(check.level != "fail" for check in answer.checks)
    assert len(answer.plan) == 3


def test_one_operation_at_a_time_on_a_node_and_the_older_goes_first() -> None:
    sim = formed()
    sim.quiet = False
    sim.submit("drain", "n0")
    sim.run(1)
    refused = sim.submit("undrain", "n0", id="later")
    assert not refused.accepted
    # Two controllers may accept at the same moment.
    sim.put_operation(Operation("later", OperationKind.UNDRAIN, "n0", created_unix_s=2e9))
    sim.run(1)
    assert "older operation" in sim.operations["later"][0].message
    sim.quiet = True
    sim.run_until(lambda: done(sim) and done(sim, "later"), limit_s=30)
    sim.run_until(sim.home, limit_s=30)


def test_mode_none_drains_by_computing_again() -> None:
    sim = formed(mode=Mode.NONE)
    sim.submit("drain", "n0")
    sim.run_until(lambda: done(sim), limit_s=10)
    assert sim.serving()[0] == "n4"


# ---- cordon


def test_a_cordon_brings_nothing_new_and_takes_nothing_away() -> None:
    sim = formed()
    assert sim.submit("cordon", "n2").accepted
    sim.run_until(lambda: done(sim), limit_s=2)
    assert sim.topology is not None
    before = sim.topology.pipelines
    assert sim.topology.cordoned == ("n2",)
    sim.run(10)
    assert sim.topology.pipelines == before  # it serves what it served and holds what it held
    sim.held.add("n6")
    sim.kill("n6")  # n2 would be the one to borrow
    sim.run(5)
    assert sim.topology.pipelines[1].stages[2].ranks == ()
    assert sim.submit("undrain", "n2", id="back").accepted
    sim.run_until(lambda: sim.up() and sim.serving("p1")[2] == "n2", limit_s=5)


# ---- transfer of leadership


def test_leadership_goes_where_it_is_asked_to() -> None:
    sim = formed(controllers=3)
    assert sim.submit("transfer-leader", "c3").accepted
    sim.run_until(lambda: done(sim), limit_s=2)
    assert (sim.leader, sim.led) == ("c3", ["c1", "c2", "c3"])
    again = sim.submit("transfer-leader", "c3")
    assert again.accepted
    assert sim.submit("transfer-leader", "c3", id="new").checks[0].level == "warn"
    sim.run_until(lambda: done(sim, "new"), limit_s=2)
    assert sim.led == ["c1", "c2", "c3"]
    sim.run_until(sim.home, limit_s=5)


def test_without_a_name_the_next_candidate_leads() -> None:
    sim = formed()
    answer = sim.submit("transfer-leader")
    assert answer.operation is not None
    assert answer.operation.node == "c2"
    assert sim.submit("transfer-leader").accepted  # the same id: the same operation
    sim.run_until(lambda: done(sim), limit_s=2)
    assert sim.leader == "c2"


def test_nobody_to_hand_over_to() -> None:
    sim = formed(controllers=1)
    assert levels(sim, "transfer-leader", "")["candidates"] == "fail"
    sim = formed()
    assert levels(sim, "transfer-leader", "c9")["candidates"] == "fail"


# ---- pause and resume


def test_while_paused_nothing_is_repaired_and_the_status_says_so() -> None:
    sim = formed()
    assert sim.submit("pause").accepted
    sim.run_until(lambda: done(sim), limit_s=2)
    sim.held.add("n1")
    sim.kill("n1")
    counter = sim.topology.counter if sim.topology else 0
    sim.run(20)
    sim.kill_leader()
    sim.run(5)
    assert sim.topology is not None
    assert sim.topology.counter == counter
    status = sim.cores[sim.leader].status(sim.now)
    assert status.paused
    assert status.pipelines[0].state is PipelineState.DOWN  # whatever the topology still names
    assert status.pipelines[1].state is PipelineState.UP
    assert levels(sim, "drain", "n2")["paused"] == "warn"
    assert sim.submit("resume", id="on").accepted
    sim.run_until(lambda: done(sim, "on") and sim.up() and sim.serving()[1] == "n5", limit_s=3)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_pause_leaves_no_pipeline_quiesced(quiet: bool) -> None:
    sim = formed()
    sim.quiet = False
    sim.submit("drain", "n0")
    sim.run_until(lambda: _moving(sim), limit_s=5)
    sim.quiet = quiet
    sim.submit("pause", id="stop")
    sim.run_until(lambda: done(sim, "stop"), limit_s=2)
    assert sim.topology is not None
    assert all(p.move is None for p in sim.topology.pipelines)
    sim.run(1)
    assert sim.operations["op"][0].message == "automation is paused"
    sim.quiet = True
    sim.submit("resume", id="on")
    sim.run_until(lambda: done(sim), limit_s=10)
    assert sim.serving()[0] == "n4"


def _moving(sim: Sim) -> bool:
    return sim.topology is not None and any(p.move is not None for p in sim.topology.pipelines)


def test_pause_and_resume_are_taken_in_the_order_in_which_they_were_asked_for() -> None:
    for first, last in (
        (OperationKind.PAUSE, OperationKind.RESUME),
        (OperationKind.RESUME, OperationKind.PAUSE),
    ):
        world = World(make_config())
        world.settle()
        for id, kind, when in (("a", last, 2.0), ("b", first, 1.0)):
            world.operations[id] = Operation(id, kind, created_unix_s=when)
        world.settle()
        assert {op.state for op in world.operations.values()} == {OperationState.DONE}
        assert world.topology.paused is (last is OperationKind.PAUSE)


# ---- rolling restart


def fresh(sim: Sim, before: dict[str, Member]) -> set[str]:
    return {name for name, member in members(sim).items() if before[name] != member}


def members(sim: Sim) -> dict[str, Member]:
    return {**sim.peers, **{name: node.member for name, node in sim.nodes.items()}}


def test_every_node_is_restarted_and_never_two_of_one_stage_are_away() -> None:
    sim = formed(2, 3)
    before = members(sim)
    answer = sim.submit("restart", "nodes")
    assert answer.accepted, answer
    assert answer.plan[0] == "move p0/0 off n0, restart it, hand back"

    def over() -> bool:
        away = [
            name
            for name, node in sim.nodes.items()
            if not node.alive or (sim.topology is not None and not sim.topology.serving(name))
        ]
        assert len(away) <= 1, away
        assert sim.up()
        return done(sim)

    sim.run_until(over, limit_s=120)
    assert fresh(sim, before) == {f"n{k}" for k in range(6)}
    assert "6 of 6" in " ".join(said(sim))
    sim.run_until(sim.home, limit_s=20)


def said(sim: Sim) -> list[str]:
    return [op.message for op, _ in sim.operations.values()] + sim.messages


def test_the_next_node_waits_for_the_copies() -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes")
    sim.run_until(lambda: sim.nodes["n0"].member != before["n0"], limit_s=10)
    sim.run_until(lambda: sim.serving()[0] == "n0", limit_s=10)
    sim.lag = 10_000
    sim.run(15)
    assert sim.operations["op"][0].turn == 0
    assert "copies" in sim.operations["op"][0].message
    assert fresh(sim, before) == {"n0"}
    sim.lag = 0
    sim.run_until(lambda: done(sim), limit_s=60)


def test_everything_is_restarted_the_leader_last_of_the_controllers() -> None:
    sim = formed(2, 2, controllers=3, gateways=2)
    before = members(sim)
    answer = sim.submit("restart", "all")
    assert [step for step in answer.plan if "c" in step][:3] == [
        "restart c2",
        "restart c3",
        "transfer leadership, restart c1",
    ]
    # Nodes refuse gateways of newer code, so these come last.
    assert [target.member.node for target in answer.operation.targets[3:]] == [
        "n0",
        "n1",
        "n2",
        "n3",
        "g1",
        "g2",
    ]
    sim.run_until(lambda: done(sim), limit_s=120)
    assert fresh(sim, before) == set(before)
    assert sim.led == ["c1", "c2"]  # handed over once
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize(("wanted", "told"), [("2", "n0 came back with code 1, not 2"), ("1", "")])
def test_a_restart_fails_at_the_first_process_of_other_code(wanted: str, told: str) -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes", version=wanted, settings="s")
    sim.run_until(lambda: not sim.operations["op"][0].open, limit_s=60)
    operation = sim.operations["op"][0]
    if told:
        assert operation.state is OperationState.FAILED
        assert told in operation.message
        assert fresh(sim, before) == {"n0"}, "the others keep what they have"
    else:
        assert operation.state is OperationState.DONE
        assert fresh(sim, before) == {"n0", "n1", "n2", "n3"}
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize("what", ["code", "settings"])
@pytest.mark.parametrize("scope", ["nodes", "controllers", "gateways", "all"])
def test_a_restart_whose_processes_differ_fails_and_names_them(scope: str, what: str) -> None:
    """Nobody has said what they should be: what is installed changes in the middle."""
    sim = formed(2, 2, controllers=2, gateways=2)
    before = members(sim)
    answer = sim.submit("restart", scope)
    assert answer.operation is not None
    first, second = (target.member.node for target in answer.operation.targets[:2])
    sim.held.add(second)
    sim.run_until(lambda: sim.operations["op"][0].turn == 1, limit_s=30)
    assert fresh(sim, before) == {first}
    sim.installed = ("2", "s") if what == "code" else ("1", "t")
    sim.held.clear()
    sim.run_until(lambda: not sim.operations["op"][0].open, limit_s=60)
    operation = sim.operations["op"][0]
    assert operation.state is OperationState.FAILED, operation
    old, new = ("1", "2") if what == "code" else ("s", "t")
    assert f"mixed {what}: {old} in {first}, {new} in {second}" in operation.message
    sim.run_until(sim.home, limit_s=20)


def test_the_only_controller_restarts_itself() -> None:
    sim = formed(controllers=1)
    before = members(sim)
    assert levels(sim, "restart", "controllers")["leader"] == "warn"
    sim.submit("restart", "controllers")
    sim.run_until(lambda: done(sim), limit_s=10)
    assert fresh(sim, before) == {"c1"}


@pytest.mark.parametrize("turns", range(0, 160, 8))
def test_a_new_leader_resumes_a_restart_wherever_it_was(turns: int) -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "all")
    sim.run(turns * 0.1)
    sim.kill_leader()
    sim.run_until(lambda: done(sim), limit_s=90)
    assert fresh(sim, before) == set(before)
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize("turns", range(0, 60, 6))
def test_a_restart_that_is_cancelled_leaves_a_cluster_that_is_whole(turns: int) -> None:
    sim = formed(2, 2)
    sim.submit("restart", "all")
    sim.run(turns * 0.1)
    sim.cancel("op")
    sim.run_until(sim.home, limit_s=30)


@pytest.mark.parametrize("victim", ["n0", "n1", "n2", "n3"])
@pytest.mark.parametrize("turns", range(0, 60, 12))
def test_a_death_in_the_midst_of_a_restart(victim: str, turns: int) -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes")
    sim.run(turns * 0.1)
    sim.kill(victim)
    sim.run_until(lambda: done(sim), limit_s=90)
    assert fresh(sim, before) == {"n0", "n1", "n2", "n3"}
    sim.run_until(sim.home, limit_s=20)


def test_a_restart_is_refused_where_nobody_could_take_over() -> None:
    assert levels(formed(1, 2), "restart", "nodes")["stages"] == "fail"
    assert levels(formed(2, 2), "restart", "nodes")["stages"] == "ok"
    assert levels(formed(2, 2), "restart", "everything") == {"scope": "fail"}
    hushed = formed(2, 2)
    hushed.stop("n2")
    hushed.run(0.8)  # n2 is suspected, which may pass
    assert levels(hushed, "restart", "nodes")["stages"] == "warn"
    baseline = formed(2, 2, mode=Mode.STOP_RESTART)
    assert levels(baseline, "restart", "nodes")["mode"] == "fail"
    assert baseline.submit("restart", "gateways").accepted
    baseline.run_until(lambda: done(baseline), limit_s=5)
    sim = formed(2, 2)
    sim.quiet = False
    sim.submit("drain", "n1")
    assert levels(sim, "restart", "nodes")["operations"] == "fail"
