"""Paths that break while everybody lives: whoever decides hears only some, and condemns nobody for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controlplane.contract.events import EventKind
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Mode
from controlplane.core import events
from tests.core.control.sim import Sim, formed

SIZES = [(2, 4), (3, 4)]


def alive(instances: int, stages: int, mode: Mode = Mode.REPLICATE, controllers: int = 1) -> Sim:
    sim = formed(instances, stages, mode=mode, controllers=controllers)
    sim.run(2.0)
    return sim


def parts(size: tuple[int, int]) -> Iterator[set[str]]:
    """Whom the leader still hears: one node, a pipeline, a stage of each pipeline, all but one, half, nobody."""
    instances, stages = size
    every = [f"n{k}" for k in range(instances * stages)]
    yield from ({"n0"}, set(every[:stages]), set(every[::stages]), set(every[1:]), set(every[::2]), set())
    yield from (set(every[:k]) for k in (2, 3, len(every) - 3))


@pytest.mark.parametrize("mode", [Mode.REPLICATE, Mode.NONE, Mode.STOP_RESTART])
@pytest.mark.parametrize("ends", ["broken", "silent"])
@pytest.mark.parametrize("size", SIZES)
def test_a_leader_that_hears_only_some_condemns_nobody(size: tuple[int, int], ends: str, mode: Mode) -> None:
    for heard in parts(size):
        sim = alive(*size, mode=mode)
        written = len(sim.written)
        unheard = set(sim.nodes) - heard
        if ends == "broken":
            sim.cut_reports("c1", *unheard)
        else:
            sim.deaf.update(("c1", node) for node in unheard)
        sim.run(20)
        assert len(sim.written) == written, (heard, sim.serving("p0"), sim.serving("p1"))
        assert EventKind.DIED not in sim.kinds(), heard
        status = sim.cores["c1"].status(sim.now)
        assert {n.node for n in status.nodes if n.state is NodeState.YELLOW} == unheard
        sim.deaf.clear()
        sim.run(1)
        assert {n.state for n in sim.cores["c1"].status(sim.now).nodes} == {NodeState.GREEN}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ends", ["broken later", "silent"])
def test_a_leaders_host_that_is_cut_off_condemns_nobody_by_its_own_nodes_word(
    size: tuple[int, int], ends: str
) -> None:
    """The leader and n0 share a host that reaches etcd and no other host: both miss the same nodes for one reason."""
    sim = alive(*size)
    written = len(sim.written)
    others = set(sim.nodes) - {"n0"}
    sim.deaf.update(("c1", node) for node in others)
    sim.part({"n0"}, others)
    if ends == "broken later":
        sim.run(3.9)
        sim.cut_reports("c1", *others)
    sim.run(20)
    assert len(sim.written) == written, (sim.serving("p0"), sim.serving("p1"))


@pytest.mark.parametrize("size", SIZES)
def test_nodes_that_nobody_hears_whose_leases_end_stay_where_nobody_can_take_their_place(
    size: tuple[int, int],
) -> None:
    """Nodes are cut off from etcd and controllers, and serve on: clients reach them."""
    sim = alive(*size)
    written = len(sim.written)
    sim.cut_reports("c1", *sim.nodes)
    for name, node in sim.nodes.items():
        node.leased = False
        sim.watch(events.NodeGone(name))
    sim.run(20)
    assert len(sim.written) == written
    sim.deaf.clear()
    for node in sim.nodes.values():
        node.leased = True
        sim.watch(events.NodeRegistered(node.record))
    sim.run(4)
    assert len(sim.written) == written, "nothing was lost"
    assert {n.state for n in sim.cores["c1"].status(sim.now).nodes} == {NodeState.GREEN}


def test_two_that_are_stopped_in_the_only_two_places_of_a_stage_go_on_where_they_were() -> None:
    sim = alive(2, 4)
    written = len(sim.written)
    sim.stop("n1")
    sim.stop("n5")
    sim.run(3)
    assert sim.kinds().count(EventKind.DIED) == 2
    sim.cont("n1")
    sim.cont("n5")
    sim.run(4)
    assert len(sim.written) == written
    sim.stop("n1")
    sim.stop("n5")
    sim.run(7)  # their registrations are gone as well: who waits for them is told
    assert not sim.up()
    sim.cont("n1")
    sim.cont("n5")
    sim.run_until(sim.home)


@pytest.mark.parametrize("heard", [{"n0"}, {"n0", "n1", "n2", "n3"}, {"n0", "n4"}])
@pytest.mark.parametrize("victim", ["n1", "n6"])
def test_a_death_is_found_by_a_leader_that_hears_only_some(heard: set[str], victim: str) -> None:
    """By what neighbours that are heard say at once; else by its registration."""
    sim = alive(2, 4)
    sim.held.add(victim)
    sim.cut_reports("c1", *(set(sim.nodes) - heard))
    sim.run(10)
    written = len(sim.written)
    sim.kill(victim)
    sim.run_until(lambda: EventKind.DIED in sim.kinds(), limit_s=5.5)
    died = [event for event in sim.history if event.kind is EventKind.DIED]
    assert [event.subject for event in died] == [victim]
    sim.run(1)
    pipeline = "p0" if victim == "n1" else "p1"
    assert victim not in sim.serving(pipeline)
    assert all(t.counter > sim.written[written - 1].counter for t in sim.written[written:])


@pytest.mark.parametrize("victims", [["n1"], ["n1", "n2", "n3"], ["n1", "n2", "n3", "n5", "n6"]])
def test_who_is_killed_is_found_at_once_however_many(victims: list[str]) -> None:
    sim = alive(2, 4)
    sim.kill(*victims)
    assert sim.kinds().count(EventKind.DIED) == len(victims)
    sim.run_until(sim.home)


@pytest.mark.parametrize("mode", [Mode.REPLICATE, Mode.NONE, Mode.STOP_RESTART])
@pytest.mark.parametrize("size", SIZES)
def test_a_stopped_node_is_found_by_its_neighbours_silence(size: tuple[int, int], mode: Mode) -> None:
    sim = alive(*size, mode=mode)
    sim.stop("n2")
    assert sim.run_until(lambda: EventKind.DIED in sim.kinds()) < 1.6


@pytest.mark.parametrize("victim", ["n0", "n5"])
def test_a_stopped_node_that_works_with_nobody_is_found_by_those_of_its_stage(victim: str) -> None:
    """One stage, no copies, and n5 is a spare: no step and no copy passes over any link."""
    sim = formed(5, 1, mode=Mode.NONE, spares=1)
    sim.run(2.0)
    sim.stop(victim)
    assert sim.run_until(lambda: EventKind.DIED in sim.kinds(), limit_s=2.0) < 1.6


def test_a_link_that_is_there_to_watch_accuses_nobody_of_standing_in_the_way() -> None:
    """n5 and n1 watch each other, and nothing passes between them; p0 waits for n1 because it is slow."""
    sim = alive(2, 4, mode=Mode.NONE)
    sim.part({"n1"}, {"n5"})
    sim.run(4)
    assert any(link.watch and not link.up for link in sim.links(sim.nodes["n5"]))
    sim.hang("n1", usual_s=60.0)
    sim.run(5)
    assert EventKind.DIED not in sim.kinds()


def test_a_node_cut_off_from_its_pipeline_and_from_the_leader_makes_way() -> None:
    """Others hear it, so it is not dead; but nobody can use it where it is."""
    sim = alive(2, 4)
    sim.cut_reports("c1", "n2")
    sim.part({"n2"}, {"n1"})
    sim.run(4)
    assert "n2" in sim.serving("p0"), "nothing waits for it"
    sim.hang("n2")  # steps do not reach it
    sim.run(0.5)
    sim.run_until(lambda: "n6" in sim.serving("p0"), limit_s=3)


def test_a_stage_that_is_stuck_unseen_is_not_another_ones_fault() -> None:
    """n3 is hung, and of p0 only n0 is heard: n1 and n2 may have done all that they were asked for."""
    sim = alive(2, 4)
    sim.run(1)
    sim.cut_reports("c1", "n1", "n2", "n3")
    sim.hang("n3")
    sim.run(40)
    assert EventKind.DIED not in sim.kinds()


def test_a_cut_around_one_stage_of_all_pipelines_is_over_soon_after_the_path_is_back() -> None:
    """Both nodes of the stage are cut off from all others, as behind one switch: nobody is left to take it."""
    sim, cut = alive(2, 4), {"n1", "n5"}
    sim.part(cut, set(sim.nodes) - cut)
    for name in cut:
        sim.hang(name, usual_s=60.0)  # steps do not reach it
    sim.run_until(lambda: all("-" in sim.serving(p) for p in ("p0", "p1")), limit_s=5)
    sim.parted.clear()
    for name in cut:
        sim.nodes[name].hung_at = 0.0
    sim.run_until(lambda: not any("-" in sim.serving(p) for p in ("p0", "p1")), limit_s=3)
    sim.run_until(sim.home, limit_s=20)
    assert sim.topology is not None
    assert not sim.topology.retired, "their processes are sound"
