"""Nodes with equal weights and other numerics: they serve for each other, and KV of one never goes to the other."""

from __future__ import annotations

import pytest

from controlplane.contract.records import Operation, OperationKind, OperationState, ProcessKind, Target
from controlplane.contract.status import OperationRequest
from controlplane.contract.topology import Mode
from controlplane.core.edit import successor, with_stage
from controlplane.core.invariants import INVARIANTS
from controlplane.core.preflight import preflight
from tests.core.control.world import World, make_config

FAR = 1 << 30  # tokens that a copy lacks which will never come


def world(
    instances: int = 2, stages: int = 2, new: tuple[str, ...] = (), mode: Mode = Mode.REPLICATE
) -> World:
    made = World(make_config(instances, stages, mode=mode))
    for node in made.all_nodes:
        made.start(node, numerics="new" if node in new else "old")
    made.settle()
    return made


def numerics(made: World, node: str) -> str:
    return made.records[node].numerics


def assert_no_exchange(made: World) -> None:
    """No copy is on a node whose numerics are not those of who serves."""
    for name, holders in made.copies().items():
        server = made.serving()[name]
        for holder in holders if server != "-" else ():
            assert numerics(made, holder) == numerics(made, server), (name, server, holder)


def test_copies_go_to_equal_numerics_only() -> None:
    made = world(3, 2, new=("n3",))
    assert_no_exchange(made)
    assert made.copies() == {
        "p0/0": ["n2"], "p1/0": ["n4"], "p2/0": ["n0"],
        "p0/1": ["n5"], "p1/1": [], "p2/1": ["n1"],
    }  # fmt: skip


def test_a_node_of_other_numerics_serves_for_a_dead_one_and_gets_no_old_copies() -> None:
    made = world(2, 2, new=("n3",))
    made.kill("n1")
    made.settle()
    assert made.serving()["p0/1"] == "n3"
    assert_no_exchange(made)


def test_who_takes_over_with_other_numerics_drops_the_copies_of_before() -> None:
    """p0/1 is served by n1, its copy is on n5, both old; n1 and n5 die one after the other, and n3 is new."""
    made = world(3, 2, new=("n3",))
    made.kill("n1")
    made.settle()
    assert made.serving()["p0/1"] == "n5", "who has the copy goes first"
    assert made.copies()["p0/1"] == []
    made.kill("n5")
    made.settle()
    assert made.serving()["p0/1"] == made.serving()["p2/1"] == "n3"
    assert_no_exchange(made)


def test_it_is_handed_back_without_waiting_for_copies() -> None:
    made = world()
    made.kill("n1")
    made.settle()
    made.lag = FAR
    made.start("n1", numerics="old")
    made.settle()
    assert made.serving()["p0/1"] == "n3", "the test's copies catch up, or nobody looks at them"
    made.kill("n1")
    made.settle()
    made.start("n1", numerics="new")
    made.settle()
    assert made.serving()["p0/1"] == "n1"
    assert_no_exchange(made)


@pytest.mark.parametrize("mode", [Mode.REPLICATE, Mode.NONE])
@pytest.mark.parametrize(("instances", "stages"), [(2, 2), (3, 2), (2, 4)])
def test_a_rolling_restart_changes_numerics(instances: int, stages: int, mode: Mode) -> None:
    """It comes to its end, nobody's KV goes to others on the way, and in the end everybody is protected again."""
    made = world(instances, stages, mode=mode)
    targets = tuple(Target(ProcessKind.NODE, made.member(node)) for node in made.all_nodes)
    made.operations["op"] = Operation("op", OperationKind.RESTART, "nodes", targets=targets)
    epochs = 0
    for _ in range(4000):
        for member in made.topology.retired:
            if made.member(member.node) == member:
                made.start(member.node, numerics="new")
        epochs += made.step() is not None
        made.now += 0.5
        assert_no_exchange(made)
        if made.operations["op"].state is not OperationState.RUNNING:
            break
    assert made.operations["op"].state is OperationState.DONE, made.history[-10:]
    made.settle()
    assert made.all_home()
    assert {numerics(made, node) for node in made.all_nodes} == {"new"}


def test_the_last_copy_may_go_if_it_is_of_other_numerics() -> None:
    """And only then."""
    made = world(3, 2, new=("n3",))
    assert made.copies()["p0/1"] == ["n5"]
    situation, pipeline = made.situation(), made.topology.pipelines[0]
    invariant = INVARIANTS["increase_before_decrease"]
    bare = successor(made.topology, with_stage(pipeline, 1, replicas=()))
    assert list(invariant(situation, bare)) == ["p0/1: its last copy is dropped"]
    taken = successor(made.topology, with_stage(pipeline, 1, ranks=(made.member("n3"),), replicas=()))
    assert list(invariant(situation, taken)) == []


def test_a_check_says_that_streams_are_computed_again() -> None:
    made = world(2, 2, new=("n3",))
    request = OperationRequest("dry", "drain", "n1", None, dry_run=True)
    answer = preflight(request, made.situation(), {}, 0.0)
    said = [check for check in answer.checks if check.name == "replicas"]
    assert [(check.level, "other numerics" in check.message) for check in said] == [("warn", True)]
