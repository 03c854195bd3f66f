"""What becomes of requests that a scheduler or a node refuses, and of those that nodes die of."""

from __future__ import annotations

import pytest
from msgspec import structs

from controlplane.contract.ids import Member
from controlplane.contract.requests import RefusalCode
from controlplane.contract.topology import Move, MovePhase, Pipeline, Stage
from dataplane.core.events import Refuse
from tests.core.data.test_kept import resumable
from tests.core.data.test_scheduler import scheduler
from tests.core.gateway.routing import TAIL, A, B, Bench, C, only, pipeline, sent
from web.gateway.errors import of_fail
from web.gateway.routing.events import Fail, FailCode, StreamDown, StreamUp, Tick
from web.gateway.routing.policy import Policy


def test_not_here() -> None:
    bench = Bench(Policy(grace_s=1.0))
    bench.topology(pipeline("p0", A, 1))
    bench.do(StreamUp(A))
    bench.submit()
    for _ in range(40):
        if bench.failed:
            break
        bench.refuse(A, "p0", RefusalCode.NOT_HERE)
        assert sent(bench.do(Tick(), 0.01)) == []
        bench.do(Tick(), 0.02)
    assert bench.failed[1].code is FailCode.UNAVAILABLE
    assert bench.now - 100.0 < 1.1


def test_a_dropped_request_is_submitted_again_as_one_that_was_admitted() -> None:
    """The node hears late that the pipeline was down for a moment: it drops what was submitted for afterwards."""
    bench = Bench()
    bench.topology(pipeline("p0", A, 1))
    bench.do(StreamUp(A))
    bench.submit()
    bench.topology(Pipeline("p0", 2, (Stage(("h",), (A,)), Stage(("t",)))))
    assert len(sent(bench.topology(pipeline("p0", A, 3)))) == 1
    assert sent(bench.refuse(A, "p0", RefusalCode.DROPPED)) == []
    ((member, submit),) = sent(bench.do(Tick(), 0.02))
    assert (member, submit.admitted) == (A, True)


def test_a_dropped_request_follows_the_topology_that_comes_late() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    assert sent(bench.refuse(A, "p0", RefusalCode.DROPPED)) == []
    ((member, submit),) = sent(bench.topology(pipeline("p0", B, 2), pipeline("p1", B, 1)))
    assert (member, submit.pipeline, len(submit.emitted)) == (B, "p0", 1)


def test_overload_only_refuses_what_was_not_admitted() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    ((member, submit),) = sent(bench.refuse(A, "p0", RefusalCode.OVERLOADED))
    assert (member, submit.admitted) == (B, False)
    (fail,) = only(bench.refuse(B, "p1", RefusalCode.OVERLOADED), Fail)
    assert (fail.code, fail.retry_after_s) == (FailCode.OVERLOADED, 3.0)
    bench.submit(2)
    bench.tokens(A, "p0", 1, 0, rid=2)
    bench.do(StreamDown(A))
    bench.do(StreamUp(A))
    # It goes where there may be room, with its tokens, and waits if there is none either.
    ((member, submit),) = sent(bench.refuse(A, "p0", RefusalCode.OVERLOADED, rid=2))
    assert (member, submit.admitted, len(submit.emitted)) == (B, True, 1)
    effects = bench.refuse(B, "p1", RefusalCode.OVERLOADED, rid=2)
    assert (only(effects, Fail), sent(effects)) == ([], [])
    ((_, submit),) = sent(bench.do(Tick(), 3.5))
    assert (submit.rid, len(submit.emitted)) == (2, 1)


def test_final_refusals() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    assert bench.refuse(B, "p1", RefusalCode.INVALID) == []  # not where it runs
    (fail,) = only(bench.refuse(A, "p0", RefusalCode.INVALID), Fail)
    assert fail.code is FailCode.INVALID


def test_numbers_that_are_not_finite_are_tried_once_more_elsewhere() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    ((member, submit),) = sent(bench.poison(A, "p0", "a"))
    assert (member, submit.emitted, submit.admitted) == (B, (1000,), True)
    (fail,) = only(bench.poison(B, "p1", "b"), Fail)  # on another node, too: it is the request
    assert fail.code is FailCode.QUARANTINED
    assert bench.router.counts["quarantined"] == 1


