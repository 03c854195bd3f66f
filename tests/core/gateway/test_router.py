"""The router by direct calls: where requests go, and what becomes of them when the world changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.ids import Member
from controlplane.contract.requests import FinishReason, RefusalCode, Refused, Sampling, Submit, Token, Tokens
from controlplane.contract.topology import Mode, Move, MovePhase, Pipeline, Stage, Topology
from web.gateway.events import (
    CancelAsked,
    CloseStream,
    Deliver,
    Effect,
    Event,
    Fail,
    FailCode,
    OpenStream,
    RefusalReceived,
    SendCancel,
    SendSubmit,
    ShutDown,
    StreamDown,
    StreamUp,
    SubmitAsked,
    Tick,
    TokensReceived,
    TopologySeen,
)
from web.gateway.live import Policy
from web.gateway.router import Router

A, B, C, TAIL = (Member(name, "1") for name in "abct")
PROMPT = (5, 6, 7)
LENGTH = 8
E = TypeVar("E", bound=Effect)


def pipeline(name: str, head: Member | None, epoch: int, move: Move | None = None) -> Pipeline:
    ranks = (head,) if head else ()
    return Pipeline(name, epoch, (Stage(("h",), ranks), Stage(("t",), (TAIL,))), move)


def topology(counter: int, *pipelines: Pipeline, mode: Mode = Mode.REPLICATE) -> Topology:
    return Topology("default", counter, mode, pipelines)


class Bench:
    """A router, its clock, and everything it has asked for."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.router = Router(policy or Policy())
        self.now = 100.0
        self.effects: list[Effect] = []
        self.streams: dict[int, list[int]] = {}
        self.failed: dict[int, Fail] = {}

    def do(self, event: Event, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        effects = self.router.step(event, self.now)
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Deliver):
                self.streams.setdefault(effect.rid, []).extend(t.token for t in effect.tokens)
            if isinstance(effect, Fail):
                self.failed[effect.rid] = effect
        return effects

    def topology(self, *pipelines: Pipeline, mode: Mode = Mode.REPLICATE) -> list[Effect]:
        counter = (self.router.topology.counter if self.router.topology else 0) + 1
        return self.do(TopologySeen(topology(counter, *pipelines, mode=mode)))

    def two_up(self) -> None:
        self.topology(pipeline("p0", A, 1), pipeline("p1", B, 1))
        self.do(StreamUp(A))
        self.do(StreamUp(B))

    def submit(
        self, rid: int = 1, max_tokens: int = LENGTH, prompt: tuple[int, ...] = PROMPT
    ) -> list[Effect]:
        return self.do(SubmitAsked(rid, prompt, Sampling(max_tokens, seed=0)))

    def tokens(
        self, member: Member, name: str, epoch: int, *positions: int, rid: int = 1, add: int = 0
    ) -> list[Effect]:
        items = tuple(right(rid, position, add) for position in positions)
        return self.do(TokensReceived(member, Tokens(name, epoch, items)))

    def refuse(self, member: Member, name: str, code: RefusalCode, rid: int = 1) -> list[Effect]:
        return self.do(RefusalReceived(member, Refused(rid, name, code, "no", 3.0)))

    def poison(self, member: Member, name: str, node: str, rid: int = 1) -> list[Effect]:
        refused = Refused(rid, name, RefusalCode.POISONED, "no", node=node)
        return self.do(RefusalReceived(member, refused))


def right(rid: int, position: int, add: int = 0) -> Token:
    finish = FinishReason.LENGTH if position == LENGTH - 1 else None
    return Token(rid, position, rid * 1000 + position * 3 + add, finish=finish)


def only(effects: list[Effect], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: list[Effect]) -> list[tuple[Member, Submit]]:
    return [(effect.member, effect.submit) for effect in only(effects, SendSubmit)]


def test_the_fewest_prompt_tokens_that_wait() -> None:
    bench = Bench()
    bench.two_up()
    sizes = (100, 10, 10, 200, 10)
    places = [sent(bench.submit(rid, prompt=(7,) * size))[0][0] for rid, size in enumerate(sizes)]
    assert places == [A, B, B, B, A]


