"""Evidence and verdicts."""

from __future__ import annotations

import random

import pytest

from controlplane.contract.config import TimingConfig
from controlplane.contract.ids import Member
from controlplane.contract.reports import LinkReport, NodeReport
from controlplane.contract.status import NodeState
from controlplane.core.detector import Detector
from controlplane.core.evidence import Evidence, judge
from controlplane.core.phi import PHI_MAX, Arrivals

TIMING = TimingConfig()
GREEN, YELLOW, RED = NodeState.GREEN, NodeState.YELLOW, NodeState.RED
A, B, C = Member("a", "1"), Member("b", "1"), Member("c", "1")

CASES = [
    ("flowing", Evidence(0.1), GREEN),
    ("flowing, lease gone: etcd was away", Evidence(0.1, lease=False), GREEN),
    ("flowing, one link down: not its death", Evidence(0.1, link_down="reset"), GREEN),
    ("flowing, its step does not end", Evidence(0.1, stalled_s=2.0), YELLOW),
    ("flowing, its step never ends", Evidence(0.1, stalled_s=31.0), RED),
    ("flowing, cut off from a neighbour that it does not need", Evidence(0.1, cut_off="n0"), GREEN),
    ("flowing, cut off from its pipeline", Evidence(0.1, cut_off="n0", stalled_s=1.3), RED),
    ("its computation takes too long, by its own word", Evidence(0.1, stuck_s=2.0), YELLOW),
    ("and its scheduler waits for it", Evidence(0.1, stuck_s=2.0, stalled_s=1.3), RED),
    ("the numbers of one request", Evidence(0.1, poisoned=1), YELLOW),
    ("the numbers of several", Evidence(0.1, poisoned=2), RED),
    ("the numbers of several, elsewhere too", Evidence(0.1, poisoned=2, peers_poisoned=True), GREEN),
    ("on probation", Evidence(0.1, probation="slow"), YELLOW),
    ("silent and on probation", Evidence(1.3, phi=50, link_silent_s=1.3, probation="slow"), RED),
    ("silence", Evidence(0.7, phi=20), YELLOW),
    ("surprising, but not for long", Evidence(0.4, phi=9), GREEN),
    ("late here, heard on links", Evidence(0.7, phi=20, neighbour_hears=True, link_silent_s=0.2), GREEN),
    ("late here, silent on links", Evidence(0.7, phi=20, neighbour_hears=True, link_silent_s=0.7), YELLOW),
    ("too late here", Evidence(1.2, phi=50, neighbour_hears=True, link_silent_s=0.2), YELLOW),
    ("long, but it often is", Evidence(0.7, phi=3), GREEN),
    ("broken stream alone", Evidence(0.05, broken=True), YELLOW),
    ("broken stream and broken link", Evidence(0.05, broken=True, link_down="reset"), RED),
    ("broken stream, lease gone", Evidence(0.2, broken=True, lease=False), RED),
    ("broken stream, silent for long: one kind", Evidence(4.9, phi=99, broken=True), YELLOW),
    ("broken stream, silent on links", Evidence(1.3, phi=50, broken=True, link_silent_s=1.3), RED),
    ("broken stream and its step stalls", Evidence(1.3, phi=50, broken=True, stalled_s=1.3), RED),
    (
        "cut here and at one neighbour, others hear it",
        Evidence(3.0, phi=99, broken=True, link_down="timed out", neighbour_hears=True),
        YELLOW,
    ),
    (
        "killed, and a neighbour had just heard it",
        Evidence(0.05, broken=True, abrupt=True, link_down="reset", neighbour_hears=True),
        RED,
    ),
    (
        "cut here and from its pipeline, which waits",
        Evidence(3.0, phi=99, link_down="timed out", neighbour_hears=True, cut_off="n0", stalled_s=1.3),
        RED,
    ),
    ("broken stream, neighbours hear it", Evidence(9.0, phi=99, broken=True, neighbour_hears=True), YELLOW),
    ("silent, link down", Evidence(0.7, phi=20, link_down="reset"), RED),
    ("silent, links silent, not long enough", Evidence(1.0, phi=50, link_silent_s=1.0), YELLOW),
    ("silent and links silent", Evidence(1.3, phi=50, link_silent_s=1.3), RED),
    ("silent and its step stalls", Evidence(1.3, phi=50, stalled_s=1.3), RED),
    ("silent, nobody expects anything of it", Evidence(1.3, phi=50), YELLOW),
    ("silent far longer: one kind", Evidence(4.9, phi=99), YELLOW),
    ("silent, but it often is", Evidence(1.3, phi=3, link_silent_s=1.3), YELLOW),
    ("silent beyond every rhythm", Evidence(3.7, phi=3, link_silent_s=3.7), RED),
    (
        "silent, lease gone, neighbours hear it",
        Evidence(9, phi=99, lease=False, neighbour_hears=True),
        YELLOW,
    ),
    ("silent and lease gone", Evidence(0.7, phi=20, lease=False), RED),
    ("everybody is silent", Evidence(9.0, phi=99, link_silent_s=9, deaf=True), YELLOW),
    (
        "most are silent, and the few that are heard miss it, too",
        Evidence(3.0, phi=99, broken=True, link_down="timed out", link_silent_s=3, deaf=True),
        YELLOW,
    ),
    ("most are silent, its pipeline waits", Evidence(3.0, phi=99, stalled_s=2, deaf=True), YELLOW),
    (
        "most are dead: connections that break while they are used are not cut",
        Evidence(0.05, broken=True, abrupt=True, link_down="reset", deaf=True),
        RED,
    ),
    ("most are silent, this one is heard", Evidence(0.1, deaf=True), GREEN),
    ("everybody is silent, lease gone", Evidence(9.0, phi=99, lease=False, deaf=True), RED),
    ("never heard", Evidence(5.0, heard_ever=False), YELLOW),
    ("never heard, lease gone, just now", Evidence(0.7, heard_ever=False, lease=False), YELLOW),
    ("never heard, lease gone", Evidence(1.3, heard_ever=False, lease=False), RED),
    ("never heard, link down", Evidence(0.7, heard_ever=False, link_down="refused"), RED),
    ("newer process", Evidence(0.0, superseded=True), RED),
    ("leaving", Evidence(0.0, leaving=True), RED),
]