def test_a_poisoned_request_waits_until_the_node_is_replaced() -> None:
    bench = Bench()
    bench.topology(pipeline("p0", A, 1))
    bench.do(StreamUp(A))
    bench.submit()
    assert sent(bench.poison(A, "p0", TAIL.node)) == []
    assert sent(bench.do(Tick(), 1.0)) == []
    healed = Pipeline("p0", 2, (Stage(("h",), (A,)), Stage(("t",), (C,))))
    assert [member for member, _ in sent(bench.topology(healed))] == [A]
    assert not bench.failed


@pytest.mark.parametrize("phase", MovePhase)  # older leaders say by it that the switch was planned
def test_poison_is_quarantined_and_planned_moves_do_not_count(phase: MovePhase) -> None:
    bench = Bench()
    moved = 2 if phase is MovePhase.COPY else 0
    move = Move(0, B, "hand-back", phase)
    bench.topology(pipeline("p0", A, 1))
    bench.do(StreamUp(A))
    bench.submit()
    bench.topology(pipeline("p0", A, 1, move))
    bench.topology(structs.replace(pipeline("p0", B, 2), moved=moved))
    heads = [Member(f"x{n}", "1") for n in range(3)]
    for n, head in enumerate([B, *heads[:2]]):
        bench.do(StreamUp(head))
        assert not bench.failed, n
        bench.topology(pipeline("p0", heads[n], 3 + n))
    assert bench.failed[1].code is FailCode.QUARANTINED
    assert bench.router.counts["quarantined"] == 1


def test_a_death_whose_copy_takes_over_in_the_midst_of_a_move_counts() -> None:
    bench = Bench()
    x = Member("x", "1")
    bench.topology(pipeline("p0", A, 1, Move(0, B, "hand-back")))
    bench.do(StreamUp(A))
    bench.submit()
    for epoch, head in enumerate((B, x), start=2):
        bench.topology(pipeline("p0", head, epoch))
        bench.do(StreamUp(head))
    assert not bench.failed
    bench.topology(pipeline("p0", A, 4))
    assert bench.failed[1].code is FailCode.QUARANTINED


@pytest.mark.parametrize("dropped", [False, True])
def test_deaths_count_although_the_stream_breaks_before_the_topology_says_so(dropped: bool) -> None:
    """As it is with every scheduler that dies: its connections do so at once."""
    bench = Bench()
    heads = [Member(f"x{n}", "1") for n in range(4)]
    bench.topology(pipeline("p0", heads[0], 1))
    bench.do(StreamUp(heads[0]))
    bench.submit()
    bench.do(StreamDown(heads[0]))
    bench.do(StreamUp(heads[0]))  # nobody died
    for n in range(3):
        assert not bench.failed, n
        if dropped:
            bench.refuse(heads[n], "p0", RefusalCode.DROPPED)
        else:
            bench.do(StreamDown(heads[n]))
        bench.topology(Pipeline("p0", 3 * n + 2, (Stage(("h",)), Stage(("t",), (TAIL,)))))
        bench.topology(pipeline("p0", heads[n + 1], 3 * n + 3))
        bench.do(StreamUp(heads[n + 1]))
    assert bench.failed[1].code is FailCode.QUARANTINED


def test_another_body_under_the_key_of_a_request_that_runs_is_422() -> None:
    """A scheduler's words say so: its code is the one for all that can never run."""
    made = scheduler(stages=1)
    made.step(resumable(), 0.0)
    (refuse,) = [
        effect for effect in made.step(resumable(session=2, length=5), 0.1) if isinstance(effect, Refuse)
    ]
    assert refuse.message.code is RefusalCode.INVALID
    assert of_fail(FailCode.INVALID, refuse.message.message, 0.0).status == 422
    assert of_fail(FailCode.INVALID, "the prompt is too long", 0.0).status == 400
