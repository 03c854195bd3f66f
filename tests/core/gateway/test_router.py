"""The router by direct calls: where requests go, and what becomes of them when the world changes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.contract.requests import FinishReason, RefusalCode, Token, Tokens
from controlplane.contract.topology import Mode, Pipeline, Stage
from tests.core.gateway.routing import TAIL, A, B, Bench, C, only, pipeline, right, sent, topology
from web.gateway.routing.events import (
    CancelAsked,
    CloseStream,
    Deliver,
    Fail,
    FailCode,
    OpenStream,
    SendCancel,
    ShutDown,
    StreamDown,
    StreamUp,
    Tick,
    TokensReceived,
    TopologySeen,
)
from web.gateway.routing.policy import Policy


def test_streams_follow_the_topology() -> None:
    bench = Bench()
    assert only(bench.topology(pipeline("p0", A, 1)), OpenStream) == [OpenStream(A)]
    effects = bench.topology(pipeline("p0", B, 2))
    assert [e for e in effects if isinstance(e, OpenStream | CloseStream)] == [OpenStream(B), CloseStream(A)]
    bench.do(TopologySeen(topology(1, pipeline("p0", A, 1))))  # an old value
    assert bench.router.topology is not None
    assert bench.router.topology.counter == 2


def test_submitted_once_its_stream_is_up() -> None:
    bench = Bench()
    bench.topology(pipeline("p0", A, 1))
    assert sent(bench.submit()) == []
    assert bench.router.restless
    ((member, submit),) = sent(bench.do(StreamUp(A)))
    assert (member, submit.admitted, submit.emitted) == (A, False, ())
    assert not bench.router.restless


def test_scheduler_change_resubmits_the_log() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0, 1, 2)
    bench.topology(pipeline("p0", C, 3), pipeline("p1", B, 1))
    ((member, submit),) = sent(bench.do(StreamUp(C), 0.4))
    assert (member, submit.pipeline, submit.admitted) == (C, "p0", True)
    assert submit.emitted == tuple(right(1, p).token for p in range(3))
    assert bench.tokens(A, "p0", 1, 3) == []  # the old one wakes up
    (deliver,) = only(bench.tokens(C, "p0", 3, 3), Deliver)
    assert deliver.how == "resubmitted"
    assert deliver.gap_s == pytest.approx(0.4)


def test_what_a_scheduler_sent_before_an_epoch_that_it_goes_on_in_counts() -> None:
    """It was refused and asked for again. The scheduler had the same in its log, and its answer took longer than all
    else of a recovery."""
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    bench.topology(pipeline("p0", A, 2), pipeline("p1", B, 1))
    effects = bench.tokens(A, "p0", 1, 1, 2)
    (deliver,) = only(effects, Deliver)
    assert (len(deliver.tokens), deliver.how, sent(effects)) == (2, "continued", [])
    (deliver,) = only(bench.tokens(A, "p0", 2, 3), Deliver)
    assert len(deliver.tokens) == 1


def test_stale_epoch_is_dropped_and_asked_for() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    bench.topology(pipeline("p0", C, 2), pipeline("p1", B, 1))
    bench.topology(pipeline("p0", A, 3), pipeline("p1", B, 1))
    bench.do(StreamUp(A))
    ((_, submit),) = sent(bench.tokens(A, "p0", 1, 1, 2))  # of when it scheduled the pipeline before
    assert len(submit.emitted) == 1
    assert only(bench.tokens(A, "p0", 3, 3), Deliver) == []  # a gap: asked for a moment ago
    assert sent(bench.do(Tick(), 0.2)) != []  # nothing came of it: again
    (deliver,) = only(bench.tokens(A, "p0", 3, 1, 2), Deliver)
    assert deliver.how == "resubmitted"
    assert not bench.router.restless


def test_held_then_failed_after_the_grace() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    bench.topology(pipeline("p0", None, 2), pipeline("p1", None, 2))
    assert only(bench.do(Tick(), 4.9), Fail) == []
    (fail,) = only(bench.do(Tick(), 0.2), Fail)
    assert fail.code is FailCode.UNAVAILABLE
    assert bench.router.live == 0
    (fail,) = only(bench.submit(2), Fail)
    assert (fail.code, fail.retry_after_s > 0) == (FailCode.UNAVAILABLE, True)


def test_what_comes_while_all_pipelines_are_down_for_a_moment_waits() -> None:
    """etcd's topology was an older one for 20 ms, of before the pipelines were formed."""
    bench = Bench()
    bench.two_up()
    bench.topology(pipeline("p0", None, 2), pipeline("p1", None, 2))
    assert bench.submit() == []
    bench.topology(pipeline("p0", None, 2), pipeline("p1", B, 3))
    assert [m for m, _ in sent(bench.do(StreamUp(B), 0.02))] == [B]
    bench.topology(pipeline("p0", None, 2), pipeline("p1", None, 4))
    bench.do(Tick(), 4.9)
    assert only(bench.submit(2), Fail) == []
    bench.do(Tick(), 0.2)
    bench.submit(3)
    assert bench.failed.keys() == {1, 3}, "down for longer than a request would wait: nothing new is taken"
    bench.do(Tick(), 4.9)
    assert bench.failed[2].code is FailCode.UNAVAILABLE
    assert bench.router.live == 0