@pytest.mark.parametrize(("name", "evidence", "state"), CASES, ids=[case[0] for case in CASES])
def test_rules(name: str, evidence: Evidence, state: NodeState) -> None:
    found, why = judge(evidence, TIMING)
    assert found is state, why
    assert bool(why) is (state is not GREEN)


class Bench:
    """Three members that speak every 100 ms unless told otherwise."""

    def __init__(self) -> None:
        self.detector = Detector(TIMING)
        self.now = 50.0
        self.silent: set[Member] = set()
        self.poisoned = 0  # requests, at A
        self.links: dict[Member, tuple[LinkReport, ...]] = {}
        for member in (A, B, C):
            self.detector.registered(member, self.now)
        self.run(1.0)

    def run(self, seconds: float, interval_s: float = 0.1) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += interval_s
            self.detector.advance(self.now)
            for member in (A, B, C):
                if member not in self.silent:
                    self.report(member)
            self.detector.evaluate(self.now, {})

    def report(self, member: Member, leaving: bool = False) -> None:
        poisoned = self.poisoned if member == A else 0
        links = self.links.get(member, ())
        report = NodeReport(member, 1, 0.0, 1, links=links, leaving=leaving, poisoned=poisoned)
        self.detector.reported(report, self.now)

    def state(self, member: Member) -> NodeState:
        self.detector.evaluate(self.now, {})
        return self.detector.state(member)


def test_two_kinds_of_evidence_make_red_at_once_and_one_does_not() -> None:
    bench = Bench()
    bench.detector.stream_broken(A, bench.now)
    assert bench.state(A) is YELLOW
    bench.links[B] = (LinkReport(A, False, 0.0, "reset"),)
    bench.report(B)
    assert bench.state(A) is RED


@pytest.mark.parametrize("silence", [LinkReport(A, False, 0.0, "timed out"), LinkReport(A, True, 1.5)])
@pytest.mark.parametrize("blamed", [A, B])
def test_a_link_broken_between_two_that_are_heard_costs_the_one_that_is_waited_for(
    silence: LinkReport, blamed: Member
) -> None:
    bench = Bench()
    bench.links[B] = (silence,)
    bench.run(0.2)
    assert [bench.state(m) for m in (A, B, C)] == [GREEN] * 3
    bench.detector.evaluate(bench.now, {blamed: 1.3})
    assert [m for m in (A, B, C) if bench.detector.state(m) is RED] == [blamed]
    assert not bench.detector.faulty(), "its process is sound"
    bench.links.clear()
    bench.run(1.5)
    assert bench.state(blamed) is RED
    bench.run(1)
    assert bench.state(blamed) is YELLOW
    assert bench.detector.demoted() == {blamed}, "sound, and on probation: the last choice"
    bench.run(8)
    assert bench.state(blamed) is GREEN


