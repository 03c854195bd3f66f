"""Which instance holds a request's copy."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.ids import Member
from controlplane.contract.loads import REQUEST_WORK
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane.core.holders import (
    CANDIDATES,
    COPY_LIMIT_S,
    MOVES_AT_ONCE,
    MOVES_PER_S,
    SHUNNED_S,
    Holders,
    candidates_of,
    sources_of,
)
from dataplane.core.messages import Place

NAMES = ("p1", "p2", "p3")


def holders(stages: int = 1, fixed: bool = False, **loads: int) -> Holders:
    made = Holders(stages, fixed=fixed)
    made.allow(NAMES)
    for name, work in loads.items():
        made.heard(name, work, 0.0)
    return made


def copied(made: Holders, *stages: int) -> None:
    """All that is ordered arrives."""
    for order in made.orders():
        for stage in stages or (0,):
            for name in order.holders:
                made.copied(stage, order.rid, name)


def test_the_least_of_what_it_has_to_do_and_would_inherit() -> None:
    made = holders(p1=3 * REQUEST_WORK, p2=0, p3=1000 * REQUEST_WORK)
    chosen = []
    for rid in range(6):
        made.place(rid, 0.0)
        (order,) = made.orders()
        chosen += order.holders
    assert chosen == ["p2", "p2", "p2", "p1", "p2", "p1"], "as if they were new requests"


def test_fixed_is_the_next_one_whatever_it_has_to_do() -> None:
    made = holders(fixed=True, p1=1 << 20, p2=0, p3=0)
    for rid in range(4):
        made.place(rid, 0.0)
    assert {order.holders for order in made.orders()} == {("p1",)}
    made.tick(10.0)
    assert not made.ordered


def test_a_copy_counts_when_every_stage_has_it() -> None:
    made = holders(stages=3, p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    assert made.orders() == (Place(7, ("p1",)),)
    for stage in (0, 2, 2):
        made.copied(stage, 7, "p1")
    made.copied(1, 7, "p2")  # of an order that is over
    assert made.holder(7) is None
    assert not list(made.news())
    made.copied(1, 7, "p1")
    assert made.holder(7) == "p1"
    assert list(made.news()) == [(7, "p1")]


def test_the_new_copy_comes_before_the_old_one_goes() -> None:
    made = holders(p1=0, p2=500 * REQUEST_WORK, p3=500 * REQUEST_WORK)
    made.place(7, 0.0)
    copied(made)
    assert made.holder(7) == "p1"
    made.orders()
    for second in range(1, 30):
        made.heard("p1", 900 * REQUEST_WORK, float(second))
        made.heard("p2", 0, float(second))
        made.heard("p3", 500 * REQUEST_WORK, float(second))
    made.tick(30.0)
    assert made.orders() == (Place(7, ("p2", "p1")),)
    assert made.holder(7) == "p1", "until the other one has it"
    made.copied(0, 7, "p2")
    assert made.orders() == (Place(7, ("p2",)),)
    assert made.holder(7) == "p2"


def test_a_holder_that_is_gone_holds_nothing_and_another_is_found() -> None:
    made = holders(p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    copied(made)
    list(made.news())
    made.allow(("p2", "p3"))
    assert made.holder(7) is None
    assert list(made.news()) == [(7, None)]
    made.tick(1.0)
    (order,) = made.orders()
    assert set(order.holders) <= {"p2", "p3"}
    assert len(order.holders) == 1


def test_after_a_change_of_fence_stages_are_told_anew() -> None:
    made = holders(stages=2)
    made.place(1, 0.0)
    made.place(2, 0.0)
    orders = made.orders()
    made.copied(0, 1, orders[0].holders[0])
    made.reset()
    assert made.orders() == orders
    made.copied(1, 1, orders[0].holders[0])
    assert made.holder(1) is None, "the first stage may be another node now"


def idle(made: Holders, since: float, seconds: float) -> None:
    for tick in range(int(4 * seconds) + 1):
        now = since + tick / 4
        for name in NAMES:
            made.heard(name, 0, now)
        made.tick(now)


def test_a_copy_that_its_holder_cannot_take_goes_elsewhere() -> None:
    made = holders(stages=2, p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    assert made.orders() == (Place(7, ("p1",)),)
    made.copied(0, 7, "p1")  # the pool of the other stage's node is full
    idle(made, 0.0, COPY_LIMIT_S + 1.0)
    (order,) = made.orders()
    assert order.holders in {("p2",), ("p3",)}
    assert made.moved == 1
    made.place(8, COPY_LIMIT_S + 1.0)
    (another,) = made.orders()
    assert another.holders != ("p1",), "it takes none now"
    for rid, (holder,) in ((7, order.holders), (8, another.holders)):
        for stage in (0, 1):
            made.copied(stage, rid, holder)
    made.orders()
    for rid in range(20, 29):
        made.place(rid, COPY_LIMIT_S + SHUNNED_S + 1.0)
    assert ("p1",) in {order.holders for order in made.orders()}, "it may have room again"


def test_what_nobody_can_take_does_not_go_round() -> None:
    made = holders(p1=0, p2=0, p3=0)
    for rid in range(6):
        made.place(rid, 0.0)
    idle(made, 0.0, 3600.0)
    assert made.moved < 6 * 20


def test_a_copy_that_takes_long_stays_with_its_holder() -> None:
    """One candidate; or a stage at a time that says that its part is there."""
    made = Holders(3)
    made.allow(("p1",))
    made.place(7, 0.0)
    made.orders()
    idle(made, 0.0, 60.0)
    assert not made.ordered
    made = holders(stages=3, p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    made.orders()
    for stage in range(3):
        idle(made, stage * (COPY_LIMIT_S - 1.0), COPY_LIMIT_S - 1.0)
        made.copied(stage, 7, "p1")
    assert made.holder(7) == "p1"
    assert made.moved == 0


def test_after_a_change_of_fence_a_copy_has_its_time_again() -> None:
    made = holders(p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    made.reset()
    idle(made, 100.0, COPY_LIMIT_S - 1.0)
    assert made.orders() == (Place(7, ("p1",)),)


def test_a_copy_that_made_room_is_held_no_longer() -> None:
    made = holders(stages=2, p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    for stage in (0, 1):
        made.copied(stage, 7, "p1")
    made.orders()
    assert list(made.news()) == [(7, "p1")]
    made.lost(1, 7, "p1")
    assert made.holder(7) is None
    assert list(made.news()) == [(7, None)]
    assert made.orders() == (Place(7, ("p1",)),), (
        "it is sent again: other stages say whether theirs is still there"
    )
    for stage in (1, 0):
        made.copied(stage, 7, "p1")
    assert made.holder(7) == "p1"
    made.orders()
    made.lost(0, 7, "p1")
    idle(made, 0.0, COPY_LIMIT_S + 1.0)
    (order,) = made.orders()
    assert order.holders in {("p2",), ("p3",)}, "it has no room"


def test_a_copy_that_goes_while_the_other_stages_still_come_is_missing() -> None:
    made = holders(stages=2, p1=0, p2=9999, p3=9999)
    made.place(7, 0.0)
    made.copied(0, 7, "p1")
    made.lost(0, 7, "p1")
    made.copied(1, 7, "p1")
    assert made.holder(7) is None
    made.copied(0, 7, "p1")
    assert made.holder(7) == "p1"


def test_noise_moves_nothing() -> None:
    made = holders(p1=0, p2=0, p3=0)
    for rid in range(9):
        made.place(rid, 0.0)
    copied(made)
    made.orders()
    for tick in range(400):
        for at, name in enumerate(NAMES):
            made.heard(name, 1500 * ((tick + at) % 12 == 0), tick * 0.25)  # a prompt now and then
        made.tick(tick * 0.25)
    assert made.moved == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["place", "release", "copied", "lost", "allow", "load", "tick", "reset"]),
            st.integers(0, 11),
            st.integers(0, 40),
        ),
        max_size=120,
    )
)
def test_in_any_order_the_books_agree(happened: list[tuple[str, int, int]]) -> None:
    made, now = Holders(2), 0.0
    alive: set[int] = set()
    allowed: set[str] = set()
    for kind, rid, value in happened:
        now += 0.05
        match kind:
            case "place":
                made.place(rid, now)
                alive.add(rid)
            case "release":
                made.release(rid)
                alive.discard(rid)
            case "copied":
                made.copied(value % 2, rid, f"p{value // 2 % 5}")
            case "lost":
                made.lost(value % 2, rid, f"p{value // 2 % 5}")
            case "allow":
                names = [f"p{index}" for index in range(5) if value >> index & 1]
                made.allow(names)
                allowed = set(names)
            case "load":
                made.heard(f"p{rid % 5}", value * REQUEST_WORK, now)
            case "tick":
                made.tick(now)
            case _:
                made.reset()
        goals = [placed.goal for placed in made._placed.values()]
        assert set(made._placed) == alive
        assert +made._inherits == +type(made._inherits)(goal for goal in goals if goal is not None)
        assert {goal for goal in goals if goal is not None} <= allowed
        assert set(made._homeless) == {rid for rid, placed in made._placed.items() if placed.goal is None}
        assert set(made._coming) == {rid for rid, placed in made._placed.items() if placed.coming is not None}
        assert set(made._shunned) <= allowed
        assert set(made._orders) <= alive
        assert set(made._news) <= alive
    assert made.moved <= MOVES_AT_ONCE + MOVES_PER_S * now + 1


# ---------------------------------------------------------------------------------- who is asked


def topology(count: int, down: frozenset[int] = frozenset(), mode: Mode = Mode.LOAD_AWARE) -> Topology:
    pipelines = []
    for index in range(count):
        ranks = () if index in down else (Member(f"n{index}", "a"),)
        pipelines.append(Pipeline(f"p{index}", 1, (Stage((f"n{index}",), ranks),)))
    return Topology("g", 1, mode, tuple(pipelines))


@settings(max_examples=30)
@given(st.integers(2, 24), st.sets(st.integers(0, 23)), st.integers(1, 5))
def test_the_next_ones_that_are_up_and_elsewhere(count: int, down: set[int], per_host: int) -> None:
    whole = topology(count, frozenset(down))
    hosts = {f"n{index}": f"h{index // per_host}" for index in range(count)}
    up = [p for p in whole.pipelines if p.up]
    for pipeline in up:
        found = candidates_of(whole, pipeline, hosts)
        mine = hosts[pipeline.stages[0].homes[0]]
        elsewhere = [p for p in up if hosts[p.stages[0].homes[0]] != mine]
        assert pipeline not in found
        assert len(found) == min(CANDIDATES, len(elsewhere) or len(up) - 1)
        if elsewhere:
            assert all(p in elsewhere for p in found)
        for other in up:
            asked = other is not pipeline and pipeline in candidates_of(whole, other, hosts)
            assert (other in sources_of(whole, pipeline, hosts)) == asked


def test_in_other_modes_nobody() -> None:
    whole = topology(3, mode=Mode.REPLICATE)
    assert candidates_of(whole, whole.pipelines[0], {}) == []
    assert sources_of(whole, whole.pipelines[0], {}) == []
