"""Nodes that answer and do not do well: who is to blame, what follows, and that it does not flap."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle, pairwise

import pytest
from msgspec.structs import replace

from controlplane.contract.config import TimingConfig
from controlplane.contract.events import EventKind
from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, PipelineReport, StepTimes
from controlplane.contract.status import NodeState, PipelineState
from controlplane.core.conduct import PROBATION_S, Conduct
from controlplane.core.pace import Paces, Slowness
from dataplane.core.pace import Timeliness
from tests.core.control.sim import Sim, formed

DECODE, PREFILL, OTHER = 1, 2, 3


def state(sim: Sim, name: str) -> NodeState:
    return next(n.state for n in sim.cores[sim.leader].status(sim.now).nodes if n.node == name)


# ---- what follows


def test_a_slow_node_is_found_in_time_and_gives_its_work_away_without_dying() -> None:
    sim = formed()
    sim.nodes["n1"].throttled = True
    took_s = sim.run_until(lambda: state(sim, "n1") is NodeState.YELLOW)
    assert took_s <= 2.0
    sim.run_until(lambda: sim.serving("p0") == ["n0", "n5", "n2", "n3"], limit_s=3.0)
    kinds = sim.kinds()
    assert EventKind.MOVE in kinds
    assert EventKind.DIED not in kinds
    assert sim.topology is not None
    assert all(m.node != "n1" for p in sim.topology.pipelines for m in p.members())


def test_a_slow_node_comes_back_for_good_only_when_it_has_been_well_for_a_while() -> None:
    sim = formed()
    node = sim.nodes["n1"]
    node.throttled = True
    sim.run(30.0)
    assert state(sim, "n1") is NodeState.YELLOW, "as long as it is slow"
    before = len([k for k in sim.kinds() if k is EventKind.SUSPECTED])
    assert before == 1, "it flaps"
    node.throttled = False
    well_s = sim.run_until(sim.home)
    assert PROBATION_S <= well_s < PROBATION_S + 15


def test_each_relapse_doubles_the_time() -> None:
    sim = formed()
    node = sim.nodes["n1"]
    away: list[float] = []
    for _ in range(3):
        node.throttled = True
        sim.run_until(lambda: state(sim, "n1") is NodeState.YELLOW)
        node.throttled = False
        away.append(sim.run_until(lambda: state(sim, "n1") is NodeState.GREEN, limit_s=100.0))
        sim.run_until(sim.home)
    assert all(1.7 < later / earlier < 2.3 for earlier, later in pairwise(away)), away


def test_when_everybody_is_slow_nobody_is() -> None:
    sim = formed()
    for node in sim.nodes.values():
        node.throttled = True
    sim.run(10.0)
    assert {state(sim, name) for name in sim.nodes} == {NodeState.GREEN}


@pytest.mark.parametrize("instances", [2, 4])
@pytest.mark.parametrize("full", [0.6, 1.0])
def test_a_full_machine_does_not_keep_everybody_on_probation(instances: int, full: float) -> None:
    """Each was slow for a moment. Then the timers of all are overdue 30 or 50 % of the time, as on full cores."""
    sim = formed(instances, stages=1)
    detector = sim.cores[sim.leader]._detector
    for node in sim.nodes.values():
        node.throttled = full
    for node in sim.nodes.values():
        node.throttled = 1.8
        sim.run(2.5)
        assert detector.state(node.member) is NodeState.YELLOW
        node.throttled = full
    sim.run_until(
        lambda: all(detector.state(n.member) is NodeState.GREEN for n in sim.nodes.values()), limit_s=15
    )


def test_a_slow_node_serves_when_it_is_the_only_one() -> None:
    sim = formed(restart_s=None)
    sim.nodes["n1"].throttled = True
    sim.run_until(lambda: sim.serving("p0")[1] == "n5")
    sim.kill("n5")
    sim.run(1.0)
    assert sim.up()
    assert (sim.serving("p0")[1], sim.serving("p1")[1]) == ("n1", "n1")


def test_a_hung_node_is_replaced_and_restarted() -> None:
    sim = formed()
    old = sim.nodes["n1"].member
    sim.hang("n1")
    took_s = sim.run_until(lambda: sim.serving("p0") == ["n0", "n5", "n2", "n3"])
    assert took_s <= 2.0
    sim.run_until(lambda: sim.nodes["n1"].member != old, limit_s=3.0)
    sim.run(0.5)
    assert state(sim, "n1") is NodeState.YELLOW, "a fresh process of a suspicious node is on probation"
    sim.run_until(sim.home)
    assert sim.topology is not None
    assert sim.topology.retired == ()


def test_a_node_hung_in_its_first_step_is_found_by_its_standing_still() -> None:
    """Nothing is known of how long such a step takes."""
    sim = formed()
    old = sim.nodes["n1"].member
    sim.hang("n1", usual_s=0.0, advances=False)
    took_s = sim.run_until(lambda: sim.serving("p0") == ["n0", "n5", "n2", "n3"])
    assert took_s <= 2.0
    sim.run_until(lambda: sim.nodes["n1"].member != old, limit_s=3.0)


@pytest.mark.parametrize("usual_s", [0.0, 0.1])
def test_a_slow_step_that_advances_is_no_hung_one(usual_s: float) -> None:
    """Its scheduler has waited for 40 s, which is far longer than usual, or nobody knows how long that is."""
    sim = formed()
    sim.hang("n1", usual_s=usual_s, advances=True)
    sim.run(40.0)
    assert EventKind.DIED not in sim.kinds()
    assert (state(sim, "n1") is NodeState.GREEN) == (usual_s == 0.0), (
        "who is slower than usual is on probation"
    )
    sim.hang("n1", usual_s=usual_s, advances=False)
    assert sim.run_until(lambda: sim.serving("p0")[1] == "n5") <= 2.0


def test_a_hung_node_without_a_peer_is_restarted_and_serves() -> None:
    sim = formed(instances=1)
    sim.hang("n2")
    sim.run_until(lambda: not sim.up(), limit_s=2.0)
    sim.run_until(sim.up, limit_s=5.0)
    assert sim.serving("p0") == ["n0", "n1", "n2", "n3"]


def test_wrong_numbers_of_several_requests_condemn_a_node_and_of_one_do_not() -> None:
    sim = formed()
    old = sim.nodes["n1"].member
    sim.nodes["n1"].poisoned = 1
    sim.run(0.2)
    assert state(sim, "n1") is NodeState.YELLOW
    assert sim.serving("p0") == ["n0", "n1", "n2", "n3"]
    sim.nodes["n1"].poisoned = 2
    sim.run(0.2)
    assert sim.serving("p0") == ["n0", "n5", "n2", "n3"]
    sim.run_until(lambda: sim.nodes["n1"].member != old, limit_s=3.0)
    assert sim.run_until(sim.home) < 30


def test_requests_that_are_wrong_everywhere_condemn_nobody() -> None:
    sim = formed()
    for name in ("n1", "n5"):
        sim.nodes[name].poisoned = 1
    sim.run(0.2)
    for name in ("n1", "n5"):
        sim.nodes[name].poisoned = 5
    sim.run(2.0)
    assert (state(sim, "n1"), state(sim, "n5")) == (NodeState.GREEN, NodeState.GREEN)
    assert EventKind.DIED not in sim.kinds()


def test_a_single_wrong_request_is_forgotten() -> None:
    sim = formed()
    sim.nodes["n1"].poisoned = 1
    sim.run(12.0)
    assert state(sim, "n1") is NodeState.GREEN
    assert sim.serving("p0") == ["n0", "n1", "n2", "n3"]


# ---- who is slow


@dataclass
class Track:
    """Members that compute steps of some sizes, so many seconds each, and report every 100 ms."""

    paces: Paces = field(default_factory=Paces)
    totals: dict[str, dict[int, tuple[int, float]]] = field(default_factory=dict)
    now: float = 10.0

    def run(self, seconds: float, stages: dict[str, int], *costs: tuple[str, int, int, float]) -> None:
        """`costs`: member, size, steps in each 100 ms, seconds a step."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for name, size, steps, took_s in costs:
                totals = self.totals.setdefault(name, {})
                before, before_s = totals.get(size, (0, 0.0))
                totals[size] = (before + steps, before_s + steps * took_s)
            for name, stage in stages.items():
                times = tuple(
                    StepTimes(s, n, int(t * 1e6)) for s, (n, t) in self.totals.get(name, {}).items()
                )
                report = NodeReport(
                    Member(name, "1"), 1, 0.0, 1, pipelines=(PipelineReport("p0", 1, stage, 0),), times=times
                )
                self.paces.reported(report, self.now)
            self.paces.compare(self.now, ())

    def degree(self, name: str) -> float:
        return self.paces.compare(self.now, ())[Member(name, "1")].degree


