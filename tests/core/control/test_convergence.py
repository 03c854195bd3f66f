"""Interrupted after any step, whoever survives, planning again from what is written converges."""

from __future__ import annotations

import copy
from itertools import product

import pytest

from controlplane.contract.topology import Mode
from tests.core.control.world import World, make_config

SHAPES = [(2, 2), (2, 4), (3, 3)]


def prefixes(instances: int, stages: int) -> list[World]:
    """Worlds after every step of a life: forming, a death, the return, and the hand-back."""
    world = World(make_config(instances, stages))
    found = [copy.deepcopy(world)]

    def live(waits: int) -> None:
        while waits:
            if world.step() is None:
                world.now += 16.0
                waits -= 1
            found.append(copy.deepcopy(world))

    live(2)
    world.kill("n1")
    live(2)
    world.start("n1")
    live(2)
    assert world.all_home()
    unique = {w.topology: w for w in found}
    return list(unique.values())


def survivors(instances: int, stages: int) -> list[frozenset[str]]:
    """Every set of dead nodes; stages other than the victim's are alike, so each mix of them is tried once."""
    columns = list(product((False, True), repeat=instances))
    subsets = set()
    for choice in product(range(len(columns)), repeat=stages):
        others = [c for s, c in enumerate(choice) if s != 1]
        if others != sorted(others):
            continue
        subsets.add(
            frozenset(
                f"n{i * stages + s}" for s, c in enumerate(choice) for i in range(instances) if columns[c][i]
            )
        )
    return sorted(subsets, key=sorted)


@pytest.mark.parametrize(("instances", "stages"), SHAPES)
def test_every_prefix_against_every_subset_of_survivors(instances: int, stages: int) -> None:
    deaths = survivors(instances, stages)
    assert len(deaths) >= 10
    cases = 0
    # The largest shape tries the return of the dead for every third pair only: it takes most of the time.
    stride = 3 if instances * stages > 8 else 1
    for number, start in enumerate(prefixes(instances, stages)):
        for turn, dead in enumerate(deaths, start=number):
            world = copy.copy(start)
            world.records, world.alive = dict(start.records), set(start.alive)
            world.timers, world.history = copy.deepcopy(start.timers), []
            world.kill(*dead)
            world.settle(limit=12 * instances * stages)
            left = [[n for n in world.alive if int(n[1:]) % stages == s] for s in range(stages)]
            for pipeline in world.topology.pipelines:
                assert pipeline.up is all(left), (dead, world.serving())
                assert {m.node for m in pipeline.members()} <= world.alive
            cases += 1
            if turn % stride:
                continue
            for node in world.all_nodes:
                if node not in world.alive:
                    world.start(node)
            world.settle(limit=12 * instances * stages)
            assert world.all_home(), (dead, world.serving(), world.copies())
    assert cases >= 8 * len(deaths)


@pytest.mark.parametrize("mode", [Mode.NONE, Mode.STOP_RESTART])
def test_the_other_modes_converge_too(mode: Mode) -> None:
    for dead in survivors(2, 2):
        world = World(make_config(2, 2, mode=mode))
        world.settle()
        assert world.all_home()
        world.kill(*dead)
        world.settle()
        for node in [n for n in world.all_nodes if n not in world.alive]:
            world.start(node)
        for member in world.topology.retired:  # they exit, and are started afresh
            world.start(member.node)
        world.settle()
        assert world.all_home(), (mode, dead, world.serving())
        assert world.topology.retired == ()