def test_no_pipeline_was_ever_up() -> None:
    bench = Bench()
    bench.topology(pipeline("p0", None, 0), pipeline("p1", None, 0))
    bench.submit()
    assert bench.failed[1].code is FailCode.UNAVAILABLE


def test_returns_home_within_the_patience() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    bench.topology(pipeline("p0", None, 2), pipeline("p1", B, 1))
    assert sent(bench.do(Tick(), 0.4)) == []
    bench.topology(pipeline("p0", A, 3), pipeline("p1", B, 1))
    bench.do(StreamUp(A))
    assert [m for m, _ in sent(bench.effects)][-1] == A


def test_moves_when_its_pipeline_stays_down() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 9, 0, 1)
    bench.topology(pipeline("p0", None, 10), pipeline("p1", B, 1))
    ((member, submit),) = sent(bench.do(Tick(), 0.6))
    assert (member, submit.pipeline, len(submit.emitted)) == (B, "p1", 2)
    (deliver,) = only(bench.tokens(B, "p1", 1, 2), Deliver)  # p1's epoch is older, and right
    assert deliver.how == "moved"


def test_unreachable_scheduler() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    bench.do(StreamDown(A))
    assert sent(bench.do(Tick(), 2.0)) == []
    assert sent(bench.do(Tick(), 1.0))[0][0] == B


def test_stop_restart_begins_anew_at_once() -> None:
    bench = Bench()
    up = (pipeline("p0", A, 1), pipeline("p1", B, 1))
    bench.topology(*up, mode=Mode.STOP_RESTART)
    bench.do(StreamUp(A))
    bench.do(StreamUp(B))
    bench.submit()
    bench.tokens(A, "p0", 1, 0, 1)
    effects = bench.topology(pipeline("p0", None, 2), up[1], mode=Mode.STOP_RESTART)
    ((member, submit),) = sent(effects)
    assert (member, submit.emitted, submit.admitted) == (B, (), True)
    assert only(bench.tokens(B, "p1", 1, 0, 1), Deliver) == []
    assert only(bench.tokens(B, "p1", 1, 2), Deliver) != []
    (fail,) = only(bench.tokens(B, "p1", 1, 0, add=1), Fail)
    assert fail.code is FailCode.MISMATCH
    assert only(bench.effects, SendCancel)[-1].member == B


def test_health_in_words() -> None:
    bench = Bench()
    assert bench.router.troubles(bench.now)
    healthy = Pipeline("p0", 1, (Stage(("a",), (A,)), Stage(("t",), (TAIL,))))
    bench.topology(healthy)
    assert bench.router.troubles(bench.now) == ["p0: its scheduler on a@1 cannot be reached"]
    bench.do(StreamUp(A))
    assert bench.router.troubles(bench.now) == []
    bench.submit()
    assert bench.router.troubles(bench.now + 1.0) == []
    assert bench.router.troubles(bench.now + 3.0) == ["p0 has brought no token for 3.0 s"]
    bench.topology(Pipeline("p0", 2, (Stage(("a",), (A,)), Stage(("t",), (C,)))))
    assert bench.router.troubles(bench.now) == ["p0: stage 1 is served by c for t"]
    bench.topology(Pipeline("p0", 3, (Stage(("a",), (A,)), Stage(("t",)))))
    assert bench.router.troubles(bench.now) == ["p0 is down: nobody serves stage 1"]


