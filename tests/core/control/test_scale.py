"""Instances come and go while the others serve: who gets which nodes, what moves, and when an instance is gone."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.contract.events import EventKind
from controlplane.contract.hosting import free_homes, number_of, wanted_here, wanted_nodes
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.topology import Mode, Topology
from controlplane.core.edit import initial, successor
from controlplane.core.policy import LEAVING
from tests.core.control.operating import done
from tests.core.control.sim import Sim, formed
from tests.core.control.world import World, make_config


def test_instances_of_many_stages_are_fewer() -> None:
    sim = formed(2, 4)
    (check,) = sim.submit("scale", instances=2001).checks
    assert (check.level, check.message) == ("fail", "2001 instances: allowed are 1 to 2000")
    assert not sim.operations


def ids(sim: Sim) -> list[str]:
    assert sim.topology is not None
    return [p.id for p in sim.topology.pipelines]


def closing(sim: Sim) -> list[str]:
    assert sim.topology is not None
    return [p.id for p in sim.topology.pipelines if p.closing]


def settled(sim: Sim) -> bool:
    """Everybody serves at home, with a copy."""
    assert sim.topology is not None
    stages = [(p, stage) for p in sim.topology.pipelines for stage in p.stages]
    copied = len(sim.topology.pipelines) > 1 or sim.config.spares
    return all(
        p.move is None and [m.node for m in st.ranks] == list(st.homes) and len(st.replicas) == bool(copied)
        for p, st in stages
    )


def test_more_and_fewer_while_all_serve() -> None:
    sim = formed(2, 2)
    answer = sim.submit("scale", instances=4, id="up")
    assert answer.plan == ("add p2 on n4, n5", "add p3 on n6, n7")
    assert [(c.level, c.name) for c in answer.checks] == [("ok", "nodes")]
    sim.run_until(lambda: done(sim, "up"))
    assert sim.operations["up"][0].message == "the group has 4 instances"
    assert ids(sim) == ["p0", "p1", "p2", "p3"]
    assert sim.serving("p3") == ["n6", "n7"]
    sim.run_until(lambda: settled(sim))
    epochs = {p.id: p.epoch for p in sim.written[-1].pipelines}

    answer = sim.submit("scale", instances=2, id="down")
    assert answer.plan == (
        "p2 takes no new request",
        "p3 takes no new request",
        "move what is on n4, n5, n6, n7 away, KV included; they end",
        "p2 is gone when its streams have ended",
        "p3 is gone when its streams have ended",
    )
    sim.run_until(lambda: not {"n4", "n5", "n6", "n7"} & set(sim.nodes))
    # The nodes have ended, and the streams go on.
    assert closing(sim) == ["p2", "p3"]
    assert not done(sim, "down")
    moves = [p.move for t in sim.written for p in t.pipelines if p.move is not None]
    assert {move.reason for move in moves} == {LEAVING}
    assert {move.to.node for move in moves} <= {"n0", "n1", "n2", "n3"}
    sim.running["p3"] = 0
    sim.run_until(lambda: ids(sim) == ["p0", "p1", "p2"])
    sim.running["p2"] = 0
    sim.run_until(lambda: done(sim, "down"))
    assert ids(sim) == ["p0", "p1"]
    assert {p.id: p.epoch for p in sim.written[-1].pipelines} == {k: epochs[k] for k in ("p0", "p1")}
    sim.run_until(lambda: settled(sim))
    told = [e.message for e in sim.history if e.kind is EventKind.SCALED]
    assert told[0] == "p2 is new, with n4, n5"
    assert "p3 takes no new request: it is to go" in told
    assert told[-1] == "p2 is gone: it had no stream left"
    assert sorted(sim.ended) == ["n4", "n5", "n6", "n7"]


def test_up_again_while_going_down() -> None:
    sim = formed(3, 1)
    sim.submit("scale", instances=1, id="down")
    sim.run_until(lambda: sim.ended == ["n1", "n2"] or sim.ended == ["n2", "n1"])
    sim.cancel("down")
    sim.submit("scale", instances=3, id="up")
    sim.run_until(lambda: done(sim, "up"))
    sim.run_until(lambda: settled(sim))
    assert (ids(sim), closing(sim)) == (["p0", "p1", "p2"], [])
    assert sim.topology is not None
    assert sim.topology.leaving == ()


def test_a_new_leader_goes_on() -> None:
    sim = formed(2, 2)
    sim.submit("scale", instances=3)
    sim.run(0.2)
    sim.kill_leader()
    sim.run_until(lambda: done(sim))
    sim.submit("scale", instances=1, id="down")
    sim.run(0.2)
    sim.kill_leader()
    sim.running.update(p1=0, p2=0)
    sim.run_until(lambda: done(sim, "down"))
    assert ids(sim) == ["p0"]


def test_a_spare_becomes_a_home_and_another_one_comes() -> None:
    sim = formed(2, 2, spares=1)
    answer = sim.submit("scale", instances=3)
    assert answer.plan == ("add p2 on n4, n5",)
    assert [c.message for c in answer.checks] == ["n4, n5 are there already"]
    sim.run_until(lambda: done(sim) and settled(sim) and len(sim.nodes) == 8)
    sim.running["p2"] = 0
    sim.submit("scale", instances=2, id="down")
    sim.run_until(lambda: done(sim, "down") and sim.ended != [])
    assert sorted(sim.ended) == ["n6", "n7"]  # n4 and n5 are the spares again
    assert set(sim.nodes) == {f"n{k}" for k in range(6)}


def test_a_node_that_dies_while_its_instance_goes() -> None:
    sim = formed(3, 2)
    sim.lag = 10_000  # the copies do not catch up
    sim.submit("scale", instances=2)
    sim.run(0.3)
    sim.kill("n0")  # of one that stays
    sim.kill("n5")
    sim.run(1.0)
    sim.lag = 0
    sim.run_until(sim.up)
    sim.running["p2"] = 0
    sim.run_until(lambda: done(sim))
    sim.run_until(lambda: settled(sim))
    assert ids(sim) == ["p0", "p1"]


def test_who_cannot_be_served_goes_at_once() -> None:
    """Nobody has ever joined: there is nothing to wait for."""
    sim = formed(2, 1)
    sim.held |= {"n2"}
    sim.submit("scale", instances=3, id="up")
    sim.run(1.0)
    assert sim.operations["up"][0].message == "p2 waits for n2 to join"
    sim.cancel("up")
    sim.submit("scale", instances=2, id="down")
    sim.run_until(lambda: done(sim, "down"))
    assert ids(sim) == ["p0", "p1"]


def test_in_mode_stop_restart_it_waits_for_the_streams() -> None:
    sim = formed(2, 2, mode=Mode.STOP_RESTART)
    sim.submit("scale", instances=1)
    sim.run(5.0)
    assert sim.serving("p1") == ["n2", "n3"]
    assert sim.operations["op"][0].message == "p1 goes when its streams have ended"
    sim.running["p1"] = 0
    sim.run_until(lambda: done(sim))
    sim.run(1.0)
    assert sorted(sim.ended) == ["n2", "n3"]


def test_a_pipeline_is_not_gone_before_gateways_have_told_its_new_scheduler() -> None:
    """Right after a switch it has no request, since its gateways have yet to bring them."""
    sim = formed(2, 1)
    sim.submit("scale", instances=1)
    sim.run_until(lambda: sim.serving("p1") == ["n0"])
    sim.running["p1"] = 0
    sim.run(1.0)
    sim.running["p1"] = 2
    sim.run(10.0)
    assert ids(sim) == ["p0", "p1"]


@pytest.mark.parametrize("instances", [0, -1, 4097])
def test_what_is_refused(instances: int) -> None:
    sim = formed(2, 1)
    answer = sim.submit("scale", instances=instances)
    assert not answer.accepted
    assert [c.level for c in answer.checks] == ["fail"]
    assert answer.plan == ()


@pytest.mark.parametrize("instances", [0, -3, 10**9, 10**30])
def test_a_number_that_no_preflight_saw_fails_and_changes_nothing(instances: int) -> None:
    """A value in etcd may be of another hand, and one without a number asks for none."""
    sim = formed(2, 1)
    before = len(sim.written)
    sim.put_operation(Operation("o1", OperationKind.SCALE, instances=instances))
    sim.run(2.0)
    (failed, _) = sim.operations["o1"]
    assert (failed.state, failed.message) == (
        OperationState.FAILED,
        f"{instances} instances: allowed are 1 to 4096",
    )
    assert (ids(sim), closing(sim), len(sim.written)) == (["p0", "p1"], [], before)
    assert sim.submit("scale", instances=3, id="up").accepted, "it is in nobody's way"
    sim.run_until(lambda: done(sim, "up"))


def test_parity_cannot_be_left_with_one_instance_by_a_value_either() -> None:
    sim = formed(2, 2, mode=Mode.PARITY)
    sim.put_operation(Operation("o1", OperationKind.SCALE, instances=1))
    sim.run(2.0)
    assert sim.operations["o1"][0].state is OperationState.FAILED
    assert closing(sim) == []


def test_parity_needs_two_and_another_scale_waits() -> None:
    sim = formed(2, 2, mode=Mode.PARITY)
    (check,) = sim.submit("scale", instances=1).checks
    assert (check.level, check.name) == ("fail", "instances")
    assert sim.submit("scale", instances=3).accepted
    again = sim.submit("scale", instances=3, id="second")
    assert [c.message for c in again.checks if c.level == "fail"] == ["scale is under way: op"]
    assert sim.submit("scale", instances=3).accepted  # the same name, the same wish
    assert not sim.submit("scale", instances=4).accepted


def test_nobody_may_be_left_to_take_over() -> None:
    sim = formed(2, 2)
    sim.held |= {"n1"}
    sim.kill("n1")
    sim.run_until(sim.up)
    answer = sim.submit("scale", instances=1)
    assert [c.message for c in answer.checks if c.level == "fail"] == ["nobody who stays can take over p1/1"]


# -- names ----------------------------------------------------------------------------------------------------


def test_names_of_nodes() -> None:
    assert [number_of(name) for name in ("n0", "n17", "n01", "m1", "n", "n-1", "n\u0661")] == [
        0, 17, -1, -1, -1, -1, -1,
    ]  # fmt: skip


def replaced_home(topology: Topology, old: str, new: str) -> Topology:
    from msgspec.structs import replace

    pipelines = tuple(
        replace(
            p,
            stages=tuple(
                replace(st, homes=tuple(new if h == old else h for h in st.homes)) for st in p.stages
            ),
        )
        for p in topology.pipelines
    )
    return replace(topology, pipelines=pipelines, cordoned=(old,))


def test_a_node_that_was_replaced_is_no_new_home() -> None:
    config = make_config(2, 2, spares=1)
    topology = replaced_home(initial(config, 1), "n3", "n5")
    assert free_homes(topology, 2, 2) == [("n4", "n7"), ("n6", "n9")]
    # Of stage 1 the replaced one is counted as the spare.
    assert wanted_nodes(topology, 2, 1) == {"n0", "n1", "n2", "n3", "n4", "n5"}


def test_who_leaves_runs_until_nothing_names_it() -> None:
    config = make_config(2, 1)
    topology = successor(initial(config, 1), leaving={"n1"})
    assert wanted_here(topology, config).run == ("n0",)
    sim = formed(2, 1)
    assert sim.topology is not None
    busy = successor(sim.topology, leaving={"n1"})
    assert wanted_here(busy, config).run == ("n0", "n1")
    assert wanted_here(busy, config).stop == ()


def test_who_was_to_restart_and_leaves_is_forgotten_once_it_has_ended() -> None:
    """A node is replaced while its instance is taken out of service: nobody starts a fresh process of it."""
    world = World(make_config(2, 1, spares=1))
    world.settle()
    both = (world.member("n1"), world.member("n2"))
    (p0,) = (p for p in world.topology.pipelines if p.id == "p0")
    world.topology = replace(successor(world.topology, leaving={"n1"}), pipelines=(p0,), retired=both)
    world.kill("n2")
    world.settle()
    assert set(world.topology.retired) == set(both), "n1 has not ended, and n2 will be started again"
    world.kill("n1")
    world.settle()
    assert world.topology.retired == (both[1],)
    del world.records["n1"]
    world.topology = successor(world.topology, retired=both)
    world.settle()
    assert world.topology.retired == (both[1],)
