"""Donors, the ring of copies, and its degraded rule."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.topology import Mode
from controlplane.core.edit import initial, successor, with_stage
from controlplane.core.placement import Layout, first_takers, is_target, replica_target, takers
from controlplane.core.plan import plan
from tests.core.control.world import LIMITS, World, make_config


def formed(instances: int, stages: int = 1, spares: int = 0, mode: Mode = Mode.REPLICATE) -> World:
    world = World(make_config(instances, stages, spares, mode))
    world.settle()
    return world


def copies(world: World) -> list[str]:
    return [",".join(nodes) for _, nodes in sorted(world.copies().items())]


def places(world: World) -> list[str]:
    return [node for _, node in sorted(world.serving().items())]


def test_a_ring_over_the_instances() -> None:
    assert copies(formed(4)) == ["n1", "n2", "n3", "n0"]
    assert copies(formed(2)) == ["n1", "n0"]
    assert copies(formed(1)) == [""]


def test_the_holder_of_the_copy_takes_over_and_leaves_the_ring() -> None:
    world = formed(4)
    world.kill("n1")
    world.step()
    assert places(world) == ["n0", "n2", "n2", "n3"]
    assert copies(world)[1] == "n3"
    world.settle()
    # n1 is dead and n2 a donor: n0 copies past them; the donor's own are protected too.
    assert copies(world) == ["n3", "n3", "n3", "n0"]


@pytest.mark.parametrize("instances", [2, 4])
def test_one_write_mends_a_pipeline_and_the_copies_that_were_with_its_dead_node(instances: int) -> None:
    """The second one reached every node while it was resuming requests."""
    world = formed(instances, stages=2)
    world.kill("n2")
    assert world.step() == "repair"
    assert "n2" not in {node for nodes in world.copies().values() for node in nodes}
    assert world.step() is None


def test_two_failures_of_four() -> None:
    world = formed(4)
    world.kill("n1", "n2")
    world.settle()
    # n1's copy was on n2, dead as well: the least loaded takes p1. n3 held p2's.
    assert sorted(places(world)) == ["n0", "n0", "n3", "n3"]
    assert places(world)[2] == "n3"
    # Only donors are left: the degraded rule points them to each other, and nobody to itself.
    assert copies(world) == ["n3", "n3", "n0", "n0"]


def test_two_failures_of_four_apart() -> None:
    world = formed(4)
    world.kill("n0", "n2")
    world.settle()
    assert places(world) == ["n1", "n1", "n3", "n3"]
    assert copies(world) == ["n3", "n3", "n1", "n1"]


def test_one_failure_of_two_leaves_nobody_to_copy_to() -> None:
    world = formed(2)
    world.kill("n0")
    world.settle()
    assert places(world) == ["n1", "n1"]
    assert copies(world) == ["", ""]


def test_a_spare_takes_copies_only_when_the_ring_is_empty() -> None:
    world = formed(2, spares=1)
    assert copies(world) == ["n1", "n0"]
    world.kill("n0")
    while world.step() is not None:
        pass
    assert (places(world), copies(world)) == (["n1", "n1"], ["n2", "n2"])
    world.settle()  # the spare has the copy; serving from there slows nobody
    assert (places(world), copies(world)) == (["n2", "n1"], ["n1", "n2"])


def test_a_suspected_target_keeps_its_copies_and_gets_no_new_ones() -> None:
    world = formed(4)
    world.yellow.add("n1")
    world.settle()
    assert copies(world) == ["n1", "n2", "n3", "n0"]
    world.yellow = {"n3"}
    world.kill("n2")
    world.step()
    assert places(world)[2] == "n1" or places(world)[2] == "n0"  # not n3, which holds the copy


def test_another_fault_domain_goes_before_the_order_of_the_ring() -> None:
    world = World(make_config(4, 1))
    for node, rack in (("n0", "a"), ("n1", "a"), ("n2", "b"), ("n3", "b")):
        world.start(node, domain={"site": "x", "rack": rack})
    world.settle()
    assert copies(world) == ["n2", "n2", "n0", "n0"]


def test_a_copy_leaves_its_domain_where_only_that_breaks_the_ring() -> None:
    world = World(make_config(4, 1))
    for node, rack in (("n0", "a"), ("n1", "a"), ("n2", "b"), ("n3", "a")):
        world.start(node, domain={"site": "x", "rack": rack, "node": node})
    world.settle()
    world.kill("n3")
    world.settle()
    assert places(world) == ["n0", "n1", "n2", "n2"]  # it had the copy, and leaves the ring
    assert copies(world)[:2] == ["n2", "n2"]


def test_the_widest_label_that_differs_counts_most() -> None:
    world = World(make_config(4, 1))
    for node, zone, rack in (("n0", "x", "1"), ("n1", "x", "1"), ("n2", "x", "2"), ("n3", "y", "3")):
        world.start(node, domain={"zone": zone, "rack": rack, "node": node})
    world.settle()
    assert copies(world) == ["n3", "n3", "n3", "n0"]
    world.kill("n3")
    world.settle()
    assert copies(world)[:3] == ["n2", "n2", "n1"]  # another rack of the same zone


@pytest.mark.parametrize("keep_kv", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_who_is_asked_for_one_after_the_other_comes_in_the_order_of_all(seed: int, keep_kv: bool) -> None:
    chosen = random.Random(seed)
    world = World(make_config(instances=6, stages=2, spares=2))
    for node in world.all_nodes:
        world.start(node, domain={"rack": chosen.choice("abc")})
    world.settle()
    world.kill(*chosen.sample(world.all_nodes, 3))
    world.step()
    world.demoted = set(chosen.sample(world.all_nodes, 4))
    world.lag = chosen.choice([0, 100])
    situation = world.situation()
    layout, found = Layout(situation.topology), 0
    for pipeline in situation.topology.pipelines:
        for stage in range(2):
            one_by_one = list(first_takers(situation, layout, pipeline, stage, keep_kv=keep_kv))
            assert one_by_one == takers(situation, pipeline, stage, keep_kv=keep_kv)
            found += len(one_by_one)
    assert found


def test_who_takes_over_without_a_copy_is_far_from_the_home() -> None:
    def killed(racks: dict[str, str]) -> str:
        world = World(make_config(4, 1, mode=Mode.NONE))
        for node, rack in racks.items():
            world.start(node, domain={"rack": rack, "node": node})
        world.settle()
        world.kill("n3")
        world.step()
        return places(world)[3]

    assert killed({"n0": "a", "n1": "b", "n2": "c", "n3": "d"}) == "n0"
    assert killed({"n0": "d", "n1": "d", "n2": "a", "n3": "d"}) == "n2"


def test_other_weights_and_other_stages_never_stand_in() -> None:
    world = formed(2, 2)
    world.kill("n0")
    # The only other node with stage 0 is unusable, as a wrong digest makes it.
    views = world.nodes()
    assert views.usable("n0") is None
    world.yellow.add("n2")
    world.step()
    assert world.serving()["p0/0"] == "-"


def test_a_blank_home_goes_behind_the_copy_while_requests_run_and_before_it_otherwise() -> None:
    for running, expected in ((3, "n1"), (0, "n0")):
        world = formed(3)
        world.running = running
        world.start("n0")  # a fresh process registered before the death was seen
        world.step()
        assert places(world)[0] == expected


def test_nobody_serves_more_than_two_while_another_way_is_left() -> None:
    world = formed(4)
    world.kill("n0")
    world.step()
    assert places(world) == ["n1", "n1", "n2", "n3"]
    p3 = with_stage(world.topology.pipelines[3], 0, replicas=(world.member("n1"),))
    world.topology = successor(world.topology, p3)
    world.kill("n3")
    world.step()
    assert places(world)[3] == "n2"  # although n1 holds the copy


def test_a_copy_that_is_only_in_the_wrong_place_waits_for_calm() -> None:
    world = formed(4)
    world.kill("n1")
    world.settle()
    world.start("n1")
    while places(world) != ["n0", "n1", "n2", "n3"]:
        assert world.step() is not None
    switched = world.now
    assert copies(world)[0] == "n3"
    while copies(world)[0] == "n3":
        if world.step() is None:
            world.now += 0.5
    assert world.now - switched == LIMITS.settle_s
    world.settle()
    assert world.all_home()


def test_mode_none_copies_nothing_and_still_borrows() -> None:
    world = formed(3, mode=Mode.NONE)
    assert copies(world) == ["", "", ""]
    world.kill("n1")
    world.settle()
    assert places(world)[1] in {"n0", "n2"}


def test_a_cordoned_target_loses_its_copies_only_when_the_new_one_has_caught_up() -> None:
    world = formed(4)
    world.lag = 10_000
    from_ = world.topology
    world.topology = type(from_)(
        **{f: getattr(from_, f) for f in from_.__struct_fields__} | {"cordoned": ("n1",)}
    )
    world.step()
    assert copies(world)[0] == "n1,n2"
    assert world.next() is None or copies(world)[0] == "n1,n2"
    world.lag = 0
    world.settle()
    assert copies(world)[0] == "n2"


def test_the_first_topology_names_homes_and_nobody_else() -> None:
    topology = initial(make_config(2, 2, spares=1), 1)
    assert [s.homes for p in topology.pipelines for s in p.stages] == [("n0",), ("n1",), ("n2",), ("n3",)]
    world = World(make_config(2, 2))
    world.kill(*world.all_nodes)
    assert plan(topology, world.nodes(), world.policy(), world.now) is None


def test_nodes_on_probation_give_their_work_away_and_leave_the_ring() -> None:
    world = formed(4)
    world.demoted = {"n1"}
    world.settle()
    assert places(world)[1] == "n2"  # the holder of its copy
    assert "n1" not in copies(world)
    world.demoted = set()
    world.settle()
    assert world.all_home()


def test_a_node_on_probation_is_the_last_choice_but_a_choice() -> None:
    world = formed(2)
    world.demoted = {"n1"}
    world.settle()
    assert places(world) == ["n0", "n0"]
    assert copies(world) == ["n1", "n1"]  # nobody else is left to copy to
    world.kill("n0")
    world.settle()
    assert places(world) == ["n1", "n1"]


def test_a_cordoned_node_on_probation_gets_nothing_new() -> None:
    world = formed(2)
    world.demoted = {"n1"}
    world.topology = replace(world.topology, cordoned=("n1",))
    world.settle()
    assert places(world) == ["n0", "n0"]
    assert copies(world) == ["n1", ""]  # the copy that it had is better than none


def test_everybody_on_probation_stays_where_he_is() -> None:
    world = formed(2)
    world.demoted = {"n0", "n1"}
    world.settle()
    assert world.all_home()


def test_a_layout_that_pipelines_were_put_into_is_the_one_made_of_them() -> None:
    rng = random.Random(3)
    topology = formed(6, 2).topology
    layout = Layout(topology)
    for stage in (0, 1):
        layout.ring(stage)
    for _ in range(200):
        pipeline, index = rng.choice(layout.pipelines), rng.randrange(2)
        ranks = tuple(Member(f"n{k}", "i") for k in rng.sample(range(index, 12, 2), rng.randrange(2)))
        layout.put(with_stage(pipeline, index, ranks=ranks))
        afresh = Layout(replace(topology, pipelines=tuple(layout.pipelines)))
        for stage in (0, 1):
            assert layout.ring(stage) == afresh.ring(stage)
            for p in layout.pipelines:
                assert list(layout.around(p, stage)) == list(afresh.around(p, stage))


@pytest.mark.parametrize("seed", range(12))
def test_a_copy_that_is_told_to_be_right_without_a_search_is_what_the_search_finds(seed: int) -> None:
    chosen = random.Random(seed)
    world = World(make_config(6, 2, spares=chosen.randrange(2)))
    for node in world.all_nodes:
        world.start(node, domain={"rack": f"r{chosen.randrange(1 + seed % 3)}", "node": node})
    told = 0
    for _ in range(10):
        nodes = world.all_nodes
        match chosen.randrange(5):
            case 0:
                world.kill(chosen.choice(nodes))
            case 1:
                world.yellow = set(chosen.sample(nodes, 2))
            case 2:
                cordoned = tuple(sorted(chosen.sample(nodes, 2)))
                world.topology = successor(world.topology, cordoned=cordoned)
            case 3:
                node = chosen.choice(nodes)
                world.start(node, domain={"rack": "r0", "node": node})
            case _:
                world.now += 16.0
        for _ in range(chosen.randrange(4)):
            world.step()
        situation, layout = world.situation(), Layout(world.topology)
        for pipeline in world.topology.pipelines:
            for index, stage in enumerate(pipeline.stages):
                for member in {*stage.replicas, *(view.member for view in situation.nodes.views.values())}:
                    if is_target(situation, layout, pipeline, index, member):
                        told += member in stage.replicas
                        assert replica_target(situation, layout, pipeline, index) == member
    assert told > 0
