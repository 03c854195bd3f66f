"""Drain, cordon, undrain, replace: to the end, interrupted, cancelled, too late."""

from __future__ import annotations

import pytest

from controlplane.contract.events import EventKind
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.status import OperationRequest
from controlplane.contract.topology import Mode
from controlplane.core import events
from tests.core.control.operating import done, levels
from tests.core.control.sim import formed


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
    sim.near = False
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
    sim.near = False
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


def test_a_replace_says_why_the_fresh_process_cannot_serve() -> None:
    sim = formed()
    sim.recorded = {"weights_digest": "others"}
    sim.submit("replace", "n1")
    sim.run_until(lambda: sim.nodes["n1"].record.weights_digest == "others", limit_s=10)
    sim.run(1)
    told = sim.operations["op"][0].message
    assert told == "waiting for a fresh process of n1: its weights are not those that serve stage 1"
    sim.recorded = {}
    sim.kill("n1")
    sim.run_until(lambda: done(sim), limit_s=20)


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
    sim.near = False
    sim.submit("replace", "n1", substitute="n5")
    sim.run(1)
    sim.cancel("op")
    sim.near = True
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
    sim.near = False
    sim.submit("drain", "n0")
    sim.run(1)
    refused = sim.submit("undrain", "n0", id="later")
    assert not refused.accepted
    # Two controllers may accept at the same moment.
    sim.put_operation(Operation("later", OperationKind.UNDRAIN, "n0", created_unix_s=2e9))
    sim.run(1)
    assert "older operation" in sim.operations["later"][0].message
    sim.near = True
    sim.run_until(lambda: done(sim) and done(sim, "later"), limit_s=30)
    sim.run_until(sim.home, limit_s=30)


def test_mode_none_drains_by_computing_again() -> None:
    sim = formed(mode=Mode.NONE)
    sim.submit("drain", "n0")
    sim.run_until(lambda: done(sim), limit_s=10)
    assert sim.serving()[0] == "n4"


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
