"""What a gateway remembers of a request's life, and the cause that it finds for a pause (pure)."""

from __future__ import annotations

import msgspec

from controlplane.contract.ids import Member
from controlplane.contract.lives import PAUSES_MAX, PLACES_MAX
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology, change_of
from web.gateway.lives import LEFT, Lives, OpenLife

N0, N1, N2, N3 = (Member(f"n{k}", "a") for k in range(4))


def topology(counter: int, **pipelines: tuple[int, Member, Member]) -> Topology:
    made = [
        Pipeline(name, epoch, (Stage((first.node,), (first,)), Stage((second.node,), (second,))))
        for name, (epoch, first, second) in pipelines.items()
    ]
    return Topology("default", counter, Mode.REPLICATE, tuple(made))


def life(lives: Lives, request: str = "r", rids: tuple[int, ...] = (1,), began: float = 100.0) -> OpenLife:
    made = OpenLife(lives, request, "chat", "alice", "m", True, False, rids, 12, began)
    made.open()
    return made


def test_a_pause_knows_its_cause_and_its_epoch() -> None:
    lives = Lives("g1")
    lives.topology(topology(1, p0=(4, N0, N1), p1=(2, N2, N3)), 90.0)
    one = life(lives)
    lives.sent(1, N0, "p0", 100.5)
    one.first_token(0.75)
    lives.topology(topology(2, p0=(5, N0, N3), p1=(2, N2, N3)), 110.0)
    lives.paused(1, 0.3, "continued", 110.2)
    one.finishes[0] = "length"
    (running,) = lives.find("r")
    assert (running.lasted_s, running.status, running.end) == (None, 0, "")
    one.end(40, 120.0)
    (found,) = lives.find("r")
    assert (found.gateway, found.key, found.tokens, found.lasted_s) == ("g1", "alice", 40, 20.0)
    assert (found.sent_s, found.first_token_s, found.status, found.end) == (0.5, 0.75, 200, "length")
    assert [(p.pipeline, p.node, p.epoch) for p in found.places] == [("p0", "n0", 4)]
    (pause,) = found.pauses
    assert (pause.at_s, pause.lasted_s, pause.how, pause.epoch) == (10.2, 0.3, "continued", 5)
    assert pause.cause == "failure of p0, epoch 4 -> 5: stage 1: n1 -> n3"


def test_each_of_two_pauses_has_its_own_cause() -> None:
    lives = Lives()
    lives.topology(topology(1, p0=(4, N0, N1)), 99.0)
    lives.topology(topology(2, p0=(5, N0, N1)), 99.5)  # before the request came
    life(lives)
    lives.sent(1, N0, "p0", 100.0)
    lives.topology(topology(3, p0=(6, N0, N3)), 101.0)
    lives.paused(1, 0.2, "continued", 101.1)
    lives.topology(topology(4, p0=(7, N0, N1)), 101.5)
    lives.paused(1, 0.2, "continued", 101.6)
    lives.paused(1, 0.2, "continued", 101.9)  # of the same change
    (found,) = lives.find("r")
    first, second = "epoch 5 -> 6: stage 1: n1 -> n3", "epoch 6 -> 7: stage 1: n3 -> n1"
    assert [pause.cause for pause in found.pauses] == [
        f"failure of p0, {first}",
        f"failure of p0, {second}",
        f"failure of p0, {first}; failure of p0, {second}",
    ]


def test_what_befell_another_pipeline_or_long_ago_is_no_cause() -> None:
    lives = Lives()
    lives.topology(topology(1, p0=(4, N0, N1), p1=(2, N2, N3)), 90.0)
    lives.topology(topology(2, p0=(5, N0, N3), p1=(2, N2, N3)), 95.0)
    life(lives)
    lives.sent(1, N0, "p0", 100.0)
    lives.topology(topology(3, p0=(5, N0, N3), p1=(3, N2, N1)), 119.0)
    lives.broke(N2, 119.5)
    lives.paused(1, 0.5, "resumed", 120.0)
    (found,) = lives.find("r")
    assert found.pauses[0].cause.startswith("not known here")
    lives.broke(N0, 121.0)
    lives.turned_down(N0, "p0", "its node serves that stage no more", 121.1)
    lives.paused(1, 0.5, "resubmitted", 121.5)
    (found,) = lives.find("r")
    assert found.pauses[1].cause == (
        "the connection to the scheduler on n0 broke; "
        "the scheduler on n0 gave it up: its node serves that stage no more"
    )


