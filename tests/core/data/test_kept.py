"""What a scheduler keeps for clients that come back: logs, for a time, within bounds, for one reader at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from controlplane.contract.requests import FinishReason, RefusalCode, Sampling, Submit
from dataplane.core.events import (
    Ask,
    Cancelled,
    CapacityChanged,
    Deliver,
    Effect,
    Refuse,
    RunStep,
    SessionLost,
    Submitted,
    Tick,
)
from dataplane.core.kept import Kept
from dataplane.core.messages import Detail, HeldMeta, ResultMeta
from dataplane.core.request import Phase, Request
from dataplane.core.scheduler import Scheduler
from tests.core.data.test_scheduler import LIMITS, result, rows, scheduler, steps, submit

CONTEXT = b"how to write it down"
LOGPROBS = Sampling(8, seed=1, logprobs=1)


def resumable(rid: int = 1, session: int = 1, **fields: object) -> Submitted:
    return replace(submit(rid, context=CONTEXT, **fields), session=session)


def run(made: Scheduler, first: list[Effect], tokens: int, start: int = 0) -> list[Effect]:
    """Answer the steps in flight with the tokens start, start + 1, ...; the last effects."""
    effects = first
    for token in range(start, start + tokens):
        (step,) = steps(effects)
        effects = made.step(result(step, token), 0.1)
    return effects


def delivered(effects: list[Effect], session: int) -> list[tuple[int, int]]:
    """(position, token)"""
    return [
        (t.position, t.token)
        for e in effects
        if isinstance(e, Deliver) and e.session == session
        for t in e.tokens
    ]


def refused(effects: list[Effect]) -> list[tuple[int, RefusalCode]]:
    return [(e.session, e.message.code) for e in effects if isinstance(e, Refuse)]


def test_a_hang_up_frees_everything_but_the_log_and_a_return_goes_on() -> None:
    made = scheduler(stages=1)
    flying = run(made, made.step(resumable(), 0.0), 3)
    made.step(Cancelled(1, 1), 0.2)
    assert not made.requests
    assert made.batcher.used_blocks == 0
    freed = made.step(result(*steps(flying), 99), 0.2)
    assert steps(freed)[0].meta.frees == (1,)
    made.step(result(*steps(freed)), 0.2)
    log = made.recall(1)
    assert log is not None
    assert (log.prompt, log.emitted, log.context) == ((1000, 1001, 1002, 1003), (0, 1, 2), CONTEXT)
    back = made.step(resumable(session=2, emitted=(0,), admitted=True, reader=1), 0.3)
    assert delivered(back, 2) == [(1, 1), (2, 2)]
    (step,) = steps(back)
    assert rows(step) == [(1, 4, 3, True)], "all of it but a full block that is still there, in one prefill"
    assert [admit.rid for admit in step.meta.admits] == [1]
    assert delivered(run(made, back, 1, 3), 2) == [(3, 3)]
    assert not made.kept


def test_a_finished_request_brings_its_last_events_again_and_does_not_run() -> None:
    made = scheduler(stages=1)
    run(made, made.step(resumable(), 0.0), 8)
    assert not made.requests
    for session in (2, 3):
        back = made.step(resumable(session=session, emitted=tuple(range(6)), reader=session), 0.2)
        assert delivered(back, session) == [(6, 6), (7, 7)]
        assert back[-1].tokens[-1].finish is FinishReason.LENGTH  # type: ignore[union-attr]
        assert not made.requests
        assert not refused(back)


def test_what_nobody_may_resume_is_not_kept() -> None:
    made = scheduler(stages=1)
    run(made, made.step(submit(1), 0.0), 8)
    assert made.recall(1) is None
    assert not made.kept


def test_logs_are_kept_for_the_grace() -> None:
    made = scheduler(stages=1)
    run(made, made.step(resumable(), 0.0), 8)
    made.step(Tick(), 0.1 + LIMITS.orphan_grace_s)
    assert made.recall(1) is not None
    made.step(Tick(), 0.11 + LIMITS.orphan_grace_s)
    assert made.recall(1) is None


def test_bounds_put_the_oldest_out() -> None:
    def request(rid: int, prompt: int = 10, **fields: object) -> Request:
        message = Submit(rid, "p0", tuple(range(prompt)), LOGPROBS, context=b"", **fields)  # type: ignore[arg-type]
        return Request.from_submit(message, 0, 1)

    kept = Kept(1.0, requests_max=3, bytes_max=30_000)
    for rid in range(1, 5):
        kept.put(request(rid), 0.0)
    assert [rid for rid in range(1, 5) if kept.get(rid)] == [2, 3, 4]
    kept.put(request(5, 20, emitted=tuple(range(70))), 0.5)  # 26,508 bytes, and the others 2,448 each
    assert [rid for rid in range(1, 6) if kept.get(rid)] == [4, 5]
    kept.put(request(6, 700), 0.5)  # too large for itself
    assert not len(kept)
    kept.put(request(7), 0.5)
    kept.put(request(7), 0.9)  # again: a new deadline
    kept.expire(1.6)
    assert kept.get(7)
    kept.expire(2.0)
    assert not len(kept)


def test_the_newest_reader_counts() -> None:
    made = scheduler(stages=1)
    flying = run(made, made.step(resumable(), 0.0), 2)
    back = made.step(resumable(session=2, emitted=(0, 1), reader=1), 0.2)
    assert refused(back) == [(1, RefusalCode.SUPERSEDED)]
    made.step(Cancelled(1, 1), 0.2)  # the old gateway notices that its client is gone
    made.step(SessionLost(1), 0.2)
    assert delivered(run(made, flying, 1, 2), 2) == [(2, 2)]
    # A gateway that was cut off comes back and brings what it has: it is not to take the stream away again.
    late = made.step(resumable(session=3, emitted=(0, 1), admitted=True), 0.3)
    assert refused(late) == [(3, RefusalCode.SUPERSEDED)]
    assert made.requests[1].session == 2
    made.step(Cancelled(1, 2), 0.4)
    assert refused(made.step(resumable(session=3, emitted=(0, 1), admitted=True), 0.5)) == refused(late)


@pytest.mark.parametrize("then", ["running", "hung up", "finished"])
def test_another_body_under_the_same_key_is_refused_and_ends_nothing(then: str) -> None:
    """Both came at once, or the first one's scheduler could not be asked: no gateway has compared the bodies."""
    made = scheduler(stages=1)
    flying = run(made, made.step(resumable(), 0.0), 8 if then == "finished" else 2)
    if then == "hung up":
        made.step(Cancelled(1, 1), 0.2)
    others = [
        resumable(session=2, length=5),
        resumable(session=2, max_tokens=9),
        # Accepted by another scheduler.
        resumable(session=2, length=5, emitted=(0,), admitted=True, reader=1),
    ]
    for other in others:
        back = made.step(other, 0.3)
        assert [effect for effect in back if not isinstance(effect, RunStep)] == [
            effect for effect in back if isinstance(effect, Refuse)
        ], "nothing is delivered"
        assert refused(back) == [(2, RefusalCode.INVALID)]
    if then == "running":
        assert made.requests[1].session == 1
        assert delivered(run(made, flying, 1, 2), 1) == [(2, 2)]
    log = made.recall(1)
    assert log is not None
    assert log.prompt == (1000, 1001, 1002, 1003)
    older = Sampling(8, seed=2)  # as one reads it that does not know all of its fields
    back = made.step(resumable(session=3, sampling=older, emitted=(0,), admitted=True, reader=1), 0.4)
    assert delivered(back, 3)[0] == (1, 1)


