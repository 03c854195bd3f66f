"""Which copies of single requests a stage says are there, and which are so no longer."""

from __future__ import annotations

from controlplane.contract.ids import Member
from dataplane.core.messages import Place
from dataplane.core.placed import Placed
from dataplane.core.replication import ReplicaSource

HOLDER = Member("n5", "x")
KEY = (1, "p1")


def held() -> tuple[Placed, dict[Member, ReplicaSource]]:
    """A copy of 8 positions that its holder has, which was said."""
    source = ReplicaSource(HOLDER, 4, {1: 8}.__getitem__)
    source.acknowledged((), whole=True, refused=False, now=0.0)
    source.wrote([1])
    placed = Placed({"p1": HOLDER})
    placed.place(Place(1, ("p1",)), 8)
    source.take(0.0)
    source.acknowledged(((1, 8),), whole=False, refused=False, now=0.1)
    assert (placed.lost({HOLDER: source}), placed.copied({HOLDER: source})) == ([], [KEY])
    return placed, {HOLDER: source}


def test_a_copy_that_made_room_is_lost_until_it_is_there_again() -> None:
    placed, sources = held()
    source = sources[HOLDER]
    source.acknowledged(((1, 0),), whole=False, refused=True, now=0.2)
    assert (placed.lost(sources), placed.copied(sources)) == ([KEY], [])
    assert placed.lost(sources) == [], "said once"
    source.take(10.0)
    source.acknowledged(((1, 8),), whole=False, refused=False, now=10.1)
    assert (placed.lost(sources), placed.copied(sources)) == ([], [KEY])


def test_a_holder_that_no_longer_has_it_when_it_is_asked_has_lost_it() -> None:
    placed, sources = held()
    sources[HOLDER].restart()
    assert placed.lost(sources) == [], "it has not said yet what it has"
    sources[HOLDER].acknowledged((), whole=True, refused=False, now=1.0)
    assert placed.lost(sources) == [KEY]


def test_what_was_said_of_an_older_fence_is_said_again() -> None:
    placed, sources = held()
    sources[HOLDER].acknowledged(((1, 0),), whole=False, refused=True, now=0.2)
    assert placed.lost(sources) == [KEY]
    placed.place(Place(1, ("p1",)), 8)
    assert placed.lost(sources) == [KEY]
    placed.place(Place(1, ()), 8)
    assert placed.lost(sources) == []
    assert not any((placed._waits, placed._held, placed._lost))


def test_nothing_is_said_of_a_request_that_has_ended() -> None:
    placed, sources = held()
    placed.forget(1)
    sources[HOLDER].acknowledged((), whole=True, refused=False, now=1.0)
    assert placed.lost(sources) == []
