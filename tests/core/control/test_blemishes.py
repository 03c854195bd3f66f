"""What is wrong with one pipeline, or one operation, costs the others nothing and ends nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from controlplane.contract.events import EventKind
from controlplane.contract.hosting import Wanted, wanted_here
from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationKind, ProcessKind, Target
from controlplane.contract.requests import Sampling
from controlplane.contract.status import PipelineState
from controlplane.contract.topology import Move, Pipeline, Topology
from controlplane.core.closing import moved_away
from controlplane.core.edit import successor, with_stage
from controlplane.core.invariants import blemishes, broken
from controlplane.core.kinds.restart import _protected
from controlplane.core.plan import propose
from controlplane.kfadmin.client import Unreachable
from controlplane.kfadmin.demo import _busiest_node
from controlplane.kfadmin.pod.autoscale import pods_of
from tests.core.control.sim import Sim, formed
from tests.core.control.world import World, make_config
from web.gateway.routing.events import Fail, StreamUp, SubmitAsked, Tick, TopologySeen
from web.gateway.routing.policy import Policy
from web.gateway.routing.router import Router

Spoil = Callable[[Sim, Pipeline], Pipeline]


def copy_at_home(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 0, replicas=(sim.nodes["n0"].member, sim.nodes["n1"].member))


def three_copies(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 1, replicas=tuple(Member(f"x{k}", "i") for k in range(3)))


def node_twice(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 1, ranks=(sim.nodes["n0"].member,))


def too_many_ranks(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 0, ranks=(sim.nodes["n0"].member, Member("x1", "i")))


def no_homes(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 2, homes=(), ranks=(), replicas=())


def too_few_stages(sim: Sim, p: Pipeline) -> Pipeline:
    return replace(p, stages=p.stages[:2])


def no_stages(sim: Sim, p: Pipeline) -> Pipeline:
    return replace(p, stages=())


def a_home_of_no_name(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 0, homes=("../x",), ranks=(), replicas=())


def a_home_with_too_long_a_number(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 0, homes=("n" + "9" * 5000,), ranks=(), replicas=())


def move_of_no_stage(sim: Sim, p: Pipeline) -> Pipeline:
    return replace(p, move=Move(9, sim.nodes["n4"].member, "hand-back"))


def move_to_itself(sim: Sim, p: Pipeline) -> Pipeline:
    return replace(p, move=Move(1, sim.nodes["n1"].member, "by hand"))


def another_process(sim: Sim, p: Pipeline) -> Pipeline:
    return with_stage(p, 3, replicas=(Member("n7", "never"),))


def epoch_of_the_future(sim: Sim, p: Pipeline) -> Pipeline:
    return replace(p, epoch=10_000)


SPOILS = [
    copy_at_home,
    three_copies,
    node_twice,
    too_many_ranks,
    no_homes,
    too_few_stages,
    no_stages,
    a_home_of_no_name,
    a_home_with_too_long_a_number,
    move_of_no_stage,
    move_to_itself,
    another_process,
    epoch_of_the_future,
]


@pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__ for spoil in SPOILS])
@pytest.mark.parametrize("victim", ["n5", "n4"])
def test_a_blemish_in_p0_costs_p1_nothing(spoil: Spoil, victim: str) -> None:
    sim = formed(3, 4, controllers=1)
    assert sim.topology is not None
    p0, *others = sim.topology.pipelines
    bad = replace(sim.topology, counter=sim.topology.counter + 1, pipelines=(spoil(sim, p0), *others))
    sim.put_topology(bad)
    sim.kill(victim)
    assert victim not in sim.serving("p1")
    assert "-" not in sim.serving("p1")
    home = lambda: sim.serving("p1") == ["n4", "n5", "n6", "n7"]  # noqa: E731
    sim.run_until(home, limit_s=20)
    written = len(sim.written)
    sim.run(10)
    assert len(sim.written) - written < 20, "it does not write for ever"
    told = [event.message for event in sim.history if event.kind is EventKind.BLEMISH]
    assert len(told) == len(set(told)) < 10, "each once"


@pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__ for spoil in SPOILS])
def test_a_blemish_in_p0_ends_no_status_and_no_gateway(spoil: Spoil) -> None:
    sim = formed(3, 4, controllers=1)
    good, core = sim.topology, sim.cores["c1"]
    assert good is not None
    router = Router(Policy())
    for event in (TopologySeen(good), *(StreamUp(p.stages[0].ranks[0]) for p in good.pipelines)):
        router.step(event, sim.now)
    for rid in range(3):
        router.step(SubmitAsked(rid, (1, 2), Sampling(4, seed=1)), sim.now)
    core.status(sim.now)
    p0 = spoil(sim, good.pipelines[0])
    bad = replace(good, counter=good.counter + 1, pipelines=(p0, *good.pipelines[1:]), paused=True)
    sim.put_topology(bad)
    assert core.status(sim.now).pipelines[1].state is PipelineState.UP
    router.step(TopologySeen(bad), sim.now)
    effects = router.step(Tick(), sim.now + 1.0)
    router.step(SubmitAsked(9, (1, 2), Sampling(4, seed=1)), sim.now + 1.0)
    assert not [effect for effect in effects if isinstance(effect, Fail)], "its requests go to the others"
    assert router.reachable >= 2
    down = [line for line in router.troubles(sim.now + 1.0) if line.startswith("p0 is down")]
    assert len(down) == (0 if p0.up else 1)


@pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__ for spoil in SPOILS])
def test_of_whatever_a_topology_says_launchers_start_nodes_alone(spoil: Spoil) -> None:
    sim = formed(3, 4, controllers=1)
    assert sim.topology is not None
    p0, *others = sim.topology.pipelines
    bad = replace(sim.topology, pipelines=(spoil(sim, p0), *others), leaving=("n11", "", "../y", "nx"))
    assert wanted_here(bad, sim.config) == Wanted(tuple(f"n{number}" for number in range(12)), ())


def test_a_move_of_no_stage_moves_nobody_away() -> None:
    sim = formed(3, 4, controllers=1)
    assert sim.topology is not None
    p0, *others = sim.topology.pipelines
    assert not moved_away(
        replace(sim.topology, pipelines=(move_of_no_stage(sim, p0), *others), leaving=("n0",))
    )


def test_a_pipeline_without_stages_is_down_and_named() -> None:
    sim = formed(2, 4, controllers=1)
    assert sim.topology is not None
    p0, p1 = sim.topology.pipelines
    bad = replace(sim.topology, counter=sim.topology.counter + 1, pipelines=(no_stages(sim, p0), p1))
    assert (bad.pipelines[0].up, bad.pipelines[0].scheduler) == (False, None)
    assert [bad.pipelines[0].leader_at(0), p0.leader_at(-1), p0.leader_at(4)] == [None] * 3
    sim.put_topology(bad)
    status = sim.cores["c1"].status(sim.now)
    assert [p.state for p in status.pipelines] == [PipelineState.DOWN, PipelineState.UP]
    assert status.blemishes == ("pipelines_stay: p0: 0 stages",)
    assert pods_of(status, 1, 0) == 2
    alone = replace(status, pipelines=status.pipelines[:1])
    assert pods_of(alone, 1, 0) == 1
    with pytest.raises(Unreachable):
        _busiest_node(alone)


def test_a_pipeline_that_lacks_a_stage_does_not_hold_up_the_restart_of_others() -> None:
    world = formed_world()
    assert _protected(world.situation(), 1)
    p0, *others = world.topology.pipelines
    world.topology = replace(world.topology, pipelines=(replace(p0, stages=p0.stages[:1]), *others))
    assert _protected(world.situation(), 1)


def test_a_blemish_is_told_once_and_shown_for_as_long_as_it_is_there() -> None:
    sim = formed(2, 4, controllers=2)
    assert sim.topology is not None
    p0, p1 = sim.topology.pipelines
    counter = sim.topology.counter + 1
    bad = replace(sim.topology, counter=counter, pipelines=(too_many_ranks(sim, p0), p1), paused=True)
    sim.put_topology(bad)
    sim.run(5)
    told = [event for event in sim.history if event.kind is EventKind.BLEMISH]
    assert [(event.subject, event.message) for event in told] == [
        ("p0", "pipelines_stay: p0/0: 2 ranks of 1"),
    ]
    for core in sim.cores.values():
        assert core.status(sim.now).blemishes == ("pipelines_stay: p0/0: 2 ranks of 1",)
    sim.put_topology(replace(bad, counter=bad.counter + 1, pipelines=(p0, p1), paused=False))
    sim.run(1)
    assert not sim.cores["c2"].status(sim.now).blemishes


def test_an_operation_whose_values_make_no_sense_does_not_stop_the_others() -> None:
    sim = formed(2, 4, controllers=1)
    target = Target(ProcessKind.NODE, Member("n0", "x"))
    sim.put_operation(Operation("odd", OperationKind.RESTART, "nodes", targets=(target,), turn=-9))
    assert sim.submit("drain", "n6", id="fine").accepted
    sim.run_until(lambda: not sim.operations["fine"][0].open, limit_s=30)
    sim.kill("n1")
    assert "n5" in sim.serving("p0")


def formed_world() -> World:
    world = World(make_config(3, 2))
    world.settle()
    return world


def spoilt(world: World, *copies: str) -> Topology:
    """p0/0 with copies on these nodes."""
    p0 = with_stage(world.topology.pipelines[0], 0, replicas=tuple(map(world.member, copies)))
    return replace(world.topology, pipelines=(p0, *world.topology.pipelines[1:]))


def test_a_step_answers_for_what_it_breaks_alone() -> None:
    world = formed_world()
    world.topology = spoilt(world, "n0", "n0", "n2")
    before = blemishes(world.situation())
    assert len(before) == 3  # twice on one node, on the serving node, three in all
    p0, p1, _ = world.topology.pipelines
    assert not broken(world.situation(), successor(world.topology, replace(p1, move=None)))
    mended_in_part = successor(
        world.topology, with_stage(p0, 0, replicas=(world.member("n0"), world.member("n2")))
    )
    assert not broken(world.situation(), mended_in_part)
    same_elsewhere = successor(world.topology, with_stage(p1, 0, replicas=(world.member("n2"),)))
    assert broken(world.situation(), same_elsewhere)
    worse = successor(
        world.topology, with_stage(p0, 0, replicas=tuple(map(world.member, ("n0", "n0", "n0", "n2"))))
    )
    assert broken(world.situation(), worse)


def test_a_pipeline_that_a_rule_cannot_help_is_set_aside_and_named() -> None:
    world = formed_world()
    p0, p1, p2 = world.topology.pipelines
    nowhere = with_stage(p0, 1, homes=(), ranks=(), replicas=())
    world.topology = replace(world.topology, pipelines=(nowhere, with_stage(p1, 0, ranks=()), p2))
    while not world.topology.pipelines[1].up:  # copies of p0 may move before
        proposal = propose(world.situation())
        assert proposal.transition is not None
        assert proposal.transition.topology.counter < 20
        world.topology = proposal.transition.topology
    while not proposal.refused and proposal.transition is not None:  # named once the others' steps are taken
        assert proposal.transition.topology.counter < 20
        world.topology = proposal.transition.topology
        proposal = propose(world.situation())
    assert proposal.refused == ("fill: p0: a step that changes nothing",)
