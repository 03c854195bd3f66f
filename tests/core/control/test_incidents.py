"""From events to incidents: one row a failure, whatever else happened in between."""

from __future__ import annotations

from controlplane.contract.events import Event, EventKind
from controlplane.contract.ids import Member
from controlplane.contract.reports import RecoveryReport
from controlplane.contract.status import NodeState
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.core import narrate
from controlplane.core.detector import Verdict
from controlplane.history.incidents import incidents

Rows = list[tuple[int, Event]]
N1, N2, N5, N6 = Member("n1", "a"), Member("n2", "a"), Member("n5", "a"), Member("n6", "a")


def rows(*events: Event) -> Rows:
    return list(enumerate(events, 1))


def death(member: Member, at: float, silent_s: float = 0.5, left: bool = False) -> Event:
    """As the controller tells it."""
    verdict = Verdict(
        member, NodeState.GREEN, NodeState.RED, "stream and link broken", silent_s, known=True, left=left
    )
    return narrate.of_verdict(verdict, at)


def topology(counter: int, *pipelines: Pipeline) -> Topology:
    return Topology("default", counter, Mode.REPLICATE, pipelines)


def pipeline(name: str, epoch: int, *ranks: Member | None) -> Pipeline:
    stages = tuple(Stage(homes=(f"n{i}",), ranks=() if m is None else (m,)) for i, m in enumerate(ranks))
    return Pipeline(name, epoch, stages)


def switch(before: Pipeline, after: Pipeline, dead: dict[Member, float], at: float) -> list[Event]:
    return list(narrate.of_topology(topology(1, before), topology(2, after), dead, at))


def recovery(name: str, epoch: int, seen: float, planned: bool = False, streams: int = 7) -> Event:
    report = RecoveryReport(name, epoch, seen, seen + 0.1, seen + 0.3, seen + 0.6, streams, 21, planned)
    return narrate.of_recovery(report, "n0", seen + 0.7)


def test_a_failure_with_all_its_phases() -> None:
    moved = switch(pipeline("p0", 4, N1, N2), pipeline("p0", 9, N5, N2), {N1: 0.05}, 100.05)
    (found,) = incidents(rows(death(N1, 100.0), *moved, recovery("p0", 9, 100.1)))
    assert (found.id, found.node, found.incarnation) == (1, "n1", "a")
    assert found.cause == "stream and link broken"
    assert (found.began_unix_s, found.detect_s) == (99.5, 0.5)
    (one,) = found.affected
    assert (one.pipeline, one.epoch, one.chosen) == ("p0", 9, "stage 0: n1 -> n5")
    assert (one.plan_s, one.connect_s, one.restore_s, one.first_token_s) == (0.05, 0.1, 0.2, 0.3)
    assert (one.streams, one.tokens_recomputed, found.streams) == (7, 21, 7)
    assert abs(found.ended_unix_s - 100.7) < 1e-6
    assert found.over


def test_a_node_of_two_pipelines_is_one_failure() -> None:
    first = switch(pipeline("p0", 4, N1), pipeline("p0", 9, N5), {N1: 0.1}, 100.1)
    second = switch(pipeline("p1", 5, N1), pipeline("p1", 10, N6), {N1: 0.2}, 100.2)
    events = [death(N1, 100.0), *first, *second, recovery("p1", 10, 100.3), recovery("p0", 9, 104.0)]
    (found,) = incidents(rows(*events))
    assert [one.pipeline for one in found.affected] == ["p0", "p1"]
    assert found.slowest is not None
    assert found.slowest.pipeline == "p0"
    assert found.streams == 14
    (open_,) = incidents(rows(*events[:-1]))
    assert not open_.over
    assert open_.ended_unix_s == 0.0
    assert open_.slowest is not None
    assert open_.slowest.pipeline == "p0"


def test_two_that_die_together_are_two_failures_of_one_switch() -> None:
    moved = switch(pipeline("p0", 4, N1, N2), pipeline("p0", 9, N5, N6), {N1: 0.1, N2: 0.05}, 100.1)
    found = incidents(rows(death(N1, 100.0), death(N2, 100.05), *moved, recovery("p0", 9, 100.2)))
    assert [(one.node, one.affected[0].epoch, one.over) for one in found] == [
        ("n1", 9, True),
        ("n2", 9, True),
    ]


