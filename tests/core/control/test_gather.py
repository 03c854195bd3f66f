"""Borrowed stages move to where they slow the fewest pipelines down."""

from __future__ import annotations

import pytest

from controlplane.contract.topology import MovePhase
from controlplane.core.gather import gather, slowed
from controlplane.core.policy import GATHER
from tests.core.control.world import LIMITS, World, make_config


def degraded(instances: int, *victims: str, spares: int = 0) -> World:
    """Instances of three stages, node n(3i + s) for stage s of p(i); the victims are dead and nobody is calm yet."""
    world = World(make_config(instances, 3, spares))
    world.settle()
    world.kill(*victims)
    while world.step() is not None:
        pass
    return world


def borrowed(world: World) -> dict[str, str]:
    homes = {f"p{k // 3}/{k % 3}": f"n{k}" for k in range(3 * world.config.instances)}
    return {place: node for place, node in world.serving().items() if node != homes[place]}


def test_two_failures_in_two_instances_share_with_each_other() -> None:
    world = degraded(4, "n1", "n5")  # stage 1 of p0, stage 2 of p1
    assert borrowed(world) == {"p0/1": "n4", "p1/2": "n8"}  # as the ring had their copies
    assert slowed(world.topology) == 3
    assert list(gather(world.situation())) == []  # not before it is calm
    world.now += LIMITS.gather_s
    (want,) = gather(world.situation())
    assert (want.pipeline, want.stage, want.to, want.reason) == ("p1", 2, ("n2",), GATHER)
    world.settle()
    assert borrowed(world) == {"p0/1": "n4", "p1/2": "n2"}
    assert slowed(world.topology) == 2
    for node in ("n1", "n5"):
        world.start(node)
    world.settle()
    assert world.all_home()


@pytest.mark.parametrize(
    ("instances", "victims"),
    [(1, ("n1",)), (2, ("n1",)), (2, ("n1", "n5")), (3, ("n1",))],
)
def test_nothing_moves_where_nothing_is_gained(instances: int, victims: tuple[str, ...]) -> None:
    world = degraded(instances, *victims)
    was = world.serving()
    world.settle()
    assert world.serving() == was
    assert world.next() is None


def test_the_same_stage_of_two_instances() -> None:
    """Its other two nodes take one more each; whose they are cannot be changed."""
    world = degraded(4, "n1", "n4")
    world.settle()
    assert sorted(borrowed(world).values()) == ["n10", "n7"]
    assert slowed(world.topology) == 4
    assert world.next() is None


def test_pairs_that_are_apart_come_together_and_moving_ends() -> None:
    world = degraded(4, "n1", "n8")  # p0 shares with p1, p2 with p3
    assert slowed(world.topology) == 4
    world.settle()
    assert slowed(world.topology) == 2
    assert world.next() is None


def test_one_moves_at_a_time_and_a_home_that_is_back_comes_first() -> None:
    world = degraded(4, "n1", "n8")
    world.now += LIMITS.gather_s
    world.lag = 10_000
    while world.step() is not None:
        pass
    moves = [p.move for p in world.topology.pipelines if p.move is not None]
    assert [(move.reason, move.phase) for move in moves] == [(GATHER, MovePhase.COPY)]
    world.start("n1")
    world.start("n8")
    world.lag = 0
    world.settle()
    assert world.all_home()


def test_a_spare_that_does_nothing_is_the_best_place() -> None:
    world = degraded(2, "n1", spares=1)
    assert borrowed(world) == {"p0/1": "n4"}
    world.settle()
    assert borrowed(world) == {"p0/1": "n7"}
    assert slowed(world.topology) == 0
