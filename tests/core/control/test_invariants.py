"""Each invariant can fail: a step that breaks it is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode, Move, MovePhase, Topology
from controlplane.core.edit import successor, unformed, with_stage
from controlplane.core.invariants import INVARIANTS, InvariantViolation, broken, check
from tests.core.control.world import World, make_config

Breaker = Callable[[World], Topology]


def formed() -> World:
    """2 x 2 at home, with a spare for each stage: n4, n5."""
    world = World(make_config(2, 2, spares=1))
    world.settle()
    return world


def counter(world: World) -> Topology:
    return replace(world.topology, counter=world.topology.counter + 2)


def pipelines(world: World) -> Topology:
    return replace(successor(world.topology), group="other")


def gone(world: World) -> Topology:
    """Nobody has asked it to close."""
    world.running = 0
    return successor(world.topology, removed={"p1"})


def added_and_served(world: World) -> Topology:
    p2 = with_stage(unformed("p2", ("n4", "n5")), 0, ranks=(world.member("n4"),))
    return successor(world.topology, added=(p2,))


def closed_too_early(world: World) -> Topology:
    world.topology = successor(world.topology, replace(world.topology.pipelines[1], closing=True))
    return successor(world.topology, removed={"p1"})


def ranks(world: World) -> Topology:
    extra = with_stage(world.topology.pipelines[0], 0, ranks=(world.member("n0"), world.member("n4")))
    return successor(world.topology, extra)


def epoch(world: World) -> Topology:
    p0 = world.topology.pipelines[0]
    return replace(successor(world.topology), pipelines=(replace(p0, epoch=99), world.topology.pipelines[1]))


def stale_epoch(world: World) -> Topology:
    world.kill("n0")
    after = successor(
        world.topology, with_stage(world.topology.pipelines[0], 0, ranks=(world.member("n2"),), replicas=())
    )
    old = world.topology.pipelines[0].epoch
    return replace(after, pipelines=(replace(after.pipelines[0], epoch=old), after.pipelines[1]))


def twice(world: World) -> Topology:
    world.kill("n0")
    p0 = with_stage(world.topology.pipelines[0], 0, ranks=(world.member("n1"),))
    return successor(world.topology, p0)


def copy_at_home(world: World) -> Topology:
    return successor(
        world.topology, with_stage(world.topology.pipelines[0], 0, replicas=(world.member("n0"),))
    )


def three_copies(world: World) -> Topology:
    nodes = ("n2", "n4", "n6")
    return successor(
        world.topology,
        with_stage(world.topology.pipelines[0], 0, replicas=tuple(Member(n, "i") for n in nodes)),
    )


def duty_for_the_suspected(world: World) -> Topology:
    world.yellow.add("n4")
    return with_copy(world, "n4")


def duty_for_the_cordoned(world: World) -> Topology:
    world.topology = replace(world.topology, cordoned=("n4",))
    return with_copy(world, "n4")


def duty_for_the_retired(world: World) -> Topology:
    world.topology = replace(world.topology, retired=(world.member("n4"),))
    return with_copy(world, "n4")


def duty_for_the_wrong_stage(world: World) -> Topology:
    return with_copy(world, "n5")


def with_copy(world: World, node: str) -> Topology:
    copies = (world.member("n2"), world.member(node))
    return successor(world.topology, with_stage(world.topology.pipelines[0], 0, replicas=copies))


def displaced(world: World) -> Topology:
    p0 = with_stage(world.topology.pipelines[0], 0, ranks=(world.member("n4"),))
    return successor(world.topology, p0)


def emptied(world: World) -> Topology:
    return successor(world.topology, with_stage(world.topology.pipelines[0], 0, ranks=()))


def switched_to(world: World, node: str = "n4", told: bool = True) -> Topology:
    """The destination of the move of p0/0, n4, has a copy that is near; `node` takes over."""
    world.topology = with_move(world)
    counter = world.topology.counter + 1
    p0 = replace(world.topology.pipelines[0], move=None, moved=counter if told else 0)
    return successor(world.topology, with_stage(p0, 0, ranks=(world.member(node),)))


def switched_too_early(world: World) -> Topology:
    after = switched_to(world)
    world.lag = 2 * 16 * world.running + 1
    return after


def switched_without_a_copy(world: World) -> Topology:
    after = switched_to(world)
    world.silent = True
    return after


def switched_to_another(world: World) -> Topology:
    return switched_to(world, "n2")


def switched_unsaid(world: World) -> Topology:
    return switched_to(world, told=False)


def death_told_as_a_move(world: World) -> Topology:
    after = switched_to(world)
    world.kill("n0")
    return after


def last_copy(world: World) -> Topology:
    return successor(world.topology, with_stage(world.topology.pipelines[0], 0, replicas=()))


def with_move(
    world: World, node: str = "n4", pipeline: int = 0, phase: MovePhase = MovePhase.COPY
) -> Topology:
    move = Move(0, world.member(node), "hand-back", phase)
    return successor(world.topology, replace(world.topology.pipelines[pipeline], move=move))


def move_to_itself(world: World) -> Topology:
    return with_move(world, "n0")


def move_in_stop_restart(world: World) -> Topology:
    world.topology = replace(world.topology, mode=Mode.STOP_RESTART)
    return with_move(world)


def too_many_moves(world: World) -> Topology:
    world.__init__(make_config(3, 1, spares=1))  # type: ignore[misc]
    world.settle()
    for k in (0, 1):
        world.topology = with_move(world, "n3", k)
    return with_move(world, "n3", 2)


def begins_quiesced(world: World) -> Topology:
    return with_move(world, phase=MovePhase.QUIESCE)


def becomes_quiesced(world: World) -> Topology:
    world.topology = with_move(world)
    return with_move(world, phase=MovePhase.QUIESCE)


def goes_elsewhere(world: World) -> Topology:
    world.topology = with_move(world)
    return with_move(world, "n2")


def retired_serves(world: World) -> Topology:
    return successor(world.topology, retired=(world.member("n0"),))


def two_processes(world: World) -> Topology:
    """The detector has not made up its mind about the older one: no view names either."""
    p0 = with_stage(world.topology.pipelines[0], 0, replicas=(Member("n9", "a"),))
    p1 = with_stage(world.topology.pipelines[1], 0, replicas=(Member("n9", "b"),))
    return successor(world.topology, p0, p1)


CASES: list[tuple[str, Breaker]] = [
    ("counter_grows_by_one", counter),
    ("pipelines_stay", pipelines),
    ("pipelines_stay", ranks),
    ("pipelines_stay", gone),
    ("pipelines_stay", added_and_served),
    ("the_closed_are_idle", closed_too_early),
    ("epoch_follows_ranks", epoch),
    ("epoch_follows_ranks", stale_epoch),
    ("no_node_twice_in_a_pipeline", twice),
    ("copies_are_elsewhere", copy_at_home),
    ("copies_are_elsewhere", three_copies),
    ("new_duty_only_for_the_able", duty_for_the_suspected),
    ("new_duty_only_for_the_able", duty_for_the_cordoned),
    ("new_duty_only_for_the_able", duty_for_the_retired),
    ("new_duty_only_for_the_able", duty_for_the_wrong_stage),
    ("the_living_are_not_displaced", displaced),
    ("the_living_are_not_displaced", emptied),
    ("the_living_are_not_displaced", switched_too_early),
    ("the_living_are_not_displaced", switched_without_a_copy),
    ("the_living_are_not_displaced", switched_to_another),
    ("increase_before_decrease", last_copy),
    ("moves_are_sane", move_to_itself),
    ("moves_are_sane", move_in_stop_restart),
    ("moves_are_sane", too_many_moves),
    ("moves_stay_what_they_are", begins_quiesced),
    ("moves_stay_what_they_are", becomes_quiesced),
    ("moves_stay_what_they_are", goes_elsewhere),
    ("moves_are_told", switched_unsaid),
    ("moves_are_told", death_told_as_a_move),
    ("retired_serve_nothing", retired_serves),
    ("one_process_a_node", two_processes),
]


@pytest.mark.parametrize(("name", "breaker"), CASES, ids=[f"{n}-{b.__name__}" for n, b in CASES])
def test_a_broken_step_is_refused_by_name(name: str, breaker: Breaker) -> None:
    world = formed()
    after = breaker(world)
    assert name in {problem.partition(":")[0] for problem in broken(world.situation(), after)}
    with pytest.raises(InvariantViolation):
        check(world.situation(), after)


def test_every_invariant_has_a_case_that_breaks_it() -> None:
    assert {name for name, _ in CASES} == set(INVARIANTS)


def test_a_step_that_changes_nothing_is_fine() -> None:
    world = formed()
    check(world.situation(), successor(world.topology))


def test_a_switch_to_a_copy_that_is_near_is_fine() -> None:
    world = formed()
    after = switched_to(world)
    check(world.situation(), after)


def test_a_move_that_older_code_has_quiesced_may_copy_again() -> None:
    world = formed()
    world.topology = with_move(world, phase=MovePhase.QUIESCE)
    check(world.situation(), with_move(world))
