"""Everything at once, in any order: kills, moves, cancellations, lost messages, broken links, a shrinking quota.

Afterwards every stream is right, nothing is left behind, and no copy was ever counted that was not there.
"""

from __future__ import annotations

import pytest

from controlplane.contract.requests import Submit
from dataplane.core.events import Cancelled, CapacityChanged, EpochBegan, SessionLost, Submitted
from dataplane.core.messages import HeldMeta, RejoinMeta, ResultMeta, StepFailedMeta, StepMeta
from tests.core.data.pipeline import PIPELINE, Cluster, next_token

EVENTS = ["submit", "cancel", "quota", "break", "lose", "session", "kill", "replace", "resubmit"]


class Storm(Cluster):
    def __init__(self, stages: int, seed: int) -> None:
        super().__init__(stages, seed, blocks=40, quota=20)
        self.cancelled: set[int] = set()
        self.names = 0

    def live(self) -> list[int]:
        return [rid for rid in self.submitted if rid not in self.finished | self.cancelled]

    def resubmit_all(self) -> None:
        for rid in self.live():
            first, emitted = self.submitted[rid], tuple(self.received[rid])
            message = Submit(rid, PIPELINE, first.prompt, first.sampling, emitted, 0, True)
            self.dispatch(Submitted(message, 1))

    def blank(self, stage: int) -> None:
        self.names += 1
        self.peers[stage] = self.join(stage, f"x{self.names}")

    def switch(self, stage: int, demote: bool) -> None:
        """The peer serves; gateways notice a lost scheduler only after a while."""
        old, new = self.serving[stage], self.peers[stage]
        self.epoch += 1
        self.serving[stage] = new
        if self.nodes[old].alive:
            self.nodes[old].leave(demote)
            self.peers[stage] = old
        self.apply_topology()
        if stage > 0:
            self.dispatch(EpochBegan(self.epoch, planned=False))
            return
        self.scheduler = self.new_scheduler(takeover=True)
        self.perform(self.scheduler.start(self.now))
        self.run(self.random.randrange(30))
        self.resubmit_all()

    def strike(self, event: str) -> None:
        pick, stage = self.random, self.random.randrange(self.stages)
        match event:
            case "submit":
                prompt = [pick.randrange(1000) for _ in range(pick.randrange(1, 30))]
                if pick.random() < 0.6:  # many begin alike
                    prompt = [pick.randrange(2)] * pick.randrange(1, 26) + prompt[:4]
                self.submit(len(self.submitted) + 1, prompt, pick.randrange(1, 25))
            case "cancel" if self.live():
                rid = pick.choice(self.live())
                self.cancelled.add(rid)
                self.dispatch(Cancelled(rid))
            case "quota":
                self.quota = pick.choice([15, 16, 18, 20])
                self.dispatch(CapacityChanged(self.quota, self.stages))
            case "break":
                self.break_link()
            case "lose":
                self.lose_message()
            case "session":
                self.dispatch(SessionLost(1))
                self.run(pick.randrange(10))
                self.resubmit_all()
            case "kill":
                if not self.nodes[self.peers[stage]].alive or self.peers[stage] == self.serving[stage]:
                    self.blank(stage)
                self.nodes[self.serving[stage]].alive = False
                self.switch(stage, demote=False)
            case "replace":
                self.blank(stage)
                self.switch(stage, demote=pick.random() < 0.7)
            case "resubmit":
                self.resubmit_all()

    def break_link(self) -> None:
        links = [(a, b) for a, b in self.links if a != b and self.nodes[a].alive and self.nodes[b].alive]
        if links:
            a, b = self.random.choice(links)
            for link in ((a, b), (b, a)):
                if link in self.links:
                    self.links[link].clear()
            self.nodes[a].replicator.link_changed(b.node)
            self.nodes[b].replicator.link_changed(a.node)

    def lose_message(self) -> None:
        queues = [queue for queue in self.links.values() if queue]
        if queues:
            queue = self.random.choice(queues)
            at = self.random.randrange(len(queue))
            if isinstance(queue[at][0], StepMeta | ResultMeta | HeldMeta | RejoinMeta | StepFailedMeta):
                del queue[at]

    def check_copies(self) -> None:
        """What a source counts as acknowledged is there: a holder that needs the room says so."""
        for member in self.serving:
            for protected in self.nodes[member].replicator._protected.values():
                for target, source in protected.sources.items():
                    busy = self.links.get((member, target)) or self.links.get((target, member))
                    store = self.nodes[target].store
                    if busy or not source.known or store.copies.evicted:
                        continue
                    for rid, progress in source._progress.items():
                        assert progress.acked <= store.copies.tokens((PIPELINE, rid)), f"request {rid}"

    def check_streams(self) -> None:
        for rid, first in self.submitted.items():
            tokens = list(first.prompt)
            for position, token in enumerate(self.received[rid]):
                assert token == next_token(tokens, self.stages), f"request {rid} position {position}"
                tokens.append(token)
            assert rid in self.cancelled or len(self.received[rid]) == first.sampling.max_tokens

    def check_nothing_left(self) -> None:
        made = self.scheduler
        assert not made.requests
        assert not made.questions
        assert made.batcher.used_blocks == 0
        cached = set(made.batcher.account._cached)
        for member in self.serving:
            assert set(self.nodes[member].store.kept[PIPELINE]) == cached, "one account for all stages"
        for member in (*self.serving, *self.peers):
            node = self.nodes[member]
            if node.alive:
                assert node.store.copies.spare.keys() <= cached, "copies of what is kept no longer"
                here = node.store.kept[PIPELINE].keys() | node.store.copies.spare.keys()
                assert node.store.blocks_free == node.store.num_blocks - len(here)
                assert not any(node.store.own.values())
                assert not node.store.copies.rows
                sources = [s for p in node.replicator._protected.values() for s in p.sources.values()]
                assert not any(s._progress or s._dirty or s._unacked for s in sources)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_storm(stages: int, seed: int) -> None:
    storm = Storm(stages, seed)
    for _ in range(50):
        storm.run(storm.random.randrange(40))
        storm.check_copies()
        storm.strike(storm.random.choice(EVENTS))
    storm.dispatch(CapacityChanged(20, stages))
    storm.resubmit_all()
    for _ in range(60_000):
        if not storm.live():
            break
        storm.run(1)
    assert not storm.live()
    assert not storm.refused
    storm.check_streams()
    for _ in range(100):  # past the orphan grace
        storm.run(30)
    storm.check_nothing_left()
    last = {storm.nodes[m].stage.last_step for m in storm.serving}  # type: ignore[union-attr]
    assert len(last) == 1