def test_only_steps_of_one_size_are_compared() -> None:
    track = Track()
    stages = {"a": 0, "b": 0}
    track.run(2.0, stages, ("a", PREFILL, 1, 0.09), ("b", DECODE, 20, 0.002))
    assert track.degree("a") < 1
    track.run(2.0, stages, ("a", PREFILL, 1, 0.09), ("b", PREFILL, 4, 0.008))
    assert track.degree("a") > 1
    assert track.degree("b") < 1


def test_ten_times_slower_than_peers_from_its_first_step_on() -> None:
    track = Track()
    stages = {"a": 0, "b": 0, "c": 0}
    track.run(1.5, stages, ("a", DECODE, 3, 0.03), ("b", DECODE, 30, 0.003), ("c", DECODE, 30, 0.003))
    assert track.degree("a") > 1
    assert max(track.degree("b"), track.degree("c")) < 0.5


def test_who_is_asked_for_few_reports_is_found_and_cleared_all_the_same() -> None:
    """A controller of thousands asks for one in two seconds, and looks at each five times a second."""
    conduct, now = Conduct(TimingConfig()), 0.0
    found: list[float] = []
    for turn in range(240):
        now = turn * 0.05
        if turn % 40 == 0:
            for phase, name in enumerate("abc"):
                slow = name == "a" and turn < 120
                times = (StepTimes(DECODE, 10 * turn, 300_000 * turn if slow else 30_000 * turn),)
                served = (PipelineReport("p0", 1, 0, 0),)
                report = NodeReport(Member(name, "1"), turn, 0.0, turn, pipelines=served, times=times)
                conduct.reported(report, now + phase / 100)
        conduct.compare(now, ())
        found.append(conduct.slowness(Member("a", "1")))
        assert conduct.probation("b", now) is conduct.probation("c", now) is None
    assert [degree > 1 for degree in found[48:120]] == [True] * 72, (
        "known for as long as the next report takes"
    )
    assert conduct.probation("a", 4.0) is not None
    assert found[-1] < 0.5


