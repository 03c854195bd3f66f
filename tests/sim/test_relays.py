"""Relays in the simulator: they are used, what befalls them happens, and their nodes do without."""

from __future__ import annotations

from tests.sim import parts
from tests.sim.border import silence, simulated
from tests.sim.cluster import FORM_LIMIT_S, Cluster
from tests.sim.network import Network
from tests.sim.schedule import Schedule, Shape, generate
from tests.sim.world import World


def test_what_befalls_relays_is_drawn_on_top_of_what_else_happens() -> None:
    schedules = [schedule for seed in range(400) if (schedule := generate(seed)).shape.relays]
    assert len(schedules) == 50
    befalls = {
        step.what
        for schedule in schedules
        for step in schedule.steps
        if any(str(arg) in ("r1", "r2") for arg in step.args)
    }
    assert befalls == {"kill", "pause", "cut", "one_way", "deaf", "reset"}
    calm = [schedule for schedule in schedules if schedule.calm]
    assert 10 < len(calm) < 40
    assert {len(schedule.shape.nodes) for schedule in calm} >= {2, 4, 6}


def test_nodes_report_through_their_relay_and_by_themselves_while_it_is_dead_or_stopped() -> None:
    schedule = Schedule(1, Shape(2, 2, 0, 2, 1, 64, 1, relays=2), (), mild=False)
    parts.run_dir()
    world = World(schedule.seed)
    net = Network(world)

    with silence(), simulated(world, net):
        cluster = Cluster(world, net, schedule)

        def alone() -> set[str]:
            return {name for name, node in cluster.nodes() if parts.reports_by_itself(node)}

        with cluster.checks.probes():
            cluster._wait(FORM_LIMIT_S, "the cluster has not formed", cluster._at_home)
            cluster._wait(5.0, "nodes report by themselves", lambda: not alone())
            cluster.checks.calm = True
            cluster.kill("r1", 3.0)
            cluster._wait(1.0, "the dead relay's nodes do not report", lambda: alone() == {"n0", "n2"})
            cluster._wait(10.0, "nodes do not return to the relay", lambda: not alone())
            cluster.pause("r2", 3.0)
            cluster._wait(1.5, "the stopped relay's nodes do not report", lambda: alone() == {"n1", "n3"})
            cluster._wait(10.0, "nodes do not return to the relay", lambda: not alone())
    assert world.failure == ""
