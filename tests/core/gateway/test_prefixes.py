"""Requests go where the KV of how they begin is, unless what waits there costs more than it saves."""

from __future__ import annotations

from tests.core.gateway.routing import A, B, Bench, pipeline, sent
from web.gateway.routing.events import CancelAsked
from web.gateway.routing.prefixes import PIPELINES_MAX, PLACES_MAX, SPAN, Prefixes, places

LONG = tuple(range(10 * SPAN))


def placed(bench: Bench, rid: int, prompt: tuple[int, ...]) -> str:
    ((_, submit),) = sent(bench.submit(rid, prompt=prompt))
    return submit.pipeline


def test_prompts_that_begin_alike_have_the_same_places() -> None:
    one = places(LONG, "")
    assert len(one) == 9, "the last token is computed in any case"
    assert places((*LONG, 7), "")[:9] == one
    assert places((7, *LONG[1:]), "")[0] != one[0]
    assert places((*LONG[:SPAN], 7, *LONG[SPAN + 1 :]), "")[:2] == (
        one[0],
        places((*LONG[:SPAN], 7, *LONG[SPAN + 1 :]), "")[1],
    )
    assert not set(places(LONG, "salt")) & set(one)
    assert places(LONG[:SPAN], "") == ()


def test_a_pipeline_has_a_prompt_as_far_as_it_has_all_before() -> None:
    prefixes, prompt = Prefixes(), places(LONG, "")
    prefixes.sent(prompt, "p0")
    prefixes.sent(prompt[:3], "p1")
    assert prefixes.cached(prompt) == {"p0": 9 * SPAN, "p1": 3 * SPAN}
    assert prefixes.cached(places((*LONG[: 2 * SPAN], *LONG), "")) == {"p0": 2 * SPAN, "p1": 2 * SPAN}
    assert prefixes.cached(places(LONG[::-1], "")) == {}


def test_what_is_remembered_is_bounded() -> None:
    prefixes = Prefixes()
    first = places(LONG, "")
    for number in range(20):
        prefixes.sent(first, f"p{number}")
    assert list(prefixes.cached(first)) == [f"p{number}" for number in range(20 - PIPELINES_MAX, 20)]
    for number in range(PLACES_MAX // 9 + 2):
        prefixes.sent(places(LONG, str(number)), "p0")
    assert len(prefixes) == PLACES_MAX
    assert prefixes.cached(first) == {}


def two_pipelines() -> Bench:
    bench = Bench()
    bench.topology(pipeline("p0", A, 1), pipeline("p1", B, 1))
    bench.two_up()
    return bench


def computed(bench: Bench, rid: int, prompt: tuple[int, ...]) -> str:
    """It is placed, and has its first token."""
    where = placed(bench, rid, prompt)
    bench.tokens({"p0": A, "p1": B}[where], where, 1, 0, rid=rid)
    return where


def test_a_request_follows_its_prefix() -> None:
    bench = two_pipelines()
    first = computed(bench, 1, LONG)
    assert computed(bench, 2, (*LONG, 1, 2, 3)) == first
    other = computed(bench, 3, tuple(range(5000, 5000 + len(LONG))))
    assert other != first, "which has more streams"
    assert computed(bench, 4, (*LONG[: 5 * SPAN], 9, 9)) == first
    assert computed(bench, 5, tuple(range(5000, 5000 + 4 * SPAN))) == other


def test_what_waits_there_may_cost_more_than_the_prefix_saves() -> None:
    bench = two_pipelines()
    first = computed(bench, 1, LONG)
    assert placed(bench, 2, (*LONG, *range(9000, 9700))) == first
    assert placed(bench, 3, (*LONG[: 2 * SPAN], 1, 2)) != first, "it would wait for 1,340 tokens to save 128"


def test_a_prefix_is_worth_more_than_the_wait_that_it_saves() -> None:
    bench = two_pipelines()
    first = computed(bench, 1, LONG)
    other = tuple(range(5000, 5000 + 15 * SPAN))
    assert placed(bench, 2, (*LONG[: 2 * SPAN], *other)) == first
    assert placed(bench, 3, (*LONG, 1, 2)) == first, (
        "it waits for 1,088 tokens to save 576, which others wait for"
    )


def test_new_prompts_go_where_little_is_cached() -> None:
    """One after the other, none of which is alike: both caches are used."""
    bench = two_pipelines()
    where = []
    for number in range(20):
        prompt = tuple(range(10_000 * number, 10_000 * number + len(LONG) * (1 + number % 3)))
        where.append(computed(bench, number + 1, prompt))
        bench.do(CancelAsked(number + 1))
    assert 6 <= where.count("p0") <= 14


def test_shares_are_of_what_is_remembered() -> None:
    prefixes, prompt = Prefixes(), places(LONG, "")
    prefixes.sent(prompt, "p0")
    prefixes.sent(prompt[:3], "p1")
    prefixes.sent(prompt[:2], "p0")
    assert (prefixes.share("p0"), prefixes.share("p1"), prefixes.share("p2")) == (9, 3, 0)
    for number in range(PIPELINES_MAX):
        prefixes.sent(prompt[:1], f"q{number}")
    assert (prefixes.share("p0"), prefixes.share("p1")) == (8, 2), "the newest are remembered"
    for number in range(PLACES_MAX):
        prefixes.sent((number.to_bytes(16, "big"),), "p3")
    assert [prefixes.share(p) for p in ("p0", "p1", "q0", "p3")] == [0, 0, 0, PLACES_MAX]