def test_who_is_behind_a_cut_again_and_again_is_believed_later_each_time() -> None:
    bench, waits = Bench(), []
    for _ in range(4):
        bench.links[B] = (LinkReport(A, False, 0.0, "timed out"),)
        bench.run(0.2)
        bench.detector.evaluate(bench.now, {A: 1.3})
        assert bench.detector.state(A) is RED
        bench.links.clear()
        began = bench.now
        while bench.state(A) is RED:
            bench.run(0.1)
        waits.append(bench.now - began)
    assert waits == pytest.approx([2.0, 4.0, 8.0, 16.0], abs=0.4)


def test_a_link_that_is_refused_is_no_evidence_of_death() -> None:
    """Between two versions no link can be opened, and either is alive."""
    bench = Bench()
    bench.links[B] = (LinkReport(A, False, 0.0, "no link: peer speaks protocol 2", refused=True),)
    bench.report(B)
    bench.detector.stream_broken(A, bench.now)
    assert bench.state(A) is YELLOW
    bench.links[C] = (LinkReport(A, False, 0.0, "reset"),)
    bench.report(C)
    assert bench.state(A) is RED


def test_a_refused_link_that_a_pipeline_waits_for_costs_the_one_that_is_waited_for() -> None:
    bench = Bench()
    bench.links[B] = (LinkReport(A, False, 0.0, "no link: peer speaks protocol 2", refused=True),)
    bench.run(0.2)
    bench.detector.evaluate(bench.now, {A: 1.3})
    assert [m for m in (A, B, C) if bench.detector.state(m) is RED] == [A]


def test_a_link_to_one_that_is_silent_itself_is_no_broken_path() -> None:
    bench = Bench()
    bench.links[B] = (LinkReport(A, True, 1.5),)
    bench.silent.add(A)
    bench.run(0.7)
    bench.detector.evaluate(bench.now, {B: 1.3})
    assert bench.detector.state(B) is YELLOW


def test_the_dead_give_no_evidence() -> None:
    bench = Bench()
    bench.links[B] = (LinkReport(A, False, 0.0, "reset"), LinkReport(C, False, 0.0, "reset"))
    bench.run(0.1)
    bench.detector.stream_broken(B, bench.now)
    bench.links[C] = (LinkReport(B, False, 0.0, "reset"),)
    bench.report(C)
    assert bench.state(B) is RED
    bench.detector.stream_broken(A, bench.now)
    assert bench.state(A) is YELLOW


def test_a_member_that_woke_up_is_not_yet_a_witness() -> None:
    bench = Bench()
    bench.silent.add(B)
    bench.links[C] = (LinkReport(B, True, 4.0),)
    bench.run(4)
    assert bench.state(B) is RED
    bench.silent.clear()
    bench.links.clear()
    bench.links[B] = (LinkReport(A, False, 0.0, "timed out"),)
    bench.run(0.3)
    bench.detector.stream_broken(A, bench.now)
    assert bench.state(A) is YELLOW
    bench.run(3)
    bench.detector.stream_broken(A, bench.now)
    assert bench.state(A) is RED


def test_neighbours_that_hear_a_silent_member_keep_it_from_red() -> None:
    bench = Bench()
    bench.silent.add(A)
    bench.links[B] = (LinkReport(A, True, 0.05),)
    bench.run(10)
    assert bench.state(A) is YELLOW
    bench.links[B] = (LinkReport(A, True, 5.0),)
    bench.run(0.1)
    assert bench.state(A) is RED


def test_a_link_on_which_nothing_is_expected_is_no_sign_of_life() -> None:
    bench = Bench()
    bench.silent.add(A)
    bench.links[B] = (LinkReport(A, True, 0.0),)
    bench.run(4.9)
    assert bench.state(A) is YELLOW, "nor of death"
    bench.detector.lease_gone("a")
    assert bench.state(A) is RED


