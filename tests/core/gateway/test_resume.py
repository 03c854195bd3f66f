"""Resumption by direct calls: ids and cursors, the search for a request, and a router that takes a stream up."""

from __future__ import annotations

import pytest

from controlplane.contract.ids import Member
from controlplane.contract.requests import Log, Recalled, RefusalCode, Sampling
from tests.core.gateway.routing import LENGTH, PROMPT, A, B, Bench, C, only, pipeline, right, sent
from web.gateway.errors import ApiError
from web.gateway.openai.requests import CHOICES_MAX
from web.gateway.resume.cursor import Cursor, Mark
from web.gateway.resume.tickets import Tickets, new_nonce, rid_of, seed_of
from web.gateway.routing.events import (
    CancelAsked,
    Closing,
    Deliver,
    Effect,
    FailCode,
    LeaveAsked,
    RecallAsked,
    RecallDone,
    RecalledReceived,
    SendCancel,
    SendRecall,
    StreamDown,
    StreamUp,
    SubmitAsked,
    Tick,
)
from web.gateway.routing.policy import Policy

OWNER = bytes(32)


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("", Cursor([None])),
        ("0", Cursor([Mark(0)])),
        ("17f", Cursor([Mark(17, True)])),
        ("-3-9f", Cursor([None, Mark(3), Mark(9, True)])),
        ("1f-2fu", Cursor([Mark(1, True), Mark(2, True)], usage=True)),
    ],
)
def test_a_cursor_is_read_as_it_was_written(text: str, cursor: Cursor) -> None:
    assert str(cursor) == text
    assert Cursor.parse(text) == cursor


@pytest.mark.parametrize("text", ["x", "1,2", "-1f-f", "1ff", "u1", "\u0661", "1234567890", "1" + "-" * 3000])
def test_what_is_no_cursor(text: str) -> None:
    with pytest.raises(ApiError) as error:
        Cursor.parse(text)
    assert error.value.status == 400


def test_a_cursor_has_as_many_choices_as_a_request_may_have() -> None:
    last = "-".join(["123456789f123456789"] * CHOICES_MAX) + "u"
    assert len(Cursor.parse(last).marks) == CHOICES_MAX
    with pytest.raises(ApiError, match=f"no request has more than {CHOICES_MAX}"):
        Cursor.parse("-" * CHOICES_MAX)


def test_a_ticket_is_read_by_every_gateway_of_the_cluster_and_for_its_owner_only() -> None:
    nonce = new_nonce()
    issued = Tickets("secret").issue(nonce, 123, b"8 bytes.", OWNER)
    assert Tickets("secret").read(issued.text, OWNER) == issued
    for tickets, text, owner, status in [
        (Tickets("other"), issued.text, OWNER, 404),
        (Tickets("secret"), issued.text, b"another" * 5, 403),
        (Tickets("secret"), issued.text[:-1], OWNER, 404),
        (Tickets("secret"), issued.text + "AAAA", OWNER, 404),
        (Tickets("secret"), "", OWNER, 404),
    ]:
        with pytest.raises(ApiError) as error:
            tickets.read(text, owner)
        assert error.value.status == status
    for at in range(4, len(issued.text)):
        flipped = issued.text[:at] + ("B" if issued.text[at] != "B" else "C") + issued.text[at + 1 :]
        with pytest.raises(ApiError):
            Tickets("secret").read(flipped, OWNER)


def test_what_follows_from_a_nonce() -> None:
    tickets = Tickets("secret")
    nonce = tickets.keyed_nonce(OWNER, "key")
    assert nonce == Tickets("secret").keyed_nonce(OWNER, "key")
    others = {tickets.keyed_nonce(OWNER, "key2"), tickets.keyed_nonce(b"x" * 32, "key"), new_nonce(), nonce}
    assert len(others) == 4
    rids = {rid_of(n, index) for n in others for index in range(128)}
    assert len(rids) == 4 * 128
    assert all(1 << 62 <= rid < 1 << 63 for rid in rids)
    assert len({seed_of(n) for n in others}) == 4


def log(tokens: int, name: str = "p0", reader: int = 0) -> Log:
    emitted = tuple(right(1, position).token for position in range(tokens))
    return Log(name, PROMPT, Sampling(LENGTH, seed=0), emitted, b"context", reader)


def recalls(effects: list[Effect]) -> list[Member]:
    return [effect.member for effect in only(effects, SendRecall)]


def test_every_scheduler_is_asked_and_the_longest_log_wins() -> None:
    bench = Bench()
    bench.two_up()
    assert recalls(bench.do(RecallAsked(1, 2.0))) == [A, B]
    assert bench.router.restless
    assert bench.do(RecalledReceived(A, Recalled(1, log(2)))) == []
    assert bench.do(RecalledReceived(B, Recalled(2, log(9)))) == [], "of another request"
    assert bench.do(RecalledReceived(B, Recalled(1, log(3, "p1")))) == [RecallDone(1, log(3, "p1"), True)]
    assert not bench.router.restless
    assert bench.do(RecalledReceived(B, Recalled(1, log(3)))) == [], "it is over"