def test_one_look_into_a_step_says_nothing_two_seconds_later() -> None:
    conduct = Conduct(TimingConfig())
    served = (PipelineReport("p0", 1, 0, 0),)
    for turn in range(120):
        if turn % 40 == 0:
            step = {"busy_s": 0.29, "usual_s": 0.02} if turn == 40 else {}
            report = NodeReport(Member("a", "1"), turn, 0.0, turn, pipelines=served, **step)
            conduct.reported(report, turn * 0.05)
        conduct.compare(turn * 0.05, ())
    assert conduct.probation("a", 6.0) is None


def test_without_a_peer_its_own_past_counts() -> None:
    track = Track()
    stages = {"a": 0, "b": 1}
    track.run(5.0, stages, ("a", DECODE, 10, 0.005), ("b", DECODE, 10, 0.005))
    track.run(1.5, stages, ("a", DECODE, 2, 0.05), ("b", DECODE, 2, 0.005))
    assert track.degree("a") > 1
    track.run(20.0, stages, ("a", DECODE, 2, 0.05), ("b", DECODE, 2, 0.005))
    assert track.degree("a") > 1, "it got used to it"


def test_bad_times_for_all_are_nobodys_fault() -> None:
    track = Track()
    stages = {"a": 0, "b": 1, "c": 2}
    track.run(5.0, stages, *((name, DECODE, 10, 0.003) for name in stages))
    track.run(1.5, stages, *((name, DECODE, 2, 0.03) for name in stages))
    assert max(track.degree(name) for name in stages) < 1


def test_few_steps_say_little() -> None:
    track = Track()
    stages = {"a": 0, "b": 0}
    track.run(3.0, stages, ("a", DECODE, 1, 0.004), ("b", DECODE, 1, 0.0004))
    assert track.degree("a") < 1, "10 steps of a few ms each: somebody else had the core"


def test_a_long_step_counts_before_it_has_ended() -> None:
    paces = Paces()
    for k in range(20):
        paces.reported(NodeReport(Member("a", "1"), k, 0.0, 1, busy_s=0.1 * k, usual_s=0.2), 10.0 + 0.1 * k)
    assert paces.compare(12.0, ())[Member("a", "1")].degree > 1


def test_on_an_overloaded_machine_times_say_less() -> None:
    assert Slowness(6.0, 0.0, 0.0).degree > 1 > Slowness(6.0, 0.3, 0.3).degree


@pytest.mark.parametrize(
    ("late", "others", "slow"),
    [(0.0, 0.0, False), (0.34, 0.0, False), (0.5, 0.02, True), (0.5, 0.3, False), (0.7, 0.2, True)],
)
def test_late_timers(late: float, others: float, slow: bool) -> None:
    assert (Slowness(0.0, late, others).degree >= 1) is slow