def test_bounded() -> None:
    bench = Bench(Policy(live_max=2))
    bench.two_up()
    bench.submit(1)
    bench.submit(2)
    (fail,) = only(bench.submit(3), Fail)
    assert fail.code is FailCode.OVERLOADED
    bench.do(CancelAsked(1))
    assert only(bench.submit(4), Fail) == []


def test_cancel_and_strangers() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    (cancel,) = only(bench.do(CancelAsked(1)), SendCancel)
    assert (cancel.member, cancel.cancel.rid) == (A, 1)
    assert bench.do(CancelAsked(1)) == []
    assert bench.tokens(A, "p0", 1, 0) == []  # on its way when the cancel was sent
    (cancel,) = only(bench.tokens(A, "p0", 1, 0, rid=77), SendCancel)
    assert cancel.cancel.rid == 77


def test_shut_down() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit(1)
    bench.submit(2)
    effects = bench.do(ShutDown())
    assert {fail.rid for fail in only(effects, Fail)} == {1, 2}
    assert len(only(effects, SendCancel)) == 2
    assert only(bench.submit(3), Fail) != []


def test_engine_error_ends_the_stream() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    item = replace_finish(right(1, 0), FinishReason.ERROR)
    (fail,) = only(bench.do(TokensReceived(A, Tokens("p0", 1, (item,)))), Fail)
    assert fail.code is FailCode.ENGINE


def replace_finish(token: Token, finish: FinishReason) -> Token:
    return Token(token.rid, token.position, token.token, finish=finish)


def test_an_instance_that_is_to_go_keeps_its_streams_and_gets_no_new_ones() -> None:
    bench = Bench()
    bench.two_up()
    assert {member for rid in (1, 2) for member, _ in sent(bench.submit(rid))} == {A, B}
    going = replace(pipeline("p1", B, 1), closing=True)
    bench.topology(pipeline("p0", A, 1), going)
    assert {member for rid in range(3, 9) for member, _ in sent(bench.submit(rid))} == {A}
    # Its stages move: the stream goes with them.
    (rid,) = (rid for rid in (1, 2) if bench.tokens(B, "p1", 1, 0, rid=rid))
    bench.topology(
        pipeline("p0", A, 1), replace(going, epoch=3, stages=(Stage(("h",), (C,)), going.stages[1]))
    )
    assert [(m, s.pipeline, s.rid) for m, s in sent(bench.do(StreamUp(C)))] == [(C, "p1", rid)]
    # A full one is no reason to wait for one that is not asked.
    (fail,) = only(bench.refuse(A, "p0", RefusalCode.OVERLOADED, rid=8), Fail)
    assert fail.code is FailCode.OVERLOADED
    bench.topology(
        pipeline("p0", None, 4), replace(going, epoch=3, stages=(Stage(("h",), (C,)), going.stages[1]))
    )
    assert [m for m, _ in sent(bench.submit(20))] == [C]  # better than none


def test_an_instance_that_is_gone_is_nobodys_death() -> None:
    """What it still had goes to another one, and is not taken for the cause of a death."""
    bench = Bench(Policy(deaths_max=1))
    bench.two_up()
    bench.submit(1)
    bench.submit(2)
    moved = [(m, s.pipeline) for m, s in sent(bench.topology(pipeline("p0", A, 1)))]
    assert moved == [(A, "p0")]
    assert bench.failed == {}


def test_room_for_requests_grows_with_the_group() -> None:
    bench = Bench(Policy(live_max=2, live_each=1))
    bench.two_up()
    for rid in (1, 2):
        bench.submit(rid)
    assert only(bench.submit(3), Fail) != []
    bench.topology(*(pipeline(f"p{k}", head, 1) for k, head in enumerate((A, B, C))))
    assert only(bench.submit(3), Fail) == []
