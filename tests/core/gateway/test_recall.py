"""Who has this request: what a search costs, and that what is counted is what there is."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.requests import Log, Recalled, Sampling
from tests.core.counting import calls, lines
from tests.core.gateway.routing import Bench, only, pipeline
from tests.core.gateway.test_resume import recalls
from web.gateway.routing.events import (
    Effect,
    RecallAsked,
    RecallDone,
    RecalledReceived,
    SendRecall,
    StreamDown,
    StreamUp,
    Tick,
)
from web.gateway.routing.policy import Policy
from web.gateway.routing.recall import Recalls

LIMIT_S = 2.0
MEMBERS = [Member(f"m{index}", "1") for index in range(5)]


def log(rid: int, tokens: int, reader: int = 0) -> Log:
    return Log("p0", (5,), Sampling(8, seed=rid), tuple(range(tokens)), b"", reader)


class Crowd(Bench):
    """As many pipelines, each with a scheduler that can be asked."""

    def __init__(self, count: int) -> None:
        super().__init__(Policy(live_max=10_000))
        self.heads = [Member(f"m{index:03}", "1") for index in range(count)]
        self.pipelines = [pipeline(f"p{index}", head, 1) for index, head in enumerate(self.heads)]
        self.topology(*self.pipelines)
        for head in self.heads:
            self.do(StreamUp(head))

    def ask(self, *rids: int) -> None:
        for rid in rids:
            assert recalls(self.do(RecallAsked(rid, LIMIT_S))) == self.heads

    def answer(self, rid: int) -> list[Effect]:
        """Nobody has it but the last one."""
        for head in self.heads[:-1]:
            assert self.do(RecalledReceived(head, Recalled(rid))) == []
        return self.do(RecalledReceived(self.heads[-1], Recalled(rid, log(rid, 3))))


def test_a_search_costs_as_much_as_there_are_schedulers() -> None:
    cost = {}
    for count in (100, 400):
        crowd = Crowd(count)
        cost[count] = calls(lambda crowd=crowd: crowd.ask(1)) + lines(lambda crowd=crowd: crowd.answer(1))
        assert len(crowd.router._recalls) == 0
    assert cost[400] < 5 * cost[100]


def answered_once(count: int) -> Crowd:
    """Many searches, each of which waits for one answer."""
    crowd = Crowd(count)
    crowd.ask(*range(20))
    for rid in range(20):
        for head in crowd.heads[1:]:
            crowd.do(RecalledReceived(head, Recalled(rid)))
    return crowd


@pytest.mark.parametrize("what", ["answer", "break", "return", "topology"])
def test_what_happens_to_one_scheduler_does_not_cost_as_much_as_there_are(what: str) -> None:
    cost = {}
    for count in (100, 400):
        crowd = answered_once(count)
        recalls, first = crowd.router._recalls, crowd.heads[0]
        if what == "return":
            recalls.changed(first, False)

        def happens(recalls: Recalls = recalls, first: Member = first) -> None:
            match what:
                case "answer":
                    recalls.answer(first, Recalled(7))
                case "topology":
                    recalls.changed(first, None)
                case _:
                    recalls.changed(first, what == "return")
            recalls.settle(0.0, [])

        cost[count] = lines(happens)
    assert cost[400] == cost[100]


class Level:
    """What should come of the world as it is, made anew after each event."""

    def __init__(self) -> None:
        self.streams: dict[Member, bool] = {}
        self.until: dict[int, float] = {}
        self.asked: dict[int, set[Member]] = {}
        self.answered: dict[int, set[Member]] = {}
        self.found: dict[int, list[Log]] = {}

    def changed(self, member: Member, up: bool | None) -> None:
        if up is not None:
            self.streams[member] = up
        elif member in self.streams:
            del self.streams[member]
        if not up:
            for asked in self.asked.values():
                asked.discard(member)

    def begin(self, rid: int, until: float) -> None:
        if rid not in self.until:
            self.until[rid] = until
            self.asked[rid], self.answered[rid], self.found[rid] = set(), set(), []

    def answer(self, member: Member, recalled: Recalled) -> None:
        if recalled.rid in self.until:
            self.answered[recalled.rid].add(member)
            self.found[recalled.rid] += [recalled.log] if recalled.log is not None else []

    def settle(self, now: float) -> tuple[set[tuple[int, Member]], set[tuple[int, int, bool]]]:
        """(request, who is asked) and (request, tokens found or -1, whether that is sure)."""
        up = {member for member, up in self.streams.items() if up}
        asks, ends = set(), set()
        for rid, until in list(self.until.items()):
            asks |= {(rid, member) for member in up - self.asked[rid] - self.answered[rid]}
            self.asked[rid] |= up
            sure = bool(self.streams) and self.streams.keys() <= self.answered[rid]
            if sure or (self.found[rid] and up <= self.answered[rid]) or now >= until:
                ends.add((rid, max((len(log.emitted) for log in self.found[rid]), default=-1), sure))
                del self.until[rid], self.asked[rid], self.answered[rid], self.found[rid]
        return asks, ends


@pytest.mark.parametrize("seed", range(100))
def test_what_is_counted_is_what_there_is(seed: int) -> None:
    random, now = Random(seed), 0.0
    recalls, level = Recalls(), Level()
    for _ in range(120):
        member, rid = random.choice(MEMBERS), random.randrange(4)
        match random.randrange(6):
            case 0:
                now += random.random()
            case 1 | 2:
                up = random.choice([True, True, False, None])
                for each in (recalls, level):
                    each.changed(member, up)
            case 3:
                for each in (recalls, level):
                    each.begin(rid, now + LIMIT_S)
            case _:
                recalled = Recalled(rid, log(rid, random.randrange(5)) if random.random() < 0.3 else None)
                for each in (recalls, level):
                    each.answer(member, recalled)
        out: list[Effect] = []
        recalls.settle(now, out)
        asked = [(effect.recall.rid, effect.member) for effect in only(out, SendRecall)]
        assert len(asked) == len(set(asked))
        ends = {
            (end.rid, len(end.log.emitted) if end.log is not None else -1, end.sure)
            for end in only(out, RecallDone)
        }
        assert (set(asked), ends) == level.settle(now)


def test_a_scheduler_that_was_none_for_a_while_is_asked_again() -> None:
    """Its stream was closed: what was asked on it is not answered any more."""
    crowd = Crowd(2)
    crowd.ask(1)
    p0, p1 = crowd.pipelines
    crowd.topology(p0, pipeline("p1", None, 2))
    crowd.topology(p0, replace(p1, epoch=3))
    assert recalls(crowd.do(StreamUp(crowd.heads[1]))) == [crowd.heads[1]]
    crowd.do(RecalledReceived(crowd.heads[0], Recalled(1)))
    assert crowd.do(RecalledReceived(crowd.heads[1], Recalled(1))) == [RecallDone(1, None, True)]


def test_a_search_before_any_scheduler_is_known_waits_for_them() -> None:
    bench = Bench()
    assert bench.do(RecallAsked(1, LIMIT_S)) == []
    bench.topology(pipeline("p0", MEMBERS[0], 1))
    assert recalls(bench.do(StreamUp(MEMBERS[0]))) == [MEMBERS[0]]
    bench.do(StreamDown(MEMBERS[0]))
    assert bench.do(Tick(), LIMIT_S) == [RecallDone(1, None, False)]