@pytest.mark.parametrize("first", [A, B])
def test_whoever_takes_a_stream_up_comes_after_every_reader_that_a_scheduler_knows(first: Member) -> None:
    """A scheduler that has been left may have more of the stream, and not know who took it up since."""
    bench = Bench()
    bench.two_up()
    bench.do(RecallAsked(1, 2.0))
    logs = {A: log(3, reader=1), B: log(2, "p1", reader=4)}
    for member in (first, B if first is A else A):
        done = bench.do(RecalledReceived(member, Recalled(1, logs[member])))
    assert done == [RecallDone(1, log(3, reader=4), True)]


def test_who_cannot_be_asked_is_waited_for_unless_another_has_it() -> None:
    bench = Bench()
    bench.two_up()
    bench.do(StreamDown(B))
    bench.do(RecallAsked(1, 2.0))
    assert only(bench.do(RecalledReceived(A, Recalled(1))), RecallDone) == []
    assert recalls(bench.do(StreamUp(B))) == [B]
    bench.do(StreamDown(B))  # before it has answered
    assert recalls(bench.do(StreamUp(B))) == [B]
    bench.topology(pipeline("p0", A, 1), pipeline("p1", C, 2))  # B is dead: its successor knows, or nobody
    assert recalls(bench.do(StreamUp(C))) == [C]
    assert bench.do(RecalledReceived(C, Recalled(1))) == [RecallDone(1, None, True)]
    bench.do(StreamDown(C))
    bench.do(RecallAsked(2, 2.0))
    assert bench.do(Tick(), 1.9) == []
    assert bench.do(Tick(), 0.2) == [RecallDone(2, None, False)]
    bench.do(RecallAsked(3, 2.0))
    assert bench.do(RecalledReceived(A, Recalled(3, log(1)))) == [RecallDone(3, log(1), False)]


def test_a_stream_that_breaks_ends_the_search_for_what_was_found_and_no_other() -> None:
    bench = Bench()
    bench.two_up()
    for rid in (1, 2):
        bench.do(RecallAsked(rid, 2.0))
    bench.do(RecalledReceived(A, Recalled(1, log(2))))
    bench.do(RecalledReceived(A, Recalled(2, None)))
    assert bench.do(StreamDown(B)) == [RecallDone(1, log(2), False)]
    assert recalls(bench.do(StreamUp(B))) == [B], "what it has not answered, it is asked again"


def test_searches_are_bounded() -> None:
    bench = Bench(Policy(live_max=2))
    bench.two_up()
    for rid in (1, 2):
        bench.do(RecallAsked(rid, 2.0))
    assert bench.do(RecallAsked(3, 2.0)) == [RecallDone(3, None, False)]


def resume(bench: Bench, have: int, home: str | None = "p1", reader: int = 1) -> list[Effect]:
    emitted = tuple(right(1, position).token for position in range(have))
    sampling = Sampling(LENGTH, seed=0)
    asked = SubmitAsked(
        1, PROMPT, sampling, context=b"c", resumed=True, emitted=emitted, home=home, reader=reader
    )
    return bench.do(asked)


def test_a_stream_goes_on_where_it_is_and_after_what_its_client_has() -> None:
    bench = Bench()
    bench.two_up()
    ((member, submit),) = sent(resume(bench, 3))
    assert (member, submit.pipeline, submit.emitted) == (B, "p1", log(3).emitted)
    assert (submit.admitted, submit.context, submit.reader) == (True, b"c", 1)
    assert only(bench.tokens(B, "p1", 0, 3), Deliver) == [], "of an epoch that is over"
    (deliver,) = only(bench.tokens(B, "p1", 1, 2, 3, 4), Deliver)
    assert [t.position for t in deliver.tokens] == [3, 4]
    assert deliver.how == "resumed"


def test_a_stream_whose_place_is_gone_goes_anywhere() -> None:
    for home in ("p7", None):
        bench = Bench()
        bench.two_up()
        ((member, submit),) = sent(resume(bench, 3, home))
        assert (member, submit.pipeline, submit.admitted) == (A, "p0", True)


def test_taken_up_again_at_the_same_gateway() -> None:
    """The second connection has less than the first one: its own position counts, and what it lacks comes again."""
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0, 1, 2, 3)
    ((_, submit),) = sent(resume(bench, 2, "p0"))
    assert submit.emitted == log(2).emitted
    (deliver,) = only(bench.tokens(A, "p0", 1, 2, 3, 4), Deliver)
    assert [t.position for t in deliver.tokens] == [2, 3, 4]
    assert bench.router.live == 1


def test_a_superseded_stream_fails_without_a_cancel() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    effects = bench.refuse(A, "p0", RefusalCode.SUPERSEDED)
    assert bench.failed[1].code is FailCode.SUPERSEDED
    assert only(effects, SendCancel) == []
    assert bench.do(CancelAsked(1)) == []


def test_a_stream_that_is_left_runs_on() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    assert bench.do(LeaveAsked(1)) == []
    assert bench.tokens(A, "p0", 1, 1, 2) == [], "and nobody cancels it as a stranger"


def test_a_closing_gateway_takes_nothing_new_and_goes_on_with_the_rest() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit(1)
    assert bench.do(Closing()) == []
    bench.submit(2)
    assert bench.failed[2].code is FailCode.UNAVAILABLE
    assert only(bench.tokens(A, "p0", 1, 0), Deliver)