def test_a_failure_during_a_recovery_ends_both_and_has_the_phases() -> None:
    first = switch(pipeline("p0", 4, N1, N2), pipeline("p0", 9, N5, N2), {N1: 0.1}, 100.1)
    second = switch(pipeline("p0", 9, N5, N2), pipeline("p0", 11, N5, N6), {N2: 0.1}, 100.5)
    found = incidents(rows(death(N1, 100.0), *first, death(N2, 100.4), *second, recovery("p0", 11, 100.6)))
    assert [one.over for one in found] == [True, True]
    assert [one.affected[0].connect_s for one in found] == [None, 0.1]
    assert found[0].ended_unix_s == found[1].ended_unix_s


def test_a_pipeline_that_nobody_can_serve_is_down_until_it_serves_again() -> None:
    moved = switch(pipeline("p0", 4, N1), pipeline("p0", 9, None), {N1: 0.1}, 100.1)
    assert [event.kind for event in moved] == [EventKind.EPOCH, EventKind.UNAVAILABLE]
    (found,) = incidents(rows(death(N1, 100.0), *moved))
    assert (found.affected[0].down, found.over) == (True, False)
    back = switch(pipeline("p0", 9, None), pipeline("p0", 12, N5), {}, 160.0)
    (found,) = incidents(rows(death(N1, 100.0), *moved, *back, recovery("p0", 12, 160.1)))
    assert (found.affected[0].down, found.over) == (True, True)
    assert abs(found.ended_unix_s - 160.7) < 1e-6


def test_who_served_nothing() -> None:
    (found,) = incidents(rows(death(N1, 100.0)))
    assert (found.affected, found.over, found.streams, found.slowest) == ((), True, 0, None)


def test_who_left_is_told_only_if_it_was_missed() -> None:
    assert incidents(rows(death(N1, 100.0, left=True))) == []
    moved = switch(pipeline("p0", 4, N1), pipeline("p0", 9, N5), {N1: 0.1}, 100.1)
    (found,) = incidents(rows(death(N1, 100.0, left=True), *moved))
    assert found.affected[0].epoch == 9


def test_planned_moves_and_news_of_others_are_no_incidents() -> None:
    moved = switch(pipeline("p0", 4, N1), pipeline("p0", 9, N5), {}, 100.1)
    assert incidents(rows(*moved, recovery("p0", 9, 100.2, planned=True))) == []
    first = switch(pipeline("p0", 4, N1), pipeline("p0", 9, N5), {N1: 0.1}, 100.1)
    late = [recovery("p1", 12, 101.0), recovery("p0", 4, 99.0)]  # another pipeline's; and of an epoch before
    (found,) = incidents(rows(death(N1, 100.0), *first, *late))
    assert not found.over


def test_a_process_that_dies_twice_is_two_failures() -> None:
    """It was only silent, came back as a blank node, and was lost for good later."""
    first = switch(pipeline("p0", 4, N1), pipeline("p0", 9, N5), {N1: 0.1}, 100.1)
    again = switch(pipeline("p0", 12, N1), pipeline("p0", 14, N5), {N1: 0.1}, 200.1)
    events = [
        death(N1, 100.0),
        *first,
        recovery("p0", 9, 100.2),
        death(N1, 200.0),
        *again,
        recovery("p0", 14, 200.2),
    ]
    found = incidents(rows(*events))
    assert [(one.began_unix_s, one.affected[0].epoch, one.over) for one in found] == [
        (99.5, 9, True),
        (199.5, 14, True),
    ]


def test_what_an_older_release_wrote_is_read() -> None:
    """One member in "died", and details that are missing."""
    epoch = Event(EventKind.EPOCH, "p0", "p0: stage 0: n1 -> n5", 100.1, 9, {"died": "n1@a", "plan_s": 0.1})
    bare = Event(EventKind.DIED, "n1", "n1 died", 100.0, details={"incarnation": "a"})
    told = Event(EventKind.RECOVERED, "p0", "p0 serves again", 101.0, 9)
    (found,) = incidents(rows(bare, epoch, told))
    assert (found.cause, found.detect_s, found.began_unix_s) == ("n1 died", 0.0, 100.0)
    assert (found.affected[0].ended_unix_s, found.affected[0].connect_s) == (101.0, None)
