"""Interrupted after any step, whoever survives, planning again from what is written converges."""

from __future__ import annotations

import copy
from itertools import combinations, product

import pytest
from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.records import Operation, OperationKind, OperationState, ProcessKind, Target
from controlplane.contract.topology import Mode, MovePhase
from controlplane.core.policy import Timers
from tests.core.control.world import LIMITS, World, make_config

SHAPES = [(2, 2), (2, 4), (3, 3)]


def prefixes(instances: int, stages: int) -> list[World]:
    """Worlds after every step of a life: forming, a death, the return, the hand-back, also as older code goes about it,
    and the death of its peer."""
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
    world.kill(f"n{stages + 1}")
    live(2)
    found += [quiesced(w) for w in found if any(p.move for p in w.topology.pipelines)]
    unique = {w.topology: w for w in found}
    return list(unique.values())


def quiesced(world: World) -> World:
    """The world with its moves in the phase in which older code stops a pipeline."""
    world = copy.deepcopy(world)
    topology = world.topology
    stopped = [p.move and replace(p.move, phase=MovePhase.QUIESCE) for p in topology.pipelines]
    pairs = zip(topology.pipelines, stopped, strict=True)
    pipelines = tuple(replace(p, move=move) for p, move in pairs)
    world.topology = replace(topology, counter=topology.counter + 1, pipelines=pipelines)
    return world


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


@pytest.mark.timeout(600)  # thousands of cases, behind everything else on a busy machine
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


# ---- operations: whatever was interrupted goes on, or goes back


def wishes(world: World) -> list[Operation]:
    """One operation of each kind that a topology can show the progress of."""
    n1 = world.member("n1").incarnation
    nodes = tuple(Target(ProcessKind.NODE, world.member(f"n{k}")) for k in range(4))
    return [
        Operation("op", OperationKind.DRAIN, "n1"),
        Operation("op", OperationKind.CORDON, "n1"),
        Operation("op", OperationKind.REPLACE, "n1", incarnation=n1),
        Operation("op", OperationKind.REPLACE, "n1", substitute="n5"),
        Operation("op", OperationKind.RESTART, "nodes", targets=nodes),
        Operation("op", OperationKind.PAUSE),
    ]


def operated(wish: Operation, config: ClusterConfig) -> list[World]:
    """Worlds after every step of an operation's life."""
    world = World(config)
    world.settle()
    world.operations["op"] = wish
    found = [copy.deepcopy(world)]
    for _ in range(400):
        before = (world.topology, world.operations["op"])
        if world.step() is None and (world.topology, world.operations["op"]) == before and not revive(world):
            world.now += 16.0
            if not world.operations["op"].open:
                return found
        found.append(copy.deepcopy(world))
    raise AssertionError(f"no end: {world.operations}, {world.history[-20:]}")


def revive(world: World) -> bool:
    """Retired processes exit, and their launcher starts fresh ones."""
    gone = [m.node for m in world.topology.retired if m == world.member(m.node) and m.node in world.alive]
    for node in gone:
        world.start(node)
    return bool(gone)


def settle(world: World) -> None:
    world.settle()
    while revive(world):
        world.settle()


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("cancelled", [False, True])
def test_every_prefix_of_an_operation_converges(which: int, cancelled: bool) -> None:
    config = make_config(2, 2, spares=1)
    base = World(config)
    base.settle()
    wish = wishes(base)[which]
    deaths = [frozenset(dead) for k in range(3) for dead in combinations(["n0", "n1", "n3", "n5"], k)]
    prefixes_ = operated(wish, config)
    assert len(prefixes_) >= 2
    for number, start in enumerate(prefixes_):
        dead = deaths[number % len(deaths)]
        for some in {frozenset(), dead, deaths[(7 * number + 3) % len(deaths)]}:
            world = copy.deepcopy(start)
            world.timers = Timers(LIMITS)  # a new leader knows only what is written
            world.timers.note(world.topology, world.now)
            world.kill(*some)
            if cancelled and world.operations["op"].open:
                world.operations["op"] = replace(world.operations["op"], state=OperationState.CANCELLED)
            settle(world)
            for node in sorted(some):
                world.start(node)
            settle(world)
            assert not world.operations["op"].open, (some, world.operations, world.serving())
            whole(world, (number, some, cancelled))


def whole(world: World, case: object) -> None:
    """After the cordons are lifted and automation is on again, everything serves at home."""
    if world.topology.paused:
        world.operations["on"] = Operation("on", OperationKind.RESUME, created_unix_s=5.0)
        settle(world)
    for node in world.topology.cordoned:
        world.operations[node] = Operation(node, OperationKind.UNDRAIN, node, created_unix_s=9.0)
    settle(world)
    assert all(not op.open for op in world.operations.values()), (case, world.operations)
    assert world.topology.cordoned == ()
    assert world.topology.retired == ()
    for pipeline in world.topology.pipelines:
        assert pipeline.move is None, case
        for stage in pipeline.stages:
            assert stage.ranks == tuple(world.member(home) for home in stage.homes), (case, world.serving())
            assert len(stage.replicas) == 1, (case, world.copies())
