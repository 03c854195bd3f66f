"""A gateway that could not ask every scheduler takes a stream up with too early a reader: it asks once more."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract import rpc
from controlplane.contract.ids import Member
from controlplane.contract.requests import Cancel, RefusalCode, Refused, Sampling, Submit, Tokens
from dataplane.core.events import (
    Cancelled,
    Refuse,
    RunStep,
    SessionLost,
    Submitted,
)
from dataplane.core.events import (
    Deliver as Delivered,
)
from dataplane.core.events import (
    Effect as SchedulerEffect,
)
from dataplane.core.events import (
    Event as SchedulerEvent,
)
from tests.core.data.test_scheduler import result, rows, scheduler
from tests.core.gateway.routing import PROMPT, A, B, Bench, only, pipeline, right, sent
from web.gateway.routing.events import (
    Deliver,
    Effect,
    Fail,
    FailCode,
    RefusalReceived,
    SendCancel,
    SendSubmit,
    StreamDown,
    StreamUp,
    SubmitAsked,
    Tick,
    TokensReceived,
)

SAMPLING = Sampling(40, seed=1)


def late(reader: int | None, member: Member = A) -> RefusalReceived:
    refused = Refused(1, "p0", RefusalCode.SUPERSEDED, "another connection", reader=reader)
    return RefusalReceived(member, refused)


def resumed(reader: int = 1) -> SubmitAsked:
    emitted = tuple(right(1, position).token for position in range(2))
    return SubmitAsked(
        1, PROMPT, SAMPLING, context=b"c", resumed=True, emitted=emitted, home="p0", reader=reader
    )


def attached() -> Bench:
    """It has sent its Submit, as reader 1."""
    bench = Bench()
    bench.two_up()
    ((_, submit),) = sent(bench.do(resumed()))
    assert submit.reader == 1
    return bench


def superseded(bench: Bench) -> bool:
    return 1 in bench.failed and bench.failed[1].code is FailCode.SUPERSEDED


def test_who_was_never_accepted_comes_after_the_reader_that_it_is_told_of_once() -> None:
    bench = attached()
    ((member, submit),) = sent(bench.do(late(4)))
    assert (member, submit.pipeline, submit.reader, len(submit.emitted)) == (A, "p0", 5, 2)
    assert bench.router.counts["overtaken"] == 1
    (deliver,) = only(bench.tokens(A, "p0", 1, 2), Deliver)
    assert deliver.how == "resumed"
    assert sent(bench.do(late(7))) == []
    assert superseded(bench)


def test_who_has_overtaken_and_comes_too_late_again_gives_way() -> None:
    bench = attached()
    bench.do(late(4))
    assert sent(bench.do(late(6))) == []
    assert superseded(bench)
    assert bench.router.live == 0


def test_what_answers_an_earlier_submit_ends_nothing() -> None:
    """The client was here before, and is back within the time that a refusal takes."""
    bench = attached()
    bench.do(resumed(reader=3))
    assert bench.do(late(3)) == [], "of the first one: the second is not above that"
    ((_, submit),) = sent(bench.do(late(4)))
    assert submit.reader == 5
    assert bench.do(late(4)) == []
    assert not bench.failed
    assert bench.router.counts["stale_refusal"] == 2


@pytest.mark.parametrize("reader", [None, 9])
@pytest.mark.parametrize("moved", [False, True])
def test_whoever_was_accepted_stays_superseded(moved: bool, reader: int | None) -> None:
    bench = attached()
    bench.tokens(A, "p0", 1, 2)
    if moved:
        bench.topology(pipeline("p0", B, 2), pipeline("p1", B, 1))
    assert sent(bench.do(late(reader, B if moved else A))) == []
    assert superseded(bench)


def test_a_scheduler_of_older_code_names_no_reader_and_has_the_last_word() -> None:
    bench = attached()
    assert sent(bench.do(late(None))) == []
    assert superseded(bench)


def test_whoever_may_have_been_accepted_stays_superseded() -> None:
    """Its stream broke before an answer came. If it was accepted, another connection has come since."""
    bench = attached()
    bench.do(StreamDown(A))
    assert len(sent(bench.do(StreamUp(A)))) == 1
    assert sent(bench.do(late(9))) == []
    assert superseded(bench)


def test_a_refusal_for_another_reason_accepts_nothing() -> None:
    bench = attached()
    bench.refuse(A, "p0", RefusalCode.NOT_HERE)
    assert len(sent(bench.do(Tick(), 0.02))) == 1
    ((_, submit),) = sent(bench.do(late(1_000_004)))
    assert submit.reader == 1_000_005


@pytest.mark.parametrize("searched_s", [0.0, 2.0])
@pytest.mark.parametrize(("microseconds", "since"), [(-1, True), (1, False)])
def test_who_has_come_since_is_not_overtaken(searched_s: float, microseconds: int, since: bool) -> None:
    """No scheduler could be reached for a while, and nobody has told the gateway that its client has left it."""
    bench = Bench()
    bench.topology(pipeline("p0", A, 1))
    assert sent(bench.do(replace(resumed(), reader_age_s=searched_s))) == []
    assert len(sent(bench.do(StreamUp(A), 1.0))) == 1
    now_us = 1 + round((searched_s + 1.0) * 1e6)
    again = sent(bench.do(late(now_us + microseconds)))
    assert superseded(bench) is since
    assert [submit.reader for _, submit in again] == ([] if since else [now_us + 2])


def test_a_gap_shows_that_it_was_accepted() -> None:
    bench = attached()
    assert only(bench.tokens(A, "p0", 1, 5), Deliver) == []
    assert sent(bench.do(late(9))) == []
    assert superseded(bench)


def test_other_versions_read_refusals() -> None:
    class Older(msgspec.Struct, frozen=True, tag="refused"):
        rid: int
        pipeline: str
        code: RefusalCode
        message: str
        retry_after_s: float = 0.0
        node: str = ""

    ours = Refused(1, "p0", RefusalCode.SUPERSEDED, "no", reader=4)
    older = Older(1, "p0", RefusalCode.SUPERSEDED, "no")
    assert rpc.decode_scheduler_message(rpc.encode(ours)) == ours
    assert msgspec.msgpack.decode(rpc.encode(ours), type=Older) == older
    decoded = rpc.decode_scheduler_message(rpc.encode(older))
    assert isinstance(decoded, Refused)
    assert decoded.reader is None


class World:
    """One scheduler, and gateways with a session each: messages wait in order until they are carried."""

    def __init__(self, gateways: int) -> None:
        self.scheduler = scheduler(stages=1)
        self.benches = [Bench() for _ in range(gateways)]
        self.up: list[deque[Submit | Cancel]] = [deque() for _ in self.benches]
        self.down: list[deque[Tokens | Refused]] = [deque() for _ in self.benches]
        self.steps: deque[RunStep] = deque()
        self.tokens = 0
        for bench in self.benches:
            bench.topology(pipeline("p0", A, 5))
            bench.do(StreamUp(A))

    def feed(self, event: SchedulerEvent) -> None:
        effects: list[SchedulerEffect] = self.scheduler.step(event, 0.1)
        for effect in effects:
            match effect:
                case Delivered(session, tokens) if session < len(self.benches):
                    self.down[session].append(Tokens("p0", 5, tokens))
                case Refuse(session, message) if session < len(self.benches):
                    self.down[session].append(message)
                case RunStep():
                    self.steps.append(effect)

    def asked(self, number: int, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendSubmit(_, submit):
                    self.up[number].append(submit)
                case SendCancel(_, cancel):
                    self.up[number].append(cancel)

    def ask(self, number: int, reader: int, resumed: bool) -> None:
        asked = SubmitAsked(
            1, (0, 1, 2, 3), SAMPLING, context=b"c", resumed=resumed, home="p0", reader=reader
        )
        self.asked(number, self.benches[number].do(asked))

    def carry_up(self, number: int) -> None:
        if self.up[number]:
            message = self.up[number].popleft()
            if isinstance(message, Submit):
                self.feed(Submitted(message, number))
            else:
                self.feed(Cancelled(message.rid, number))

    def carry_down(self, number: int) -> None:
        if self.down[number]:
            message = self.down[number].popleft()
            event = TokensReceived(A, message) if isinstance(message, Tokens) else RefusalReceived(A, message)
            self.asked(number, self.benches[number].do(event))

    def compute(self) -> None:
        if self.steps and self.tokens < SAMPLING.max_tokens - 1:
            step = self.steps.popleft()
            sampled = sum(sample for *_, sample in rows(step))
            self.feed(result(step, self.tokens))
            self.tokens += sampled

    def do(self, action: int) -> None:
        kind, number = divmod(action, len(self.benches))
        match kind:
            case 0:
                self.carry_up(number)
            case 1:
                self.carry_down(number)
            case _:
                self.compute()

    def settle(self) -> None:
        for _ in range(100):
            for number in range(len(self.benches)):
                self.carry_up(number)
                self.carry_down(number)
        assert not any((*self.up, *self.down)), "they fight for ever"


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.integers(2, 3), st.lists(st.integers(0, 8), max_size=60))
def test_gateways_of_one_stream_end_with_one_reader(elder: bool, count: int, actions: list[int]) -> None:
    """Each has asked for the log when the scheduler that knows reader 4 could not be reached. `elder`: that one is the
    first gateway, and reads still; else it is gone."""
    world = World(count)
    if elder:
        world.ask(0, reader=4, resumed=False)
        world.carry_up(0)
    else:
        known = Submit(1, "p0", (0, 1, 2, 3), SAMPLING, context=b"c", reader=4)
        world.feed(Submitted(known, 99))
        world.feed(SessionLost(99))
    claimants = range(int(elder), count)
    for number in claimants:
        world.ask(number, reader=1, resumed=True)
    for action in actions:
        world.do(action)
    world.settle()

    reads = [number for number, bench in enumerate(world.benches) if bench.router.live]
    assert [world.scheduler.requests[1].session] == reads
    assert reads[0] in claimants, "the connection that was there before gives way"
    for number, bench in enumerate(world.benches):
        assert (number in reads) != superseded(bench)
        assert len(only(bench.effects, Fail)) == int(number not in reads)
        assert len(sent(bench.effects)) <= 2
    for _ in range(6):
        world.compute()
    world.settle()
    assert world.tokens > 5
    assert world.benches[reads[0]].streams[1] == list(range(world.tokens))
