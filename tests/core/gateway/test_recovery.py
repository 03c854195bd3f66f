"""Where the requests of an instance that failed go on, in modes where each has a holder."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.contract.requests import Tokens
from controlplane.contract.topology import Mode
from tests.core.gateway.routing import A, B, Bench, C, pipeline, sent
from web.gateway.routing.events import StreamUp, TokensReceived
from web.gateway.routing.policy import Policy
from web.gateway.routing.recovery import (
    LOOKED_AT,
    WAVE_LIMIT_S,
    WAVE_TOKENS,
    Option,
    Wave,
    destination,
    looked_at,
)

LONG = tuple(range(1200))


def option(name: str, requests: int = 0, prompt_tokens: int = 0, places: int = 100) -> Option:
    return Option(name, requests, prompt_tokens, places)


def test_to_the_holder_unless_computing_again_elsewhere_is_cheaper() -> None:
    idle, tokens = option("p1"), 1000
    for more, expected in ((0, "p2"), (14, "p2"), (16, "p1")):  # requests; 15.1 are as much work as is saved
        assert destination([idle, option("p2", more)], "p2", tokens) == expected
    assert destination([idle, option("p2", 16)], "p2", tokens, fixed=True) == "p2"
    assert destination([idle, option("p3", 1)], "p2", tokens, fixed=True) == "p1", "it is not there"
    assert destination([], "p2", tokens) is None


def test_a_free_place_before_a_queue_at_the_holder() -> None:
    assert destination([option("p1", 7, places=8), option("p2", 8, places=8)], "p2", 100_000) == "p1"
    assert destination([option("p1", 8, places=8), option("p2", 8, places=8)], "p2", 1) == "p2"


@given(st.integers(0, 1 << 60), st.integers(1, 200))
def test_looks_at_some_of_many_each_once(rid: int, count: int) -> None:
    found = list(looked_at(rid, count))
    assert len(set(found)) == len(found) == min(count, LOOKED_AT)
    assert all(0 <= index < count for index in found)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(1, WAVE_TOKENS))))
def test_a_wave_is_bounded_and_ends(steps: list[tuple[int, int, int]]) -> None:
    wave, inside = Wave(), {}
    for rid, where, tokens in steps:
        name = f"p{where}"
        if rid in inside:
            assert wave.ended(rid)
            del inside[rid]
        elif wave.admits(name, tokens, 0.0):
            wave.sent(rid, name, tokens)
            inside[rid] = name, tokens
        for each in range(3):
            counted = [count for there, count in inside.values() if there == f"p{each}"]
            assert sum(counted) <= max(WAVE_TOKENS, *counted, 0)
    for rid in inside:
        assert wave.ended(rid)
    assert not wave._tokens
    assert wave.admits("p0", 1 << 30, 0.0)


# ---------------------------------------------------------------------------------- the router


def three_up(mode: Mode = Mode.LOAD_AWARE, policy: Policy | None = None) -> Bench:
    bench = Bench(policy)
    bench.topology(pipeline("p0", A, 1), pipeline("p1", B, 1), pipeline("p2", C, 1), mode=mode)
    for member in (A, B, C):
        bench.do(StreamUp(member))
    return bench


def held(bench: Bench, rid: int, name: str, holder: str | None) -> None:
    member = {"p0": A, "p1": B, "p2": C}[name]
    bench.do(TokensReceived(member, Tokens(name, 1, (), ((rid, holder),))))


def down(bench: Bench, mode: Mode = Mode.LOAD_AWARE) -> list[tuple[object, object]]:
    return sent(
        bench.topology(pipeline("p0", None, 2), pipeline("p1", B, 1), pipeline("p2", C, 1), mode=mode)
    )


def on_p0(bench: Bench, count: int, size: int = 1200) -> list[int]:
    """As many requests as that with one token each on p0, and as many on each of the others."""
    mine = []
    for rid in range(1, 3 * count + 1):
        ((member, submit),) = sent(bench.submit(rid, prompt=(rid,) * size, max_tokens=500))
        bench.tokens(member, submit.pipeline, 1, 0, rid=rid)
        if member == A:
            mine.append(rid)
    assert len(mine) == count
    return mine


def test_who_is_interrupted_goes_to_its_holder_at_once() -> None:
    bench = three_up()
    first, second = on_p0(bench, 2)
    held(bench, first, "p0", "p2")
    held(bench, second, "p0", "p1")
    moves = {submit.rid: (member, len(submit.emitted), submit.admitted) for member, submit in down(bench)}
    assert moves == {first: (C, 1, True), second: (B, 1, True)}
    bench.tokens(C, "p2", 1, 1, rid=first)
    assert bench.router.counts["recovered_moved"] == 1


def test_a_holder_that_was_taken_back_is_not_believed() -> None:
    bench = three_up()
    (rid,) = on_p0(bench, 1)
    held(bench, rid, "p0", "p2")
    held(bench, rid, "p1", "p1")  # who says that has nothing to say of it
    assert bench.router._live[rid].holder == "p2"
    held(bench, rid, "p0", None)
    assert bench.router._live[rid].holder is None


def test_overflow_goes_to_the_least_loaded() -> None:
    bench = three_up()
    mine = on_p0(bench, 60, size=200)
    for rid in mine:
        held(bench, rid, "p0", "p2")
    moves = [member for member, _ in down(bench)]
    # With 200 tokens to compute again p1 is worth it once p2 has some three requests more.
    assert 0 < 2 * moves.count(B) < moves.count(C)


def test_in_mode_fixed_neighbour_all_go_to_the_holder() -> None:
    bench = three_up(Mode.FIXED_NEIGHBOUR)
    mine = on_p0(bench, 60, size=200)
    for rid in mine:
        held(bench, rid, "p0", "p1")
    assert [member for member, _ in down(bench, Mode.FIXED_NEIGHBOUR)] == [B] * 60


def test_what_has_no_copy_enters_little_by_little_and_nobody_waits_for_long() -> None:
    bench = three_up()
    mine = on_p0(bench, 8)
    first = down(bench)
    assert len(first) == 2, "one for each of the others: 1,201 tokens, and two are more than a wave has"
    member, submit = first[0]
    bench.tokens(member, submit.pipeline, 1, 1, rid=submit.rid)
    assert len(bench.effects) > 0
    moved = {submit.rid for _, submit in sent(bench.effects) if submit.emitted}
    assert len(moved) == 3, "it has been computed again: the next one"
    bench.do(StreamUp(B), WAVE_LIMIT_S)  # whatever happens
    moved = {submit.rid for _, submit in sent(bench.effects) if submit.emitted}
    assert moved == set(mine)
    assert not bench.failed


def test_who_has_no_token_yet_is_placed_like_a_new_one() -> None:
    bench = three_up()
    ((member, submit),) = sent(bench.submit(1, prompt=LONG))
    assert member == A
    ((member, submit),) = down(bench)
    assert member in (B, C)
    assert submit.emitted == ()
