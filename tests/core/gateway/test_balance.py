"""Which pipeline a new request goes to."""

from __future__ import annotations

from collections import Counter

from controlplane.contract.ids import Member
from controlplane.contract.topology import Pipeline, Stage
from tests.core.counting import calls
from tests.core.gateway.routing import TAIL, A, B, Bench, pipeline, sent
from web.gateway.routing.events import CancelAsked, StreamDown, StreamUp
from web.gateway.routing.policy import Policy


def test_the_fewest_prompt_tokens_that_wait() -> None:
    bench = Bench()
    bench.two_up()
    sizes = (100, 10, 10, 200, 10)
    places = [sent(bench.submit(rid, prompt=(rid,) * size))[0][0] for rid, size in enumerate(sizes)]
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
        ((member, submit),) = sent(bench.submit(rid, prompt=(rid,) * size))
        went.append(member)
        bench.tokens(member, submit.pipeline, 1, 0, rid=rid)
    assert went == [A, B, A, B, B, B, A]
    assert sent(bench.submit(8, prompt=(8,) * 300))[0][0] == B
    assert sent(bench.submit(9, prompt=(9,) * 300))[0][0] == A, "a prompt waits there"


def crowd(pipelines: int, places: int = 2, up: int | None = None) -> Bench:
    """Many pipelines, of which the first `up` can be reached."""
    bench = Bench(Policy(places=places))
    heads = [Member(f"m{index}", "1") for index in range(pipelines)]
    bench.topology(*(pipeline(f"p{index}", head, 1) for index, head in enumerate(heads)))
    for head in heads[: pipelines if up is None else up]:
        bench.do(StreamUp(head))
    return bench


def test_to_place_a_request_costs_the_same_among_hundreds_of_pipelines() -> None:
    cost = {}
    for pipelines in (32, 512):
        bench = crowd(pipelines)
        bench.submit(999_983)
        cost[pipelines] = calls(lambda bench=bench: bench.submit(7_919))
    assert cost[512] <= cost[32] + 20


def test_many_that_wait_while_nobody_can_be_reached_look_at_nobody() -> None:
    cost = {}
    for pipelines in (32, 512):
        bench = crowd(pipelines, up=0)
        for rid in range(1, 200):
            bench.submit(rid * 7_919)
        cost[pipelines] = calls(lambda bench=bench: bench.do(StreamDown(Member("m0", "1"))))
    assert cost[512] <= cost[32] + 12 * 480  # who can be reached is listed once


def test_a_free_place_among_many_is_found_and_all_places_are_used() -> None:
    bench = crowd(40, places=2)
    for rid in range(1, 65):
        bench.submit(rid * 7_919)
    streams = Counter(member for member, _ in sent(bench.effects))
    assert sum(streams.values()) == 64
    assert max(streams.values()) <= 2, "four fifths of the places: nobody waits for one"


def test_the_only_ones_that_can_be_reached_among_many_are_found() -> None:
    bench = crowd(200, up=3)
    for rid in range(1, 7):
        bench.submit(rid * 7_919)
    streams = Counter(member.node for member, _ in sent(bench.effects))
    assert streams == {"m0": 2, "m1": 2, "m2": 2}
