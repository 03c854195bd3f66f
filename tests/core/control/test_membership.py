"""Who may be given a duty."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, PipelineReport
from controlplane.contract.topology import Topology
from controlplane.core.detector import Detector
from controlplane.core.edit import initial, successor, with_stage
from controlplane.core.membership import Membership
from tests.core.control.world import make_config, make_record

CONFIG = make_config(3, 2)


def members(**changes: object) -> Membership:
    """Six nodes that were heard; n4 with changes to its record."""
    return of({4: changes}, checkpoint="a")


def of(changes: dict[int, dict[str, object]], **every: object) -> Membership:
    """The same, with changes to several records, and to `every` one."""
    membership = Membership(CONFIG, Detector(CONFIG.timing))
    for k in range(6):
        record = replace(make_record(CONFIG, f"n{k}", "i", k % 2), **{**every, **changes.get(k, {})})
        membership.register(record, 10.0)
        membership.detector.reported(NodeReport(record.member, 1, 0.0, 1), 10.0)
    membership.detector.evaluate(10.0, {})
    return membership


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weights_digest": "other"}, "weights"),
        ({"checkpoint": "other"}, "its checkpoint"),
        ({"num_stages": 4}, "of 4"),
        ({"block_size": 32}, "32 tokens"),
        ({"stage": 7}, "stage 7"),
    ],
)
def test_unfit_nodes_are_named_and_not_used(changes: dict[str, object], why: str) -> None:
    nodes = members(**changes).nodes(None)
    assert nodes.usable("n4") is None
    assert why in nodes.views["n4"].why_not
    assert nodes.usable("n0") == Member("n0", "i")


def test_the_weights_that_serve_are_right_even_in_the_minority() -> None:
    membership = members(weights_digest="other")
    topology = initial(CONFIG, 1)
    serving = with_stage(topology.pipelines[2], 0, ranks=(Member("n4", "i"),))
    nodes = membership.nodes(successor(topology, serving))
    assert nodes.usable("n4") == Member("n4", "i")
    assert nodes.usable("n0") is None


def usable(membership: Membership, topology: Topology | None = None) -> list[int]:
    nodes = membership.nodes(topology)
    return [k for k in range(6) if nodes.usable(f"n{k}")]


def holding(*serving: int) -> Topology:
    """A topology in which these serve at home."""
    topology = initial(CONFIG, 1)
    pipelines = list(topology.pipelines)
    for k in serving:
        pipelines[k // 2] = with_stage(pipelines[k // 2], k % 2, ranks=(Member(f"n{k}", "i"),))
    return replace(topology, pipelines=tuple(pipelines))


def fine_tune(*nodes: int) -> dict[int, dict[str, object]]:
    """These hold another checkpoint, of other weights in each stage."""
    return {k: {"weights_digest": f"tuned-{k % 2}", "checkpoint": "tuned"} for k in nodes}


def test_stages_of_two_checkpoints_never_stand_side_by_side() -> None:
    """All stages 0 are of one checkpoint and all stages 1 of another: in neither stage is there anything to compare,
    and pipelines of both would answer."""
    a_only, tuned_only = [0, 2, 4], [1, 3, 5]
    assert usable(of(fine_tune(1, 3, 5), checkpoint="a")) == a_only
    assert usable(of(fine_tune(1, 3, 5), checkpoint="a"), holding(1)) == tuned_only, "what serves counts"


def test_one_checkpoint_counts_for_all_stages() -> None:
    """Most nodes of stage 0 hold what most nodes of the group do not."""
    changes = {**fine_tune(0, 2), 5: {"checkpoint": ""}}
    assert usable(of(changes, checkpoint="a")) == [1, 3, 4, 5]
    assert usable(of(fine_tune(0, 2), checkpoint="a"), holding(0)) == [0, 2]


def test_checkpoints_may_have_a_stage_in_common() -> None:
    """A fine-tune of the last layers alone: its stage 0 is known by its checkpoint only."""
    changes = {4: {"checkpoint": "tuned"}, **fine_tune(5)}
    assert usable(of(changes, checkpoint="a")) == [0, 1, 2, 3]


def test_who_does_not_say_its_checkpoint_is_not_locked_out() -> None:
    """Nodes of the code before, in a rolling upgrade; what they serve counts by its weights."""
    assert usable(of({4: {"checkpoint": "a"}})) == [0, 1, 2, 3, 4, 5]
    upgraded = {0: {"checkpoint": "a"}, **fine_tune(5)}
    assert usable(of(upgraded), holding(2)) == [0, 1, 2, 3, 4]
    # The first two that say one, and the wrong one is heard first.
    assert usable(of({1: {"checkpoint": "was"}, **fine_tune(0)}), holding(2, 3)) == [1, 2, 3, 4, 5]


def test_another_checkpoint_counts_once_most_nodes_hold_it() -> None:
    membership = of(fine_tune(4, 5), checkpoint="a")
    assert usable(membership) == [0, 1, 2, 3]
    for k, changes in fine_tune(0, 1).items():
        membership.register(replace(make_record(CONFIG, f"n{k}", "i", k % 2), **changes), 10.0)
    assert usable(membership) == [0, 1, 4, 5]


def test_another_groups_nodes_are_not_ours() -> None:
    assert "n4" not in members(group="other").nodes(None).views


def test_no_duty_without_a_registration_and_none_before_the_first_report() -> None:
    membership = members()
    membership.gone("n1")
    membership.register(make_record(CONFIG, "n5", "fresh", 1), 10.0)
    membership.detector.evaluate(10.0, {})
    nodes = membership.nodes(None)
    assert nodes.usable("n1") is None
    assert nodes.usable("n5") is None
    assert not nodes.is_dead(Member("n1", "i"))
    assert nodes.is_dead(Member("n5", "i"))  # outlived


def test_the_stage_that_lacks_a_step_its_predecessor_has_is_to_blame() -> None:
    membership = members()
    topology = initial(CONFIG, 1)
    pipeline = topology.pipelines[0]
    for index in (0, 1):
        pipeline = with_stage(pipeline, index, ranks=(Member(f"n{index}", "i"),))
    topology = successor(topology, pipeline)

    def blame(steps: tuple[int, int], stalled_s: float = 3.0, unanswered: int = -1) -> dict[Member, float]:
        for index, last in enumerate(steps):
            own = {"stalled_s": stalled_s, "unanswered": unanswered} if index == 0 else {}
            said = PipelineReport("p0", 2, index, last, **own)
            member = Member(f"n{index}", "i")
            membership.reports[member] = NodeReport(member, 1, 0.0, 1, pipelines=(said,))
        return membership.nodes(topology).stalled(topology)

    assert blame((5, 4)) == {Member("n1", "i"): 3.0}
    assert blame((5, 5)) == {Member("n0", "i"): 3.0}
    assert blame((5, 4), stalled_s=0.0) == {}
    assert blame((-1, -1), unanswered=1) == {Member("n1", "i"): 3.0}, "it has not said what it holds"


@pytest.mark.parametrize(
    ("heard", "of_a_step", "of_an_answer"),
    [
        ("n0 n1 n2", ["n2"], ["n2"]),
        ("n0 n1", ["n2"], ["n2"]),
        ("n0 n2", ["n2"], ["n2"]),
        (
            "n0",
            [],
            ["n2"],
        ),  # the scheduler knows who owes an answer; who lacks a step is read off others' reports
        ("n1 n2", [], []),
    ],
)
def test_whose_word_it_takes_to_blame(heard: str, of_a_step: list[str], of_an_answer: list[str]) -> None:
    config = make_config(1, 3)
    topology = initial(config, 1)
    pipeline = topology.pipelines[0]
    for index in range(3):
        pipeline = with_stage(pipeline, index, ranks=(Member(f"n{index}", "i"),))
    topology = successor(topology, pipeline)
    for unanswered, blamed in ((-1, of_a_step), (2, of_an_answer)):
        membership = Membership(config, Detector(config.timing))
        for index, last_step in enumerate((5, 5, 4)):
            own = {"stalled_s": 3.0, "unanswered": unanswered} if index == 0 else {}
            said = PipelineReport("p0", 2, index, last_step, **own)
            report = NodeReport(Member(f"n{index}", "i"), 1, 0.0, 1, pipelines=(said,))
            membership.register(make_record(config, f"n{index}", "i", index), 10.0)
            membership.detector.reported(report, 20.0 if f"n{index}" in heard else 10.0)
            membership.reported(report)
        assert [member.node for member in membership.stalled(topology, 20.0)] == blamed


def test_counters_that_a_report_does_not_bring_stand_as_last_said() -> None:
    membership, member = members(), Member("n0", "i")
    membership.reported(NodeReport(member, 1, 0.0, 1, counters={"x": 3}))
    membership.reported(NodeReport(member, 2, 0.0, 2))
    assert (membership.reports[member].progress, membership.reports[member].counters) == (2, {"x": 3})
