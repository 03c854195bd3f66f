"""Game days: guard rails, the course of faults, pauses by fault, plans and reports. No clock, no process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from controlplane.contract.errors import RequestError
from controlplane.contract.ids import Member
from controlplane.contract.status import (
    ClusterStatus,
    ControllerStatus,
    GatewayStatus,
    NodeState,
    NodeStatus,
    PipelineState,
    PipelineStatus,
    StageStatus,
)
from controlplane.contract.topology import Mode
from controlplane.kfadmin.chaos.gameday import (
    SETTLE_S,
    Begin,
    Begun,
    CalledOff,
    Effect,
    Failed,
    Finish,
    GameDay,
    Looked,
    Phase,
    Suffered,
    Undo,
    Undone,
)
from controlplane.kfadmin.chaos.judge import Pauses, parts_at, silence_s
from controlplane.kfadmin.chaos.page import page
from controlplane.kfadmin.chaos.plan import Fault, FaultKind, Plan, Role, drawn, load_plan, role_of
from controlplane.kfadmin.chaos.report import FaultReport, Outcome, Report
from controlplane.kfadmin.chaos.sight import Sight, look
from controlplane.kfadmin.loadgen import Prompt, Stream

PROCESSES = ["c1", "c2", "etcd0", "g1", "g2", "launcher", "n0", "n1", "n2", "n3", "relay"]
HOME = Looked(Sight({}, leader="c1"))
KILL, STOP, AWAY, DRAIN = FaultKind.KILL, FaultKind.STOP, FaultKind.AWAY, FaultKind.DRAIN


def day(*faults: Fault, **settings: object) -> GameDay:
    return GameDay(msgspec.convert({"faults": faults, **settings}, Plan), PROCESSES, 100.0)


def lacks(**away: str) -> Looked:
    return Looked(Sight(away, leader="c1"))


def begun(effects: list[Effect]) -> list[str]:
    return [effect.target for effect in effects if isinstance(effect, Begin)]


def test_the_next_fault_waits_until_all_is_home() -> None:
    course = day(Fault(0, KILL, "n0"), Fault(0, KILL, "n1"))
    assert begun(course.step(HOME, 100)) == ["n0"]
    assert course.step(HOME, 101) == []  # it has not been performed yet
    assert course.step(Begun(1), 101) == []
    assert course.step(HOME, 101.5) == []  # the status may be from before the kill
    assert course.step(lacks(n0="is red"), 101 + SETTLE_S) == []
    assert course.step(HOME, 110) == [Begin(2, KILL, "n1", 3.0)]
    course.step(Begun(2), 110)
    assert course.step(HOME, 112) == [Finish("")]
    assert [one.phase for one in course.courses] == [Phase.HOME, Phase.HOME]
    assert course.courses[0].home == 110
    assert course.step(HOME, 113) == []  # it finishes once


def test_those_that_are_away_by_themselves_count() -> None:
    course = day(Fault(0, KILL, "n0"), Fault(0, KILL, "n1"), Fault(0, KILL, "n2"), max_unavailable=2)
    assert begun(course.step(lacks(n3="is red"), 100)) == ["n0"]
    course = day(Fault(0, KILL, "n0"), Fault(0, KILL, "n1"), Fault(0, KILL, "n2"), max_unavailable=2)
    assert begun(course.step(HOME, 100)) == ["n0", "n1"]
    course = day(Fault(0, KILL, "n0"))
    assert begun(course.step(lacks(n3="is red"), 100)) == []
    assert begun(course.step(Looked(Sight({}, "nobody leads")), 101)) == []
    assert begun(course.step(Looked(None, "refused"), 102)) == []


def test_one_target_is_not_taken_twice_and_the_leader_is_who_leads_then() -> None:
    course = day(
        Fault(0, KILL, "leader"), Fault(0, STOP, "controller"), Fault(0, KILL, "c2"), max_unavailable=3
    )
    assert begun(course.step(Looked(Sight({}, leader="c2")), 100)) == ["c2", "c1"]


def test_what_lasts_is_undone_after_its_time() -> None:
    course = day(Fault(5, STOP, "n2", 2.0))
    assert course.step(HOME, 104.9) == []
    assert course.step(HOME, 105) == [Begin(1, STOP, "n2", 2.0)]
    course.step(Begun(1), 105.1)
    assert course.step(HOME, 106.9) == []
    assert course.step(lacks(n2="is red"), 107.1) == [Undo(1, STOP, "n2")]
    assert course.step(HOME, 107.2) == []
    course.step(Undone(1), 107.3)
    assert course.step(HOME, 108.4) == [Finish("")]
    assert (course.courses[0].began, course.courses[0].undone) == (105, 107.3)


@pytest.mark.parametrize(
    ("event", "why"),
    [(Suffered("stream 3 differs"), "stream 3 differs"), (CalledOff(), "called off by the operator")],
)
def test_a_day_that_is_called_off_is_mended_before_it_ends(event: Suffered | CalledOff, why: str) -> None:
    course = day(Fault(0, AWAY, "n2", 60.0), Fault(1, KILL, "n0"), for_s=600)
    course.step(HOME, 100)
    course.step(Begun(1), 100)
    assert course.step(event, 101) == [Undo(1, AWAY, "n2")]
    assert course.step(event, 101) == []
    assert course.step(lacks(n2="does not run"), 102) == []
    course.step(Undone(1), 102)
    assert course.step(lacks(n2="does not run"), 104) == []
    assert course.step(HOME, 105) == [Finish(why)]
    assert [one.phase for one in course.courses] == [Phase.HOME, Phase.NOT_BEGUN]


def test_a_fault_under_way_as_it_is_called_off_is_undone_once_it_has_begun() -> None:
    course = day(Fault(0, DRAIN, "n2", 60.0))
    course.step(HOME, 100)
    assert course.step(CalledOff(), 101) == []  # the drain has not ended: there is nothing to undo yet
    assert course.step(HOME, 101) == []
    assert course.step(Begun(1), 103) == [Undo(1, DRAIN, "n2")]


def test_a_cluster_that_does_not_come_home_ends_the_day() -> None:
    course = day(Fault(0, KILL, "n0"), Fault(1, KILL, "n1"), home_max_s=30)
    course.step(HOME, 100)
    course.step(Begun(1), 100)
    assert course.step(lacks(n0="is red"), 129) == []
    (finish,) = course.step(lacks(n0="is red"), 131)
    assert finish == Finish("not home after 30 s: n0 is red")
    assert course.courses[0].phase is Phase.HEALING


def test_controllers_that_do_not_answer_end_the_day() -> None:
    course = day(Fault(50, KILL, "n0"), home_max_s=30)
    assert course.step(Looked(None, "refused"), 129) == []
    assert course.step(Looked(None, "refused"), 131) == [
        Finish("not home after 30 s: no controller answers: refused")
    ]


def test_a_refused_fault_changes_nothing_and_one_that_cannot_be_undone_ends_the_day() -> None:
    course = day(Fault(0, DRAIN, "n0"), Fault(0, STOP, "n1"), Fault(0, KILL, "n2"))
    course.step(HOME, 100)
    assert course.step(Failed(1, "nobody else serves stage 0"), 101) == []
    assert begun(course.step(HOME, 102)) == ["n1"]
    course.step(Begun(2), 102)
    assert course.step(HOME, 105) == [Undo(2, STOP, "n1")]
    course.step(Failed(2, "not permitted"), 105)
    assert course.step(HOME, 106) == [Finish("fault 2 could not be undone: not permitted")]
    assert [one.phase for one in course.courses] == [Phase.REFUSED, Phase.STUCK, Phase.NOT_BEGUN]


def test_the_load_goes_on_for_the_whole_time_and_no_fault_begins_after_it() -> None:
    course = day(Fault(0, KILL, "n0"), Fault(1, KILL, "n1"), for_s=60)
    course.step(HOME, 100)
    course.step(Begun(1), 100)
    assert course.step(lacks(n0="is red"), 161) == []  # the day does not end on an open fault
    assert course.step(HOME, 165) == [Finish("")]
    assert course.courses[1].phase is Phase.NOT_BEGUN
    assert day(for_s=60).step(HOME, 159) == []
    assert day(for_s=60).step(HOME, 160) == [Finish("")]


# ---- what is seen


def seen(nodes: Mapping[str, int], **changed: object) -> ClusterStatus:
    member = {name: Member(name, "aaaa") for name in nodes}
    stages = [StageStatus((name,), (member[name],), False, (Member("other", "bbbb"),), 0) for name in nodes]
    up = tuple(PipelineStatus(f"p{i}", PipelineState.UP, 1, (stage,), 0, 0) for i, stage in enumerate(stages))
    status = ClusterStatus(
        "kf", "g", "m", Mode.REPLICATE, True, 1, False, "c1", "c1", 0.0,
        tuple(NodeStatus(name, NodeState.GREEN, pid=pid) for name, pid in nodes.items()), up,
        (ControllerStatus("c1", "", 11, True),), (GatewayStatus("g1", "", 21),), (),
    )  # fmt: skip
    return msgspec.structs.replace(status, **changed)


def test_who_is_away() -> None:
    pids = {"c1": 11, "g1": 21, "n0": 31, "n1": 32, "launcher": 5}
    status = seen({"n0": 31, "n1": 32})
    assert look(status, pids, pids).home
    killed = {name: pid for name, pid in pids.items() if name != "n1"}
    assert look(status, killed, pids).away == {"n1": "does not run"}
    assert look(status, {**pids, "n1": 99}, pids).away == {"n1": "has not joined"}
    assert look(status, {**pids, "g1": 99}, pids).away == {"g1": "has not joined"}
    assert look(seen({"n0": 31, "n1": 32}, paused=True), pids, pids).amiss.startswith("automation is paused")
    assert look(seen({"n0": 31, "n1": 32}, leader=""), pids, pids).amiss == "nobody leads"
    first, second = status.pipelines
    lent = msgspec.structs.replace(second.stages[0], serving=(Member("n0", "aaaa"),), borrowed=True)
    borrowed = msgspec.structs.replace(second, stages=(lent,))
    assert look(seen({"n0": 31, "n1": 32}, pipelines=(first, borrowed)), pids, pids).away == {
        "n1": "does not serve p1/0"
    }
    bare = msgspec.structs.replace(second.stages[0], replicas=())
    uncopied = msgspec.structs.replace(second, stages=(bare,))
    found = look(seen({"n0": 31, "n1": 32}, pipelines=(first, uncopied)), pids, pids)
    assert (found.amiss, found.home) == ("p1/0 has no copy", False)


# ---- streams


def stream(sent: float, *times: float, ended: float = 0.0) -> Stream:
    return Stream(Prompt("a", 1), list(range(len(times))), list(times), sent=sent, ended=ended)


def test_where_a_stream_parts_from_its_reference() -> None:
    assert parts_at([1, 2], [1, 2, 3]) is None
    assert parts_at([1, 9], [1, 2, 3]) == 1
    assert parts_at([1, 9], [1, 2, 3], 2) is None
    assert parts_at([1, 2, 3, 4], [1, 2, 3]) == 3


def test_silence_is_of_streams_that_run() -> None:
    assert silence_s(stream(10.0), 12.0) == 2.0
    assert silence_s(stream(10.0, 11.5), 12.0) == 0.5
    assert silence_s(stream(10.0, 11.5, ended=11.6), 12.0) == 0.0
    assert silence_s(Stream(Prompt("a", 1)), 12.0) == 0.0  # not sent


def test_pauses_belong_to_the_faults_that_were_open() -> None:
    course = day(Fault(0, KILL, "n0"), Fault(0, KILL, "n1"), Fault(0, KILL, "n2"))
    first, second, _ = course.courses
    first.began, first.home = 10.0, 12.0
    second.began = 20.0  # not home yet
    pauses = Pauses()
    whole = pauses.take(stream(9.0, 9.5, 11.0, 11.2, 15.0, 21.0, 21.1, ended=21.2), course.courses, 21.2)
    assert whole == 6.0
    assert pauses.by_fault == {0: [0.5], 1: [pytest.approx(3.8)], 2: [1.0]}
    pauses.take(stream(16.0, 16.1, ended=17.0), course.courses, 21.2)
    assert (pauses.streams(0), pauses.worst(0), pauses.streams(3), pauses.worst(3)) == (2, 0.5, 0, None)


# ---- plans


def test_a_plan_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "day.toml"
    for text, told in (
        ("streams = 0", "`int` >= 1"),
        ("pauses = 3", "unknown field `pauses`"),
        ("faults = 3 4", "day.toml"),
        ('[[faults]]\nat_s = 1\nkind = "kill"\ntarget = "db"', "'db' is no process"),
        ('[[faults]]\nat_s = 1\nkind = "drain"\ntarget = "g1"', "drain is for node"),
        ('[[faults]]\nat_s = 1\nkind = "stop"\nfor_s = 0', "stop needs for_s"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=told):
            load_plan(file, {})
    with pytest.raises(RequestError, match="cannot read"):
        load_plan(tmp_path / "none.toml", {})
    file.write_text(
        'tokens = 64\n[[faults]]\nat_s = 9\nkind = "kill"\n[[faults]]\nat_s = 1\nkind = "away"\nfor_s = 2'
    )
    plan = load_plan(file, {"streams": 3})
    assert (plan.tokens, plan.streams, [fault.at_s for fault in plan.faults]) == (64, 3, [1.0, 9.0])
    assert plan.faults[1].target == "node"


def test_what_is_drawn_depends_on_the_seed_and_spares_the_last_of_a_role() -> None:
    assert drawn(7, 600, 20, PROCESSES) == drawn(7, 600, 20, PROCESSES)
    assert drawn(7, 600, 20, PROCESSES) != drawn(8, 600, 20, PROCESSES)
    small = ["c1", "etcd0", "g1", "launcher", "n0", "n1", "relay"]
    faults = [fault for seed in range(20) for fault in drawn(seed, 600, 5, small)]
    assert {fault.target for fault in faults} == {Role.NODE, Role.LAUNCHER, Role.RELAY}
    assert all(0 < fault.at_s < 600 for fault in faults)
    load_plan(None, {"faults": drawn(3, 6000, 1, PROCESSES)})  # all of them make sense
    with pytest.raises(RequestError, match="nothing can be taken"):
        drawn(1, 600, 20, ["c1", "g1", "n0", "etcd0"])


def test_roles_by_name() -> None:
    assert [role_of(name) for name in ("n12", "g1", "c2", "etcd0", "relay", "nx", "leader")] == [
        Role.NODE, Role.GATEWAY, Role.CONTROLLER, Role.ETCD, Role.RELAY, None, None,
    ]  # fmt: skip


def test_the_page_escapes_what_it_shows() -> None:
    fault = FaultReport(1, "kill", "n0", "home", 1.0, 1.0, 0.1, 2.0, 3, 0.1, 0.2, {"detect": 0.1}, "<b>")
    outcome = Outcome(1, 5, 0.0, 1.0, 64, False, 0, 0.2, "<script>alert(1)</script>")
    text = page(Report(False, "1 < 2", "kf", "m&m", 1.7e9, 9.0, Plan(), [fault], [outcome], 64, 1, None))
    assert "<script" not in text
    assert "<b>" not in text
    assert "FAILED: 1 &lt; 2" in text
    assert "m&amp;m" in text
    assert text.count("<rect") == 2
