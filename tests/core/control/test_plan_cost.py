"""What each rule, each pre-flight, and what an operation under way asks again and again cost as the group grows:
counted in function calls, for each node, while something happens to many of them at once."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache, partial

import pytest
from msgspec.structs import replace

from controlplane.contract.records import Operation, OperationKind, ProcessKind, Target
from controlplane.contract.status import OperationRequest
from controlplane.contract.topology import Mode
from controlplane.core.operations import progress
from controlplane.core.plan import RULES, propose
from controlplane.core.policy import Situation
from controlplane.core.preflight import preflight
from controlplane.core.wants import wants
from tests.core.control.world import World, make_config
from tests.core.counting import calls

STAGES = 4
SMALL, LARGE = 256, 1024
GROWTH = 1.5  # of what one node costs: sorting, and what is too little to count for a small group


@cache
def _formed(nodes: int, mode: Mode, zones: int) -> World:
    instances = nodes // STAGES
    world = World(make_config(instances, STAGES, mode=mode))
    for node in world.all_nodes:
        number = int(node[1:])
        zone = number // STAGES * zones // instances
        world.start(node, domain={"zone": f"z{zone}", "host": f"h{number // 8}", "node": node})
    world.settle()
    return world


def formed(nodes: int, mode: Mode = Mode.REPLICATE, zones: int = 1) -> World:
    """A group that serves at home, all of whose copies are where they should be. A zone is a part of the ring."""
    world = copy.copy(_formed(nodes, mode, zones))
    world.alive, world.demoted, world.timers = set(world.alive), set(), copy.copy(world.timers)
    world.operations, world.history = {}, []
    return world


def scaling(nodes: int) -> World:
    """Half of the instances go."""
    world = formed(nodes)
    instances = nodes // STAGES // 2
    world.operations["op"] = Operation("op", OperationKind.SCALE, created_unix_s=1.0, instances=instances)
    assert world.step() == "operate"
    return world


def one_has_moved(nodes: int) -> World:
    world = scaling(nodes)
    assert world.step() == "start_move"
    return world


def restarting(nodes: int) -> World:
    world = formed(nodes)
    targets = tuple(Target(ProcessKind.NODE, world.member(node)) for node in world.all_nodes)
    turn = nodes // 2
    world.operations["op"] = Operation("op", OperationKind.RESTART, "nodes", targets=targets, turn=turn)
    return world


def back_in_place(nodes: int) -> World:
    """All nodes are restarted, and the one whose turn it was serves again: what remains is to look at every copy."""
    world = restarting(nodes)
    op = world.operations["op"]
    before = Target(ProcessKind.NODE, replace(op.targets[op.turn].member, incarnation="before"))
    targets = (*op.targets[: op.turn], before, *op.targets[op.turn + 1 :])
    world.operations["op"] = replace(op, targets=targets)
    return world


def cordoned(nodes: int) -> World:
    world = formed(nodes, zones=2)
    world.topology = replace(world.topology, cordoned=tuple(world.all_nodes))
    return world


def on_probation(nodes: int, every: int) -> World:
    world = formed(nodes, zones=2)
    world.demoted = set(world.all_nodes[every - 1 :: every])
    return world


def dying(nodes: int, mode: Mode, zones: int = 1) -> World:
    """The first half of the instances: with two zones, one of them."""
    world = formed(nodes, mode, zones)
    world.kill(*world.all_nodes[: nodes // 2])
    return world


def bereft(nodes: int) -> World:
    """A zone has died and its stages are borrowed, for as long as anybody would wait for it."""
    world = dying(nodes, Mode.REPLICATE, 2)
    world.settle()
    return world


def scattered(nodes: int) -> World:
    """Three nodes of ten have died, here and there."""
    world = formed(nodes, zones=2)
    world.kill(*random.Random(1).sample(world.all_nodes, nodes * 3 // 10))
    world.step()
    world.now += 60.0
    return world


def two_kinds(nodes: int) -> World:
    """Half of each zone cannot exchange KV with the other half."""
    world = formed(nodes, zones=2)
    numerics = {node: str(int(node[1:]) // STAGES % 4 // 2) for node in world.all_nodes}
    world.records = {n: replace(record, numerics=numerics[n]) for n, record in world.records.items()}
    return world


SITUATIONS: dict[str, Callable[[int], World]] = {
    "calm": formed,
    "calm, in two zones": partial(formed, zones=2),
    "calm, in seven zones": partial(formed, zones=7),
    "half of the instances leave": scaling,
    "half of the instances leave, and a stage moves": one_has_moved,
    "all nodes are restarted": restarting,
    "all nodes are cordoned": cordoned,
    "one node of twenty is on probation": partial(on_probation, every=20),
    "all nodes are on probation": partial(on_probation, every=1),
    "half of the instances die": partial(dying, mode=Mode.REPLICATE),
    "half of the instances die, mode none": partial(dying, mode=Mode.NONE),
    "half of the instances die, mode load-aware": partial(dying, mode=Mode.LOAD_AWARE),
    "a zone dies": partial(dying, mode=Mode.REPLICATE, zones=2),
    "a zone is dead": bereft,
    "three nodes of ten are dead": scattered,
    "nodes of two kinds": two_kinds,
}


def grows(body: Callable[[Situation], object], worlds: dict[int, World]) -> float:
    """Times as much for a node of the large group as for one of the small."""
    each = {}
    for nodes, world in worlds.items():
        situation = world.situation()
        each[nodes] = max(calls(lambda: body(situation)), nodes) / nodes  # noqa: B023
    return each[LARGE] / each[SMALL]


@pytest.mark.parametrize("name", SITUATIONS)
def test_no_rule_looks_at_all_nodes_for_each(name: str) -> None:
    worlds = {nodes: SITUATIONS[name](nodes) for nodes in (SMALL, LARGE)}
    bodies: dict[str, Callable[[Situation], object]] = {rule.__name__: rule for rule in RULES}
    bodies |= {"propose": propose, "wants": lambda s: list(wants(s))}
    growth = {name: grows(body, worlds) for name, body in bodies.items()}
    assert {name: g for name, g in growth.items() if g > GROWTH} == {}


REQUESTS: dict[str, Callable[[int], OperationRequest]] = {
    "restart of all nodes": lambda nodes: OperationRequest("op", "restart", "nodes"),
    "restart of all processes": lambda nodes: OperationRequest("op", "restart", "all"),
    "half of the instances": lambda nodes: OperationRequest("op", "scale", instances=nodes // STAGES // 2),
    "twice the instances": lambda nodes: OperationRequest("op", "scale", instances=nodes // STAGES * 2),
    "drain": lambda nodes: OperationRequest("op", "drain", "n9"),
    "replace": lambda nodes: OperationRequest("op", "replace", "n9"),
    "cordon": lambda nodes: OperationRequest("op", "cordon", "n9"),
    "pause": lambda nodes: OperationRequest("op", "pause"),
}


@pytest.mark.parametrize("cordoned", [False, True])
@pytest.mark.parametrize("name", REQUESTS)
def test_no_preflight_looks_at_all_nodes_for_each(name: str, cordoned: bool) -> None:
    """Also where nobody can take anything over, and everybody is asked in vain."""
    worlds = {nodes: formed(nodes) for nodes in (SMALL, LARGE)}
    for world in worlds.values():
        world.topology = replace(world.topology, cordoned=tuple(world.all_nodes) if cordoned else ())

    def ask(s: Situation) -> None:
        preflight(REQUESTS[name](len(s.nodes.views)), s, {}, 1.0)

    assert grows(ask, worlds) < GROWTH


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("make", [scaling, restarting, back_in_place])
def test_how_far_an_operation_is_costs_the_same_for_a_node(
    make: Callable[[int], World], silent: bool
) -> None:
    """It is asked five times a second. Silent: of no copy is anything known."""
    worlds = {nodes: make(nodes) for nodes in (SMALL, LARGE)}
    for world in worlds.values():
        world.silent = silent
    assert grows(lambda s: progress(s, s.policy.operations["op"], 1.0), worlds) < GROWTH


def test_a_turn_is_over_when_all_copies_have_caught_up() -> None:
    """So that the cost of looking at them is in what is measured above."""
    world = back_in_place(SMALL)
    op = world.operations["op"]
    assert progress(world.situation(), op, 1.0).turn == op.turn + 1
    world.silent = True
    assert progress(world.situation(), op, 1.0).turn == op.turn
