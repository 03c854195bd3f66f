"""What a request costs that many pipelines refuse for load, and that it gets through wherever there is room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from controlplane.contract.ids import Member
from controlplane.contract.requests import RefusalCode, Refused, Sampling
from controlplane.contract.topology import Mode
from tests.core.counting import calls
from tests.core.gateway.routing import Bench, only, pipeline, sent
from web.gateway.routing.events import (
    CancelAsked,
    Fail,
    FailCode,
    RefusalReceived,
    StreamUp,
    SubmitAsked,
    Tick,
)
from web.gateway.routing.full_pipelines import FULL_S, TRIES_MAX
from web.gateway.routing.policy import Policy

MANY = 60


class Crowd(Bench):
    """Many pipelines; `full(place, tokens)` says whether one refuses a request of so many tokens."""

    def __init__(self, count: int = MANY, reached: int | None = None, mode: Mode = Mode.REPLICATE) -> None:
        super().__init__(Policy(live_max=10_000, grace_s=5.0))
        self.heads = [Member(f"m{index}", "1") for index in range(count)]
        self.pipelines = [pipeline(f"p{index}", head, 1) for index, head in enumerate(self.heads)]
        self.topology(*self.pipelines, mode=mode)
        for head in self.heads[:reached]:
            self.do(StreamUp(head))
        self.full: Callable[[int, int], bool] = lambda place, tokens: True
        self.rid = 0

    def ask(self, tokens: int = 3, sampling: Sampling | None = None) -> tuple[int, Member | None]:
        """How many pipelines refuse a new request, and which one has it in the end."""
        self.rid += 7_919
        asked = SubmitAsked(self.rid, (5,) * tokens, sampling or Sampling(8, seed=0))
        effects, refusals = self.do(asked), 0
        while found := sent(effects):
            ((member, submit),) = found
            if not self.full(int(submit.pipeline[1:]), tokens):
                return refusals, member
            refusals += 1
            refused = Refused(submit.rid, submit.pipeline, RefusalCode.OVERLOADED, "full", 1.0)
            effects = self.do(RefusalReceived(member, refused))
        return refusals, None

    def code(self) -> FailCode | None:
        fail = self.failed.get(self.rid)
        return fail.code if fail is not None else None


def test_in_a_full_group_the_first_request_is_tried_everywhere_and_the_next_ones_are_not() -> None:
    crowd = Crowd()
    assert crowd.ask() == (MANY, None)
    assert crowd.code() is FailCode.OVERLOADED
    for _ in range(20):
        assert crowd.ask() == (TRIES_MAX, None)
        assert crowd.code() is FailCode.OVERLOADED
    crowd.now += FULL_S
    assert crowd.ask() == (MANY, None), "it was long ago"


def test_a_request_gets_through_wherever_one_pipeline_has_room() -> None:
    crowd = Crowd()
    crowd.full = lambda place, _: place != 41
    for _ in range(30):
        assert crowd.ask()[1] == crowd.heads[41]


@pytest.mark.parametrize("size", [1, 2, TRIES_MAX - 1, TRIES_MAX])
def test_in_a_small_group_each_is_asked_every_time(size: int) -> None:
    crowd = Crowd(size)
    assert [crowd.ask() for _ in range(5)] == [(size, None)] * 5
    crowd.full = lambda place, _: place != size - 1
    assert crowd.ask()[1] == crowd.heads[-1]


def test_room_that_comes_with_the_end_of_a_stream_is_found() -> None:
    crowd = Crowd()
    crowd.full = lambda place, _: place != 41
    crowd.ask()
    first = crowd.rid
    crowd.full = lambda *_: True
    crowd.ask()
    assert crowd.ask() == (TRIES_MAX, None)
    crowd.full = lambda place, _: place != 41
    crowd.do(CancelAsked(first))
    assert crowd.ask()[1] == crowd.heads[41]


def test_a_pipeline_that_begins_a_new_epoch_may_have_room() -> None:
    crowd = Crowd()
    crowd.ask()
    crowd.pipelines[41] = pipeline("p41", crowd.heads[41], 2)
    crowd.topology(*crowd.pipelines)
    crowd.full = lambda place, _: place != 41
    assert crowd.ask()[1] == crowd.heads[41]


def test_what_is_refused_for_its_size_says_nothing_of_smaller_ones() -> None:
    crowd = Crowd()
    crowd.full = lambda place, tokens: place != 41 or tokens > 100
    assert crowd.ask(101) == (MANY, None)
    assert crowd.ask(200) == (TRIES_MAX, None)
    for tokens in (100, 50, 3):
        assert crowd.ask(tokens)[1] == crowd.heads[41]


def test_what_takes_much_room_beside_its_tokens_says_nothing_of_others() -> None:
    crowd = Crowd()
    assert crowd.ask(3, Sampling(8, seed=0, grammar="start: /a/")) == (MANY, None)
    crowd.full = lambda place, _: place != 41
    assert crowd.ask()[1] == crowd.heads[41]


def test_a_request_waits_for_those_that_cannot_be_reached_yet() -> None:
    crowd = Crowd(reached=MANY - 1)
    crowd.ask()
    assert crowd.code() is None
    ((member, submit),) = sent(crowd.do(StreamUp(crowd.heads[-1])))
    assert (member, submit.rid) == (crowd.heads[-1], crowd.rid)


def test_a_request_that_many_refuse_costs_as_much_as_it_has_hops() -> None:
    first, later = {}, {}
    for count in (100, 400):
        crowd = Crowd(count)
        first[count], later[count] = calls(crowd.ask), calls(crowd.ask)
    assert first[400] < 5 * first[100]
    assert later[400] < 1.3 * later[100] + 400


def test_a_stream_whose_choice_of_instances_is_full_goes_on_at_others() -> None:
    """Where each request has a holder of its own a few instances are looked at, from a place on that its id decides."""
    crowd = Crowd(mode=Mode.LOAD_AWARE)
    crowd.full = lambda *_: False
    _, member = crowd.ask()
    assert member is not None
    place = crowd.heads.index(member)
    crowd.tokens(member, f"p{place}", 1, 0, rid=crowd.rid)
    crowd.pipelines[place] = pipeline(f"p{place}", None, 2)
    effects, tried = crowd.topology(*crowd.pipelines, mode=Mode.LOAD_AWARE), 0
    while tried < MANY - 2:
        ((member, submit),) = sent(effects)
        tried += 1
        refused = Refused(submit.rid, submit.pipeline, RefusalCode.OVERLOADED, "full", 1.0)
        effects = crowd.do(RefusalReceived(member, refused))
    assert len(sent(effects)) == 1
    assert not only(crowd.do(Tick()), Fail)