def test_what_is_only_as_late_as_the_others_is_no_slowness() -> None:
    """On probation half the limit is slow: it has to be half of what is beyond the others."""
    assert Slowness(0.0, 0.5, 0.5).degree == 0.0
    assert Slowness(0.0, 0.675, 0.5).degree == pytest.approx(0.5)


@pytest.mark.parametrize(("late", "degree"), [(0.8, (0.8 - 0.35) / 0.35), (0.3, 0.0)])
def test_a_slow_node_on_probation_excuses_no_second_one(late: float, degree: float) -> None:
    paces, a, b = Paces(), Member("a", "1"), Member("b", "1")
    for k in range(10):
        for member, share in ((a, 0.95), (b, late)):
            ran_s = 0.1 * k
            report = NodeReport(member, k, 0.0, 1, timed_s=ran_s, overdue_s=share * ran_s)
            paces.reported(report, 10.0 + ran_s)
    assert max(paces.compare(11.0, [a], [a])[b].degree, 0.0) == pytest.approx(degree)


# Lateness of 50 ms timers and processor time of the loop between them, in ms, on two cores that were full. A busy
# node among seven others and five foreign processes; one that was stopped for 90 of each 100 ms.
BUSY = [
    (38, 10),
    (14, 9),
    (47, 15),
    (7, 8),
    (27, 11),
    (46, 19),
    (19, 13),
    (7, 8),
    (28, 9),
    (13, 7),
    (86, 21),
    (20, 12),
]
STOPPED = [
    (155, 8),
    (164, 8),
    (154, 5),
    (158, 6),
    (164, 10),
    (352, 12),
    (165, 10),
    (159, 11),
    (52, 5),
    (50, 2),
    (162, 10),
]


def suspected_after_s(rings: list[tuple[int, int]], limit_s: float = 8.0) -> float | None:
    """When a node with such timers, again and again, is put on probation beside an idle one; None: not at all."""
    conduct, now, next_at = Conduct(TimingConfig()), 0.0, {"a": 0.0, "b": 0.0}
    timers = {name: Timeliness() for name in next_at}
    endless = cycle(rings)
    while now < limit_s:
        now += 0.05
        for name, timer in timers.items():
            if next_at[name] <= now:
                late_ms, computed_ms = next(endless) if name == "a" else (1, 1)
                took_s = 0.05 + late_ms / 1000
                timer.rang(0.05, took_s, computed_ms / 1000)
                next_at[name] += took_s
                report = NodeReport(
                    Member(name, "1"), 1, 0.0, 1, timed_s=timer.timed_s, overdue_s=timer.overdue_s
                )
                conduct.reported(report, now)
        conduct.compare(now, ())
        if conduct.probation("a", now):
            return now
    return None


def test_a_busy_node_on_a_full_machine_is_not_slow() -> None:
    """Half of its timers are 25 ms late or more, and an idle peer's never are."""
    assert suspected_after_s(BUSY) is None


def test_a_stopped_node_is_found_though_few_of_its_timers_ring() -> None:
    found_s = suspected_after_s(STOPPED)
    assert found_s is not None
    assert found_s <= 2.0


@pytest.mark.parametrize("pause_ms", [300, 600, 3000])
def test_a_single_pause_does_not_make_a_node_slow(pause_ms: int) -> None:
    assert suspected_after_s([*[(1, 1)] * 10, (pause_ms, 0), *[(1, 1)] * 200]) is None


# ---- the truth


def test_a_pipeline_whose_node_is_dead_does_not_serve_even_while_automation_is_paused() -> None:
    sim = formed(instances=1, restart_s=None)
    assert sim.topology is not None
    sim.put_topology(replace(sim.topology, counter=sim.topology.counter + 1, paused=True))
    sim.kill("n2")
    status = sim.cores["c2"].status(sim.now)
    assert not status.available
    assert status.pipelines[0].state is PipelineState.DOWN


def test_a_pipeline_with_a_suspected_node_says_so() -> None:
    sim = formed(instances=1)
    sim.nodes["n2"].throttled = True
    sim.run_until(lambda: state(sim, "n2") is NodeState.YELLOW)
    status = sim.cores["c2"].status(sim.now)
    assert status.available
    assert status.pipelines[0].state is PipelineState.DEGRADED
    node = next(n for n in status.nodes if n.node == "n2")
    assert node.slowness > 1
    assert "on probation: its timers are overdue 50% of the time, others' 0%" in node.evidence
