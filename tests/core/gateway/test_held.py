"""Hundreds of requests that wait cost the streams that go on nothing, and each goes on when its time has come."""

from __future__ import annotations

import random

from controlplane.contract.ids import Member
from controlplane.contract.requests import RefusalCode, Sampling
from tests.core.counting import calls, lines
from tests.core.gateway.routing import A, B, Bench, only, pipeline, sent
from web.gateway.routing.balance import Loads
from web.gateway.routing.events import Fail, FailCode, SendSubmit, StreamDown, StreamUp, SubmitAsked, Tick
from web.gateway.routing.policy import Policy

MANY = 768


def loaded(many: int) -> Bench:
    """`many` streams on p0, which goes down; one on p1, which goes on."""
    bench = Bench()
    bench.topology(pipeline("p0", A, 1), pipeline("p1", None, 0))
    bench.do(StreamUp(A))
    for rid in range(10, 10 + many):
        bench.submit(rid, 10)
        bench.tokens(A, "p0", 1, 0, rid=rid)
    bench.topology(pipeline("p0", A, 1), pipeline("p1", B, 2))
    bench.do(StreamUp(B))
    bench.submit(1, 100)
    bench.topology(pipeline("p0", None, 3), pipeline("p1", B, 2))
    return bench


def test_a_token_of_a_healthy_stream_costs_the_same_however_many_wait() -> None:
    alone, crowded = loaded(1), loaded(MANY)
    assert crowded.router.live == MANY + 1
    cost = [calls(lambda b=bench: b.tokens(B, "p1", 2, 0)) for bench in (alone, crowded)]
    assert cost[1] <= cost[0] + 10, "nobody who waits is looked at for it"
    idle = calls(lambda: crowded.do(Tick()))
    assert idle < 20


def test_the_move_of_all_of_them_costs_the_same_for_each() -> None:
    few, crowded = loaded(MANY // 8), loaded(MANY)
    cost = [calls(lambda b=bench: b.do(Tick(), after_s=0.6)) for bench in (few, crowded)]
    for bench, many in ((few, MANY // 8), (crowded, MANY)):
        moved = [effect.submit.rid for effect in only(bench.effects, SendSubmit) if effect.member == B]
        assert sorted(moved) == [1, *range(10, 10 + many)]
    assert cost[1] < 9 * cost[0], "linear: eight times as many cost eight times as much"


def test_when_all_streams_break_each_costs_the_same_however_many_there_are() -> None:
    cost = {}
    for heads in (32, 256):
        bench = Bench(Policy(places=3))
        members = [Member(f"m{index}", "1") for index in range(heads)]
        bench.topology(*(pipeline(f"p{index}", head, 1) for index, head in enumerate(members)))
        for head in members:
            bench.do(StreamUp(head))
        for rid in range(3 * heads):
            bench.submit(rid)
        assert sum(map(len, bench.router._placed.values())) == 3 * heads

        def break_all(bench: Bench = bench, members: list[Member] = members) -> None:
            for head in members:
                bench.do(StreamDown(head), after_s=0.001)

        cost[heads] = lines(break_all)
        assert len(bench.router._held) == 3 * heads
        assert bench.router._placed == {}
        back = [member for head in members for member, _ in sent(bench.do(StreamUp(head)))]
        assert len(back) == 3 * heads, "each goes on where it was"
    assert cost[256] < 9 * cost[32], "linear: eight times as many cost eight times as much"


def test_each_is_failed_when_its_own_grace_is_over() -> None:
    bench = Bench(Policy(grace_s=5.0))
    bench.two_up()
    bench.topology(pipeline("p0", None, 2), pipeline("p1", B, 1))
    bench.do(StreamDown(B))
    for rid in (1, 2, 3):
        bench.do(SubmitAsked(rid, (1, 2), Sampling(4, seed=0)), after_s=1.0)
    for rid in (1, 2, 3):
        failed = only(bench.do(Tick(), after_s=3.01 if rid == 1 else 1.0), Fail)
        assert [(effect.rid, effect.code) for effect in failed] == [(rid, FailCode.UNAVAILABLE)]
    assert not bench.router.restless


def test_a_span_that_ends_between_ticks_is_seen_at_the_next() -> None:
    bench = loaded(3)
    assert not only(bench.do(Tick(), after_s=0.49), SendSubmit)
    assert len(only(bench.do(Tick(), after_s=0.02), SendSubmit)) == 3


def test_a_stream_that_comes_back_wakes_everybody() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit(1)
    bench.submit(2)
    bench.do(StreamDown(A))
    bench.do(StreamDown(B))
    bench.do(Tick(), after_s=1.0)
    assert len(sent(bench.do(StreamUp(A)))) == 1, "the one that runs there"
    assert len(sent(bench.do(StreamUp(B)))) == 1


def test_what_is_counted_is_what_is_there() -> None:
    """After any history the loads equal those counted anew."""
    rng = random.Random(7)
    bench = Bench(Policy(places=3))
    bench.two_up()
    for _ in range(2000):
        rid = rng.randrange(1, 12)
        live = bench.router._live.get(rid)
        match rng.randrange(6):
            case 0 | 1:
                bench.submit(rid, rng.randrange(1, 9), (5,) * rng.randrange(1, 40))
            case 2 if live is not None and live.sent_to is not None and live.pipeline is not None:
                bench.tokens(live.sent_to, live.pipeline, 9, len(live.log.emitted), rid=rid)
            case 3 if live is not None and live.sent_to is not None and live.pipeline is not None:
                bench.refuse(live.sent_to, live.pipeline, rng.choice(list(RefusalCode)), rid)
            case 4:
                bench.do(rng.choice([StreamDown, StreamUp])(rng.choice([A, B])))
            case _:
                bench.do(Tick(), after_s=rng.random())
        anew = Loads()
        for live in bench.router._live.values():
            anew.count(live)
        assert anew._loads == bench.router._loads._loads
        assert anew._prompt_tokens == bench.router._loads._prompt_tokens
        assert anew._counted == bench.router._loads._counted
        placed = {(live.sent_to, rid) for rid, live in bench.router._live.items() if live.sent_to is not None}
        assert placed == {(member, rid) for member, lives in bench.router._placed.items() for rid in lives}