def test_the_fewest_streams_once_all_have_begun() -> None:
    bench = Bench()
    bench.two_up()
    for rid in range(1, 6):
        ((member, submit),) = sent(bench.submit(rid, 10))
        bench.tokens(member, submit.pipeline, 1, 0, rid=rid)
    on_a = [live.log.rid for live in bench.router._live.values() if live.pipeline == "p0"]
    assert len(on_a) == 3, "they alternate"
    bench.do(CancelAsked(on_a[0]))
    bench.do(CancelAsked(on_a[1]))
    assert [sent(bench.submit(rid, 10))[0][0] for rid in (6, 7)] == [A, B], "one each: the first prompt waits"


def test_a_free_place_before_a_short_wait_for_prompts() -> None:
    bench = Bench(Policy(places=1))
    bench.two_up()
    ((first, submit),) = sent(bench.submit(1, prompt=(7,) * 10))
    bench.tokens(first, submit.pipeline, 1, 0, rid=1)  # it runs, and no prompt waits there
    assert sent(bench.submit(2, prompt=(7,) * 500))[0][0] == B
    bench.do(CancelAsked(1))
    assert sent(bench.submit(3, prompt=(7,) * 10))[0][0] == A, "that place is free again"
    assert sent(bench.submit(4, prompt=(7,) * 10))[0][0] == A, "nowhere: the fewest prompt tokens wait there"


def test_a_long_prompt_goes_where_no_stage_is_borrowed() -> None:
    bench = Bench()
    tail = Stage((TAIL.node,), (TAIL,))
    lent = Pipeline("p0", 1, (Stage((A.node,), (A,)), Stage(("gone",), (TAIL,))))
    bench.topology(lent, Pipeline("p1", 1, (Stage((B.node,), (B,)), tail)))
    bench.do(StreamUp(A))
    bench.do(StreamUp(B))
    went = []
    for rid, size in enumerate((10, 10, 10, 20, 100, 100, 10)):
        ((member, submit),) = sent(bench.submit(rid, prompt=(7,) * size))
        went.append(member)
        bench.tokens(member, submit.pipeline, 1, 0, rid=rid)
    assert went == [A, B, A, B, B, B, A]
    assert sent(bench.submit(8, prompt=(7,) * 300))[0][0] == B
    assert sent(bench.submit(9, prompt=(7,) * 300))[0][0] == A, "a prompt waits there"


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


def test_stale_epoch_is_dropped_and_asked_for() -> None:
    bench = Bench()
    bench.two_up()
    bench.submit()
    bench.tokens(A, "p0", 1, 0)
    bench.topology(pipeline("p0", A, 2), pipeline("p1", B, 1))
    ((_, submit),) = sent(bench.tokens(A, "p0", 1, 1, 2))
    assert len(submit.emitted) == 1
    assert only(bench.tokens(A, "p0", 2, 3), Deliver) == []  # a gap: asked for a moment ago
    assert sent(bench.do(Tick(), 0.2)) != []  # nothing came of it: again
    (deliver,) = only(bench.tokens(A, "p0", 2, 1, 2), Deliver)
    assert deliver.how == "continued"
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
    assert only(bench.refuse(A, "p0", RefusalCode.OVERLOADED, rid=2), Fail) == []
    assert sent(bench.do(Tick(), 3.5)) != []


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


def test_poison_is_quarantined_and_planned_moves_do_not_count() -> None:
    bench = Bench()
    move = Move(0, B, MovePhase.QUIESCE, "hand-back")
    bench.topology(pipeline("p0", A, 1))
    bench.do(StreamUp(A))
    bench.submit()
    bench.topology(pipeline("p0", A, 1, move))
    bench.topology(pipeline("p0", B, 2))
    heads = [Member(f"x{n}", "1") for n in range(3)]
    for n, head in enumerate([B, *heads[:2]]):
        bench.do(StreamUp(head))
        assert not bench.failed, n
        bench.topology(pipeline("p0", heads[n], 3 + n))
    assert bench.failed[1].code is FailCode.QUARANTINED
    assert bench.router.counts["quarantined"] == 1


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


# Any history: what a client gets is a prefix, and each request ends at most once.

HEADS = (A, B, C)
MOVES = st.one_of(
    st.tuples(st.just("place"), st.sampled_from([None, 0, 1, 2]), st.sampled_from([None, 0, 1, 2])),
    st.tuples(st.just("up"), st.integers(0, 2)),
    st.tuples(st.just("down"), st.integers(0, 2)),
    st.tuples(st.just("emit"), st.integers(0, 2), st.integers(0, 1), st.integers(-1, 1)),
    st.tuples(st.just("refuse"), st.integers(0, 2), st.integers(0, 1), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.1, 0.7, 3.0])),
    st.tuples(st.just("cancel"), st.integers(1, 3)),
    st.tuples(st.just("replay"), st.integers(0, 2), st.integers(0, 1), st.integers(0, LENGTH - 1)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=60), st.sampled_from([Mode.REPLICATE, Mode.STOP_RESTART]))
