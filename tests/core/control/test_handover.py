"""A leader that hears clearly fewer nodes than another candidate gives way, once, and not back and forth."""

from __future__ import annotations

import pytest

from controlplane.contract.events import EventKind
from controlplane.core.handover import AGAIN_S, SETTLED, Handover, clearly_more, worth_telling
from tests.core.control.sim import Sim, formed

AFTER_S = 2.4


def cluster(instances: int, stages: int, controllers: int = 2) -> Sim:
    sim = formed(instances, stages, controllers=controllers)
    sim.run(3.0)
    assert sim.leader == "c1"
    return sim


@pytest.mark.parametrize("size", [(2, 4), (3, 4), (2, 1)])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_leader_that_hears_clearly_fewer_gives_way(size: tuple[int, int], kept: int) -> None:
    sim = cluster(*size)
    written = len(sim.written)
    unheard = list(sim.nodes)[kept:]
    sim.cut_reports("c1", *unheard)
    sim.run(5)
    gives_way = len(unheard) >= 2 or (kept == 0 and bool(unheard))
    assert sim.led == (["c1", "c2"] if gives_way else ["c1"])
    assert len(sim.written) == written, "nobody was condemned on the way"
    sim.run(60)
    assert sim.led == (["c1", "c2"] if gives_way else ["c1"]), "once"
    sim.deaf.clear()
    sim.run(60)
    assert len(sim.led) <= 2, "whoever hears all stays"


def test_a_death_that_the_deaf_leader_cannot_see_is_found_by_the_next() -> None:
    sim = cluster(2, 4)
    sim.cut_reports("c1", *list(sim.nodes)[1:])
    sim.held.add("n6")
    sim.stop("n6")  # n1 and n5 miss it, and c1 hears neither
    assert sim.run_until(lambda: "n2" in sim.serving("p1")) < AFTER_S + 2.0
    assert sim.leader == "c2"


def test_the_next_in_line_may_hear_as_little_and_passes_it_on() -> None:
    sim = cluster(2, 4, controllers=3)
    for controller in ("c1", "c2"):
        sim.cut_reports(controller, *list(sim.nodes)[1:])
    sim.run(10)
    assert sim.led == ["c1", "c2", "c3"]
    sim.run(30)
    assert sim.leader == "c3"


def test_a_leaders_host_that_is_cut_off_loses_leadership_and_then_its_node_its_duties() -> None:
    """c1 and n0 reach etcd and each other, and nobody else reaches them: what is wrong is seen from the other side."""
    sim = cluster(2, 4)
    others = set(sim.nodes) - {"n0"}
    sim.deaf.update({("c2", "n0"), *(("c1", node) for node in others)})
    sim.part({"n0"}, others)
    sim.run_until(lambda: sim.serving("p0") == ["n4", "n1", "n2", "n3"], limit_s=8)
    died = [event.subject for event in sim.history if event.kind is EventKind.DIED]
    assert died == ["n0"]
    assert sim.serving("p1") == ["n4", "n5", "n6", "n7"]


def test_a_storm_of_deaths_moves_no_leadership() -> None:
    """What the others told last is older than what the leader sees."""
    sim = cluster(3, 4)
    sim.kill("n1", "n6", "n11")
    sim.run(10)
    assert sim.led == ["c1"]


def test_paths_that_break_by_turns_do_not_move_leadership_each_time() -> None:
    sim = cluster(2, 4)
    for turn in range(20):
        sim.deaf = {(f"c{turn % 2 + 1}", node) for node in sim.nodes}
        sim.run(6)
    assert 2 <= len(sim.led) <= 8


def test_how_many_more_is_clearly_more() -> None:
    assert [clearly_more(*pair) for pair in ((1, 0), (2, 1), (3, 1), (8, 7), (8, 6))] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert not clearly_more(1000, 900)
    assert clearly_more(1000, 800)
    assert [worth_telling(*pair) for pair in ((1, 0), (8, 8), (7, 8), (990, 1000), (930, 1000))] == [
        True, False, True, False, True,
    ]  # fmt: skip


def gives_way_after(handover: Handover, now: float) -> float:
    """Seconds from the moment on which another one hears more, which is `now`."""
    since = now
    while not (why := handover.weigh(1, {"c2": 8, "c3": 5}, now)):
        now += 0.05
    assert why.startswith("c2 ")
    return now - since


def undisputed(handover: Handover, now: float, for_s: float) -> float:
    """When it is over."""
    for k in range(round(for_s / 0.05)):
        assert not handover.weigh(1, {"c2": 2, "c3": 1}, now + k * 0.05)
    return now + for_s


def test_it_takes_a_while_and_each_time_longer() -> None:
    handover, now, waited = Handover(AFTER_S), 0.0, []
    for _ in range(4):
        handover.began(now)
        waited.append(round(took := gives_way_after(handover, now)))
        now += took
    assert waited == [2, AGAIN_S, 2 * AGAIN_S, 4 * AGAIN_S]


def test_once_it_led_undisputed_for_a_while_it_gives_way_as_fast_as_at_first() -> None:
    """Six cuts in a row, 11 s apart, left a leader that heard one node in place for as long as the seventh lasted."""
    handover, now = Handover(AFTER_S), 0.0
    for _ in range(6):
        handover.began(now)
        now = undisputed(handover, now, SETTLED * AFTER_S + 0.1)
        took = gives_way_after(handover, now)
        assert took == pytest.approx(AFTER_S, abs=0.06)
        now += took
    handover.began(now)
    now = undisputed(handover, now, SETTLED * AFTER_S - 1.0)
    assert gives_way_after(handover, now) > AFTER_S + 0.5, "too short a while"


def test_better_for_a_moment_is_not_better() -> None:
    handover = Handover(AFTER_S)
    handover.began(0.0)
    for k in range(100):
        assert not handover.weigh(1, {"c2": 8 if k % 20 else 1}, k * 0.1)
