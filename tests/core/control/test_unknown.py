"""An operation that cannot be read is unknown: not over, not cancelled, and not overwritten."""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.core import events
from controlplane.core.plan import plan
from controlplane.core.policy import Policy
from controlplane.core.slot import Slot
from tests.core.control.sim import Sim, formed
from tests.core.control.world import LIMITS, World, make_config


def test_a_move_of_an_unknown_operation_is_not_called_off() -> None:
    world = World(make_config(2, 2))
    world.settle()
    world.operations["op"] = Operation("op", OperationKind.DRAIN, "n0", created_unix_s=1.0)
    world.lag = 1000  # the copy is never done
    while not any(p.move is not None for p in world.topology.pipelines):
        assert world.step() is not None
    world.operations.clear()  # a leader that has just begun, and cannot read what newer code wrote there

    def rule(unknown: frozenset[str]) -> str | None:
        policy = Policy(world.config, world.timers, {}, LIMITS, unknown=unknown)
        transition = plan(world.topology, world.nodes(), policy, world.now)
        return None if transition is None else transition.rule

    assert rule(frozenset()) == "call_off_unwanted", "an operation that is gone is over"
    assert rule(frozenset({"another"})) == "call_off_unwanted"
    assert rule(frozenset({"op"})) != "call_off_unwanted"


def moving(sim: Sim) -> bool:
    return sim.topology is not None and any(p.move is not None for p in sim.topology.pipelines)


def test_what_is_known_of_it_holds_and_nothing_is_written_over_it() -> None:
    sim = formed(2, 2)
    assert sim.submit("drain", "n0").accepted
    sim.run_until(lambda: sim.topology is not None and "n0" in sim.topology.cordoned)
    known, revision = sim.operations["op"]
    # Newer code rewrites it. Watches bring something that this code cannot read.
    sim.operations["op"] = (known, revision + 100)
    sim.tell(events.OperationUnknown("op"))
    sim.run(20)
    assert sim.operations["op"] == (known, revision + 100), "it was written over"
    assert sim.topology is not None
    assert sim.topology.serving("n0") == [], "what it asked for, as last read, goes on"
    # It can be read again.
    sim.tell(events.OperationSeen(known, revision + 100))
    sim.run_until(lambda: sim.state() is OperationState.DONE)


def test_a_fresh_leader_that_cannot_read_it_leaves_it_alone() -> None:
    sim = formed(2, 2)
    core = sim.cores[sim.leader]
    effects = core.step(events.OperationUnknown("strange"), sim.now, 0.0)
    assert effects == []
    for _ in range(50):
        sim.run(0.5)
    assert "strange" not in sim.operations
    assert sim.home()


def test_a_slot_is_busy_while_what_is_there_is_unknown() -> None:
    slot: Slot[Operation] = Slot()
    first = Operation("op", OperationKind.DRAIN, "n0")
    assert slot.seen(first, 5)
    slot.unreadable()
    assert slot.busy
    assert slot.value is first
    slot.pending = first
    assert slot.failed(first, 1.0)
    slot.unreadable()  # the read brought the same
    assert not slot.ask_again(100.0), "it has been answered"
    again = replace(first, message="x")
    assert slot.seen(again, 9)
    assert not slot.busy
    assert slot.value is again