def test_a_stream_that_moves_names_what_drove_it_away() -> None:
    lives = Lives()
    lives.topology(topology(1, p0=(4, N0, N1), p1=(2, N2, N3)), 90.0)
    life(lives)
    lives.sent(1, N0, "p0", 100.0)
    gone = Pipeline("p0", 5, (Stage(("n0",)), Stage(("n1",), (N1,))))
    other = topology(1, p1=(2, N2, N3)).pipelines[0]
    lives.topology(Topology("default", 2, Mode.REPLICATE, (gone, other)), 110.0)
    lives.sent(1, N2, "p1", 110.4)
    lives.paused(1, 0.6, "moved", 110.6)
    (found,) = lives.find("r")
    assert (found.pauses[0].pipeline, found.pauses[0].epoch) == ("p1", 2)
    assert found.pauses[0].cause == "failure of p0, epoch 4 -> 5: stage 0: n0 -> nobody"


def test_a_wait_that_nothing_explains_is_told_once() -> None:
    lives = Lives()
    lives.topology(topology(1, p0=(4, N0, N1)), 90.0)
    one = life(lives)
    lives.sent(1, N0, "p0", 100.0)
    one.waited(0, 2.0, 104.0)
    lives.topology(topology(2, p0=(5, N0, N3)), 109.0)
    lives.paused(1, 1.5, "continued", 110.0)
    one.waited(0, 1.5, 110.001)  # the same wait, as its reader sees it
    (found,) = lives.find("r")
    assert [(pause.how, pause.lasted_s) for pause in found.pauses] == [("slow", 2.0), ("continued", 1.5)]
    assert found.pause_max_s == 2.0


def test_ends() -> None:
    lives = Lives()
    ends = []
    for what in ("stop", "left", "failed", "cut", "again"):
        one = life(lives, what)
        if what == "stop":
            one.finishes = {0: "stop", 1: "stop"}
        elif what == "left":
            one.fail(LEFT, "its client left")
            one.fail(500, "and then this")
        elif what == "failed":
            one.fail(503, "x" * 1000)
        one.resumed = what == "again"
        one.end(0, 101.0)
        one.end(9, 109.0)
        (found,) = lives.find(what)
        ends.append((found.status, found.end[:20], found.lasted_s))
    assert ends == [
        (200, "stop", 1.0), (499, "its client left", 1.0), (503, "x" * 20, 1.0), (499, "cut off", 1.0), (200, "", 1.0),
    ]  # fmt: skip
    assert len(lives.find("failed")[0].end) == 300


def test_memory_is_bounded() -> None:
    lives = Lives(ended_max=10)
    for number in range(100):
        life(lives, f"r{number % 50}", (number,)).end(0, 101.0)
    assert [bool(lives.find(f"r{number}")) for number in (0, 39, 40, 49)] == [False, False, True, True]
    assert len(lives._by_request) == 10
    assert not lives._open
    one = life(lives, "busy")
    for number in range(200):
        lives.sent(1, N0, "p0", 100.0 + number)
        lives.paused(1, 0.1, "moved", 100.0 + number)
    (found,) = lives.find("busy")
    assert (len(found.places), len(found.pauses)) == (PLACES_MAX, PAUSES_MAX)
    assert found.left_out == 400 - PLACES_MAX - PAUSES_MAX
    one.end(0, 400.0)
    for _ in range(20):
        life(lives, "same").end(0, 101.0)
    assert len(lives.find("same")) == 10
    assert len(msgspec.msgpack.encode(found)) < 32_000


def test_a_client_that_came_back_has_the_request_now() -> None:
    lives = Lives()
    lives.topology(topology(1, p0=(4, N0, N1)), 90.0)
    first = life(lives)
    second = life(lives, began=105.0)
    first.end(5, 106.0)
    lives.sent(1, N0, "p0", 106.5)
    ended, running = lives.find("r")
    assert (ended.places, [place.at_s for place in running.places]) == ((), [1.5])
    second.end(9, 110.0)
    assert len(lives.find("r")) == 2
    assert lives.find("another") == []


def test_changes_in_words() -> None:
    old, new = (topology(k, p0=(k, N0, N1)).pipelines[0] for k in (1, 2))
    assert change_of(old, new) == "failure of p0, epoch 1 -> 2: the same members"
    assert change_of(old, None) == "p0 was removed"
