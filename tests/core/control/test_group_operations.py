"""Transfer of leadership, pause and resume."""

from __future__ import annotations

import pytest

from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.status import PipelineState
from tests.core.control.operating import done, levels
from tests.core.control.sim import Sim, formed
from tests.core.control.world import World, make_config

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


@pytest.mark.parametrize("near", [True, False])
def test_a_pause_calls_moves_off(near: bool) -> None:
    sim = formed()
    sim.near = False
    sim.submit("drain", "n0")
    sim.run_until(lambda: _moving(sim), limit_s=5)
    sim.near = near
    sim.submit("pause", id="stop")
    sim.run_until(lambda: done(sim, "stop"), limit_s=2)
    assert sim.topology is not None
    assert all(p.move is None for p in sim.topology.pipelines)
    sim.run(1)
    assert sim.operations["op"][0].message == "automation is paused"
    sim.near = True
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