def test_red_turns_green_only_after_two_steady_seconds() -> None:
    bench = Bench()
    bench.silent.add(A)
    bench.links[B] = (LinkReport(A, True, 4.0),)
    bench.run(4)
    assert bench.state(A) is RED
    bench.silent.clear()
    bench.links.clear()
    bench.run(1.5)
    bench.silent.add(A)
    bench.run(0.8)  # a gap: it starts again
    bench.silent.clear()
    bench.run(1.8)
    assert bench.state(A) is RED
    bench.run(0.5)
    assert bench.state(A) is GREEN


def test_who_was_outlived_is_dead_however_loudly_it_speaks() -> None:
    bench = Bench()
    bench.detector.registered(Member("a", "2"), bench.now)
    bench.run(5)
    assert bench.state(A) is RED
    bench.detector.registered(A, bench.now)  # etcd names it again: every controller has to agree with etcd
    assert bench.state(A) is GREEN


def test_a_process_that_reported_before_its_predecessors_registration_came_is_not_outlived() -> None:
    bench = Bench()
    newer = Member("a", "3")
    bench.silent.add(A)
    bench.report(newer)  # etcd was away: its own registration comes after that of a process that died since
    bench.detector.registered(Member("a", "2"), bench.now)
    bench.detector.registered(newer, bench.now)
    bench.report(newer)
    assert bench.state(newer) is GREEN
    assert bench.state(Member("a", "2")) is RED


def test_leaving_is_believed_at_once() -> None:
    bench = Bench()
    bench.report(A, leaving=True)
    verdicts = bench.detector.evaluate(bench.now, {})
    assert [(v.member, v.after, v.left) for v in verdicts] == [(A, RED, True)]


def test_the_end_of_a_process_needs_no_second_witness() -> None:
    """Its kernel says so. What is still on its way, and neighbours that heard it a moment ago, say nothing else."""
    bench = Bench()
    bench.report(A)
    bench.links[B] = (LinkReport(A, True, 0.01),)
    bench.report(B)
    bench.detector.ended(A, bench.now)
    bench.report(A)
    verdicts = bench.detector.evaluate(bench.now, {})
    assert [(v.member, v.after, v.evidence) for v in verdicts] == [(A, RED, "its process has ended")]
    assert A in bench.detector.dead()
    assert A not in bench.detector.unsure()
    for _ in range(40):
        bench.now += 0.1
        bench.report(A)
        bench.detector.evaluate(bench.now, {})
    assert bench.state(A) is RED


def test_a_pause_of_this_process_grants_everybody_a_fresh_window() -> None:
    bench = Bench()
    bench.links[B] = (LinkReport(A, True, 20.0),)
    bench.report(B)
    bench.now += 30.0
    bench.detector.advance(bench.now)
    assert {bench.state(m) for m in (A, B, C)} <= {GREEN, YELLOW}
    bench.silent.add(A)
    bench.run(1.0)
    assert bench.state(A) is YELLOW
    bench.run(3.0)
    assert bench.state(A) is RED


def test_a_loaded_machine_makes_silence_cheaper() -> None:
    def after(interval_s: float) -> NodeState:
        bench = Bench()
        for k in range(60):  # uneven, as a loaded machine is
            bench.run(interval_s * (0.4 + 1.2 * (k % 2)), interval_s * (0.4 + 1.2 * (k % 2)))
        bench.silent.add(A)
        bench.links[B] = (LinkReport(A, True, 9.0),)
        bench.run(1.3)
        return bench.state(A)

    assert after(0.1) is RED
    assert after(0.17) is RED
    slow = Arrivals(0.1, 1.2)
    for k in range(100):
        slow.heard(k * 0.5 + (0.3 if k % 2 else 0.0))
    assert slow.phi(1.3) < 12 < Arrivals(0.1, 1.2).phi(1.3)


def test_phi_grows_with_silence_and_stays_finite() -> None:
    arrivals = Arrivals(0.1, 1.2)
    for k in range(1000):
        arrivals.heard(k * 0.1)
    values = [arrivals.phi(t / 50) for t in range(200)]
    assert values == sorted(values)
    assert values[0] < 1
    assert arrivals.phi(1e9) == PHI_MAX


def test_forgotten_when_long_gone_and_not_named() -> None:
    bench = Bench()
    bench.silent.update({A, B})
    for member in (A, B):
        bench.detector.lease_gone(member.node)
    bench.run(61)
    assert bench.detector.forget(frozenset({B}), bench.now) == [A]
    assert bench.detector.state(A) is NodeState.ABSENT
    assert bench.detector.state(C) is GREEN


