"""Who accounts for which copy when requests end, move or are asked for meanwhile."""

from __future__ import annotations

import pytest

from dataplane.core.blocks import KvStore
from dataplane.core.events import Cancelled
from dataplane.core.replication import ReplicaSource
from tests.core.data.parts import NEXT
from tests.core.data.pipeline import Cluster


def midway(stages: int, seed: int) -> Cluster:
    """One request, some tokens in, its copies acknowledged."""
    cluster = Cluster(stages, seed)
    cluster.submit(1, list(range(40)), max_tokens=60)
    while len(cluster.received[1]) < 15:
        cluster.run(1)
    return cluster


def test_the_old_nodes_copy_survives_until_gateways_submit_again() -> None:
    """A hand-back of stage 0: the new node has promoted nothing yet when its holder says what it has."""
    cluster = midway(2, seed=1)
    old, new = cluster.serving[0], cluster.peers[0]
    cluster.epoch += 1
    cluster.serving[0], cluster.peers[0] = new, old
    cluster.nodes[old].leave(demote=True)
    cluster.apply_topology()
    cluster.scheduler = cluster.new_scheduler(takeover=True)
    cluster.perform(cluster.scheduler.start(cluster.now))
    cluster.run(20)
    sent = cluster.nodes[new].replicator.stats.blocks_sent
    assert ("p0", 1) in cluster.nodes[old].store.copies.rows
    cluster.resubmit_all()
    before = len(cluster.received[1])
    while len(cluster.received[1]) < before + 4:
        cluster.run(1)
    assert cluster.nodes[new].replicator.stats.blocks_sent - sent <= 4  # not the whole of it once more
    cluster.run_to_end()
    cluster.check()


def test_what_a_sweep_gives_back_is_given_back_by_the_holders_too() -> None:
    cluster = midway(2, seed=2)
    cluster.submitted.clear()  # the gateway is gone as well: nobody claims the request
    cluster.kill(0)
    for _ in range(60):
        cluster.run(20)
    for node in cluster.nodes.values():
        if node.alive:
            assert not any(node.store.own.values())
            assert not node.store.copies.rows
            assert all(
                not s._unacked for p in node.replicator._protected.values() for s in p.sources.values()
            )


def test_a_request_cancelled_while_its_stages_are_asked_leaves_nothing() -> None:
    """The order to free overtakes the question, which then promotes the copy of a dead request."""
    cluster = midway(3, seed=1)
    cluster.kill(2)
    slow = (cluster.serving[0], cluster.serving[2])
    question = cluster.links.pop(slow)
    cluster.dispatch(Cancelled(1))
    cluster.run(25)
    cluster.links[slow] = question
    cluster.run(100)
    assert not [m for m in cluster.serving if any(cluster.nodes[m].store.own.values())]


def test_an_acknowledgement_of_an_earlier_life_counts_for_nothing() -> None:
    tokens = {1: 8}
    made = ReplicaSource(NEXT, 4, lambda rid: tokens.get(rid, 0))
    made.must_ask(0.0)
    made.acknowledged((), whole=True, refused=False, now=0.0)
    made.wrote([1])
    assert len(made.take(0.0)) == 2
    made.freed([1])  # preempted: the holder is told to drop it, and its last acknowledgement is on its way
    made.wrote([1])  # admitted again, computed again
    made.acknowledged(((1, 8),), whole=False, refused=False, now=0.1)
    assert made.lag_tokens([1]) == 8
    assert len(made.take(0.2)) == 2


def test_an_answer_that_crossed_an_order_to_drop_counts_for_nothing() -> None:
    tokens = {1: 8, 2: 8}
    made = ReplicaSource(NEXT, 4, lambda rid: tokens.get(rid, 0))
    assert made.must_ask(0.0)
    made.freed([1])
    made.wrote([1])  # admitted again, computed again
    assert not made.acknowledged(((1, 8), (2, 8)), whole=True, refused=False, now=0.1)
    assert made.lag_tokens([1]) == 8
    assert made.lag_tokens([2]) == 0
    assert len(made.take(0.2)) == 2


@pytest.mark.parametrize(("index", "tokens"), [(0, 100), (-1, 4), (3, 16), (0, 0), (0, -3)])
def test_a_copy_that_makes_no_sense_is_refused(index: int, tokens: int) -> None:
    store = KvStore(8, 4, 4, 3)
    for at in range(3):
        assert store.copies.place(("p0", 1), at, 4 * at + 4) is not None
        store.copies.written(("p0", 1), at, 4 * at + 4, 0)
    for rid in (1, 2):
        assert store.copies.place(("p0", rid), index, tokens) is None
        store.check()
    assert list(store.copies.rows) == [("p0", 1)]


def test_an_order_to_drop_that_could_not_be_sent_is_made_good() -> None:
    cluster = midway(2, seed=3)
    source = cluster.nodes[cluster.serving[1]]
    send, source.replicator._send = source.replicator._send, lambda *_: False  # the queue of the link is full
    cluster.dispatch(Cancelled(1))
    cluster.run(60)
    source.replicator._send = send
    for _ in range(60):
        cluster.run(20)
    assert not cluster.nodes[cluster.peers[1]].store.copies.rows
