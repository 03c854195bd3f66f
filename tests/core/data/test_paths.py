"""When a node reports through the relay of its host, and when by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from dataplane.core.paths import ANSWER_BEATS, NEW_BEATS, QUIET_FIRST_S, QUIET_MAX_S, Paths

BEAT_S = 0.1
C, D = "c:1", "d:1"


@dataclass
class Node:
    """A node that sends a batch to its relay at each heartbeat, and gets an answer as long as that `answers`."""

    controllers: tuple[str, ...] = (C, D)
    heard_by: tuple[str, ...] = (C, D)
    answers: bool = True
    now: float = 0.0
    count: int = 0
    paths: Paths = field(init=False)

    def __post_init__(self) -> None:
        self.paths = Paths(BEAT_S, self.now)
        self.paths.set_controllers(self.controllers, self.now)
        self.paths.opening()
        self.beat()

    def beat(self) -> None:
        if not self.paths.overdue(self.now):
            self.count += 1
            self.paths.sent(self.now)
        if self.answers:
            self.answer()

    def answer(self) -> bool:
        return self.paths.answered(self.count, self.heard_by, self.now)

    def run(self, beats: int) -> None:
        for _ in range(beats):
            self.now += BEAT_S
            self.paths.look(self.now)
            self.beat()

    def until_alone(self, limit: int) -> float:
        """Seconds until the relay does it all."""
        began = self.now
        for _ in range(limit):
            if not self.paths.own:
                return self.now - began
            self.run(1)
        raise AssertionError(f"still {self.paths.own}")


def test_a_relay_that_answers_does_it_all() -> None:
    node = Node()
    node.run(100)
    assert node.paths.own == set()


def test_without_a_relay_there_are_streams_to_everybody_at_once() -> None:
    paths = Paths(BEAT_S, 0.0, relay=False)
    paths.set_controllers([C, D], 0.0)
    assert paths.own == {C, D}
    paths.set_controllers([D], 1.0)
    assert paths.own == {D}


def test_a_missing_socket_and_a_broken_stream_are_answered_at_once() -> None:
    node = Node(answers=False)
    assert node.paths.own == set()
    node.paths.broken(node.now)
    assert node.paths.own == {C, D}
    node = Node()
    node.run(3)
    node.paths.broken(node.now)
    assert node.paths.own == {C, D}


def test_a_stopped_relay_is_left_within_two_heartbeats_and_sent_nothing_more() -> None:
    node = Node()
    node.run(10)
    node.answers = False
    sent = node.count
    node.run(1 + ANSWER_BEATS)
    assert node.paths.own == {C, D}
    node.run(100)
    assert node.count - sent <= 1 + ANSWER_BEATS


def test_the_node_returns_after_a_quiet_while_that_doubles() -> None:
    node = Node()
    waits = []
    for _ in range(9):
        node.run(20)
        node.answers = False
        node.run(5)
        assert node.paths.own == {C, D}
        node.answers = True
        node.answer()
        waits.append(node.until_alone(limit=int(2 * QUIET_MAX_S / BEAT_S)))
    assert abs(waits[0] - QUIET_FIRST_S) < 2 * BEAT_S
    assert all(abs(b - min(2 * a, QUIET_MAX_S)) < 3 * BEAT_S for a, b in pairwise(waits))
    node.run(int(QUIET_MAX_S / BEAT_S) + 2)  # steady for long: forgiven
    node.paths.broken(node.now)
    node.answer()
    assert abs(node.until_alone(100) - QUIET_FIRST_S) < 2 * BEAT_S


def test_a_relay_that_fails_meanwhile_begins_the_quiet_while_anew() -> None:
    node = Node()
    node.paths.broken(node.now)
    node.answer()
    node.run(int(0.8 * QUIET_FIRST_S / BEAT_S))
    node.paths.broken(node.now)
    node.answer()
    node.run(int(0.8 * QUIET_FIRST_S / BEAT_S))
    assert node.paths.own == {C, D}


def test_a_controller_that_the_relay_loses_gets_a_stream_at_once_and_only_that_one() -> None:
    node = Node()
    node.run(3)
    node.heard_by = (D,)
    node.answer()
    assert node.paths.own == {C}


def test_a_new_controller_is_left_to_the_relay_for_a_moment() -> None:
    node = Node(controllers=(C,), heard_by=(C,))
    node.run(10)
    node.paths.set_controllers([C, D], node.now)
    node.run(NEW_BEATS - 1)
    assert node.paths.own == set()
    node.run(1)
    assert node.paths.own == {D}
    node.heard_by = (C, D)
    assert node.answer()  # new to it: it is to be told all
    assert not node.answer()


def test_a_node_that_did_not_get_to_run_does_not_blame_the_relay() -> None:
    node = Node()
    node.run(3)
    node.answers = False
    node.run(1)
    node.now += 5.0  # answers came, and have not been read
    node.paths.look(node.now)
    assert node.paths.own == set()
    node.run(ANSWER_BEATS + 1)
    assert node.paths.own == {C, D}


def test_a_controller_that_the_relay_loses_again_and_again_costs_no_other_one_a_longer_while() -> None:
    node = Node()
    for _ in range(4):
        node.run(20)
        node.heard_by = (D,)
        node.answer()
        node.heard_by = (C, D)
        node.answer()
        node.until_alone(limit=200)
    node.run(20)
    node.heard_by = (C,)
    node.answer()
    node.heard_by = (C, D)
    node.answer()
    assert abs(node.until_alone(100) - QUIET_FIRST_S) < 2 * BEAT_S


def test_each_loss_of_a_controller_counts_while_another_one_is_lost_as_well() -> None:
    node = Node(heard_by=(C,))
    node.run(NEW_BEATS)
    waits = []
    for _ in range(3):
        node.heard_by = ()
        node.answer()
        node.heard_by = (C,)
        node.answer()
        began = node.now
        while C in node.paths.own:
            node.run(1)
        waits.append(node.now - began)
        assert node.paths.own == {D}
        node.run(5)
    assert all(abs(b - 2 * a) < 3 * BEAT_S for a, b in pairwise(waits))


def test_the_nodes_own_stream_ends_when_the_controller_has_had_time_to_hear_the_relay() -> None:
    """A relay that was stopped answers its nodes before its next beat is due. Where that is as long as the quiet while,
    nobody had spoken for the node for too long when its own stream ended, and it was cut off."""
    node = Node()
    node.paths.paced(C, 1.0)
    node.run(3)
    node.paths.broken(node.now)
    node.answer()
    began = node.now
    while C in node.paths.own:
        node.run(1)
    assert node.now - began >= 3.0
    assert node.paths.own == set()