def test_silence_does_not_count_while_this_process_does_not_get_to_run() -> None:
    bench = Bench()
    for _ in range(8):  # starved: 50 of every 250 ms
        bench.now += 0.25
        bench.detector.advance(bench.now)
        bench.detector.evaluate(bench.now, {})
    assert bench.detector.silent_s(A, bench.now) == pytest.approx(0.8)
    bench.run(0.5)
    assert bench.state(A) is GREEN


def test_a_defect_behind_a_broken_link_is_a_defect() -> None:
    bench = Bench()
    bench.links[B] = (LinkReport(A, False, 0.0, "timed out"),)
    bench.run(0.2)
    bench.poisoned = 2
    bench.report(A)
    bench.detector.evaluate(bench.now, {A: 1.3})
    assert bench.detector.state(A) is RED
    assert bench.detector.faulty() == {A}


def test_a_red_member_that_recovers_on_probation_is_not_used_before_it_is_green() -> None:
    bench = Bench()
    bench.poisoned = 2
    bench.run(0.3)
    assert bench.state(A) is RED
    assert bench.detector.faulty() == {A}
    bench.run(12.0)  # its wrong numbers are forgotten, and it is on probation still
    assert bench.state(A) is RED
    assert bench.detector.demoted() == frozenset()
    bench.run(12.0)
    assert bench.state(A) is GREEN


def test_who_stopped_speaking_is_no_witness_of_others_deaths() -> None:
    bench = Bench()
    bench.links[B] = (LinkReport(A, True, 0.5),)
    bench.run(0.2)
    bench.silent.update({A, B})  # one path to both breaks: what B said last is old news
    bench.run(4.8)
    assert [bench.state(m) for m in (A, B, C)] == [YELLOW, YELLOW, GREEN]


@pytest.mark.parametrize("heard_s", [0.05, 1.0])
def test_a_neighbour_that_hears_it_after_its_stream_broke_speaks_against_death(heard_s: float) -> None:
    bench = Bench()
    bench.links[C] = (LinkReport(A, True, 0.02),)
    bench.silent.add(A)
    bench.detector.stream_broken(A, bench.now)
    bench.run(heard_s)
    bench.links[B] = (LinkReport(A, False, 0.0, "reset"),)
    bench.report(B)
    assert bench.state(A) is (RED if heard_s < 0.1 else YELLOW)


def test_red_that_may_be_alive() -> None:
    """Stopped, or cut off: as long as it is registered. Cut off from here alone: longer than that."""
    stopped = Bench()
    stopped.silent.add(A)
    stopped.links[B] = (LinkReport(A, True, 4.0),)
    stopped.run(2.0)
    assert stopped.detector.unsure() == stopped.detector.red() == {A}
    stopped.detector.lease_gone("a")
    stopped.run(0.1)
    assert (stopped.detector.unsure(), stopped.detector.red()) == (frozenset(), {A})

    cut = Bench()
    cut.silent.add(A)
    cut.detector.lease_gone("a")
    cut.run(4.0)
    assert cut.detector.unsure() == cut.detector.red() == {A}

    killed = Bench()
    killed.detector.stream_broken(A, killed.now)
    killed.links[B] = (LinkReport(A, False, 0.0, "reset"),)
    killed.report(B)
    assert killed.state(A) is RED
    assert not killed.detector.unsure()


@pytest.mark.timeout(30)
def test_silence_that_lacks_less_than_the_clock_can_say_is_no_endless_loop() -> None:
    """What is left of the limit may vanish when it is added to the time."""
    rng, limit_s = random.Random(1), TIMING.suspect_after_s
    starts = [rng.random() * scale for scale in (1.0, 1e3, 1e6) for _ in range(200)]
    vanishing = [
        s for s in starts if (left := limit_s - (s + limit_s - s)) > 0.0 and s + limit_s + left == s + limit_s
    ]
    assert vanishing, "the case that this is about"
    for start in vanishing:
        detector = Detector(TIMING)
        detector.advance(start)
        detector.reported(NodeReport(A, 0, start, 0), start)
        detector.evaluate(start, {})
        for turn in range(1, 20):  # this process runs all the time
            detector.advance(start + limit_s * turn / 20)
        detector.advance(start + limit_s)
        detector.evaluate(start + limit_s, {})
        detector.evaluate(start + limit_s + 0.002, {})