def test_who_comes_too_late_is_told_of_the_later_reader_and_who_is_displaced_is_not() -> None:
    """The first may not have known of it; the second was accepted, and another one has come."""
    made = scheduler(stages=1)
    run(made, made.step(resumable(reader=4), 0.0), 1)
    late = made.step(resumable(session=2, reader=3), 0.1)
    assert [(e.session, e.message.reader) for e in late if isinstance(e, Refuse)] == [(2, 4)]
    assert made.requests[1].session == 1
    newer = made.step(resumable(session=2, reader=5), 0.2)
    assert [(e.session, e.message.reader) for e in newer if isinstance(e, Refuse)] == [(1, None)]
    assert made.requests[1].session == 2


def test_a_gateways_second_stream_may_cancel_what_the_first_one_began() -> None:
    made = scheduler(stages=1)
    made.step(resumable(), 0.0)
    made.step(SessionLost(1), 0.1)
    made.step(Cancelled(1, 7), 0.2)
    assert not made.requests


@pytest.mark.parametrize("then", ["running", "hung up", "finished"])
def test_logprobs_that_an_earlier_scheduler_took_with_it_are_computed_again(then: str) -> None:
    """This one got the tokens without them; a client that has fewer tokens is to get both."""
    made = scheduler(stages=1)
    made.step(CapacityChanged(64, 1), 0.0)
    known = (0, 1, 2)
    asked = made.step(resumable(sampling=LOGPROBS, emitted=known, admitted=True), 0.0)
    (ask,) = [e.meta for e in asked if isinstance(e, Ask)]
    effects = made.step(HeldMeta("p0", ask.fence, ask.ask, 0, ()), 0.1)

    def go_on(effects: list[Effect], token: int) -> list[Effect]:
        (step,) = steps(effects)
        return made.step(detailed(step, token), 0.1)

    for token in range(3, 8 if then == "finished" else 4):
        effects = go_on(effects, token)
    if then == "hung up":
        made.step(Cancelled(1, 1), 0.2)
    back = made.step(resumable(session=2, sampling=LOGPROBS, emitted=known[:1], admitted=True, reader=1), 0.3)
    assert not delivered(back, 2)
    back = made.step(detailed(*steps(effects), 77), 0.4)  # of before: it counts no more
    for token in range(1, 8):
        back = go_on(back, token)
        (item,) = [t for e in back if isinstance(e, Deliver) for t in e.tokens]
        assert (item.position, item.token, item.logprob) == (token, token, -0.5)
    assert item.finish is FinishReason.LENGTH


def detailed(step: RunStep, token: int) -> ResultMeta:
    return structs.replace(result(step, token), details=(Detail(0, -0.5),))


def test_a_log_that_went_on_elsewhere_is_not_gone_back_to() -> None:
    made = scheduler(stages=1)
    run(made, made.step(resumable(), 0.0), 2)
    made.step(Cancelled(1, 1), 0.2)
    made.step(resumable(session=2, emitted=tuple(range(5)), admitted=True), 0.3)
    assert len(made.requests[1].output) == 5
    assert not made.kept


def test_after_a_takeover_stages_are_asked_even_about_a_stream_from_its_start() -> None:
    made = Scheduler("p0", 5, 1, LIMITS, takeover=True, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    made.step(resumable(), 0.1)
    assert made.requests[1].phase is Phase.RECOVERING
    made.step(submit(2), 0.1)
    assert made.requests[2].phase is Phase.WAITING