def test_any_history_gives_prefixes(moves: list[tuple[object, ...]], mode: Mode) -> None:
    bench = Bench(replace(Policy(), deaths_max=1000))
    world = World(bench, mode)
    for rid in (1, 2, 3):
        bench.submit(rid)
    for move in moves:
        world.apply(move)
        world.check()
    # Let all be well again: every request that has not failed ends with the right tokens.
    world.apply(("place", 0, 1))
    for member in HEADS:
        bench.do(StreamUp(member))
    for _ in range(60):
        bench.do(Tick(), 0.05)
        world.apply(("emit", 0, 0, 0))
        world.apply(("emit", 1, 1, 0))
        world.check()
    for rid in (1, 2, 3):
        done = bench.streams.get(rid, []) == [right(rid, p).token for p in range(LENGTH)]
        assert done or rid in bench.failed or rid in world.cancelled
    assert bench.router.live == 0
    assert not bench.router.restless


class World:
    """Schedulers that do what Submit says, and a topology."""

    def __init__(self, bench: Bench, mode: Mode) -> None:
        self.bench = bench
        self.mode = mode
        self.epochs = {"p0": 1, "p1": 1}
        self.heads: dict[str, Member | None] = {"p0": A, "p1": B}
        self.cursor: dict[tuple[Member, str, int], int] = {}
        self.seen = 0
        self.cancelled: set[int] = set()
        bench.topology(pipeline("p0", A, 1), pipeline("p1", B, 1), mode=mode)
        bench.do(StreamUp(A))
        bench.do(StreamUp(B))

    def apply(self, move: tuple[object, ...]) -> None:
        bench = self.bench
        match move:
            case ("place", a, b):
                counter = bench.router.topology.counter + 1 if bench.router.topology else 1
                for name, where in (("p0", a), ("p1", b)):
                    head = HEADS[where] if isinstance(where, int) else None
                    if head != self.heads[name] or head is None:
                        self.heads[name], self.epochs[name] = head, counter
                parts = [pipeline(n, self.heads[n], self.epochs[n]) for n in ("p0", "p1")]
                bench.topology(*parts, mode=self.mode)
            case ("up", int(n)):
                bench.do(StreamUp(HEADS[n]))
            case ("down", int(n)):
                bench.do(StreamDown(HEADS[n]))
            case ("wait", float(seconds)):
                bench.do(Tick(), seconds)
            case ("cancel", int(rid)):
                self.cancelled.add(rid)
                bench.do(CancelAsked(rid))
            case ("refuse", int(n), int(p), int(rid)):
                code = RefusalCode.DROPPED if rid == 3 else RefusalCode.NOT_HERE
                bench.refuse(HEADS[n], f"p{p}", code, rid)
                self.cursor.pop((HEADS[n], f"p{p}", rid), None)
            case ("replay", int(n), int(p), int(position)):
                for rid in (1, 2, 3):
                    bench.tokens(HEADS[n], f"p{p}", self.epochs[f"p{p}"], position, rid=rid)
            case ("emit", int(n), int(p), int(shift)):
                self.emit(HEADS[n], f"p{p}", shift)
        self.read_effects()

    def emit(self, member: Member, name: str, shift: int) -> None:
        for (holder, of, rid), position in list(self.cursor.items()):
            if (holder, of) == (member, name) and position < LENGTH:
                self.cursor[holder, of, rid] = position + 1
                self.bench.tokens(member, name, self.epochs[name] + shift, position, rid=rid)
                self.read_effects()

    def read_effects(self) -> None:
        for effect in self.bench.effects[self.seen :]:
            if isinstance(effect, SendSubmit):
                key = (effect.member, effect.submit.pipeline, effect.submit.rid)
                self.cursor[key] = len(effect.submit.emitted)
            if isinstance(effect, SendCancel):
                self.cursor.pop((effect.member, effect.cancel.pipeline, effect.cancel.rid), None)
        self.seen = len(self.bench.effects)

    def check(self) -> None:
        for rid, tokens in self.bench.streams.items():
            assert tokens == [right(rid, p).token for p in range(len(tokens))]
        fails = [effect.rid for effect in self.bench.effects if isinstance(effect, Fail)]
        assert len(fails) == len(set(fails))
