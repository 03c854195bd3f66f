"""Clients that hang up and come back, with fewer tokens than were sent, in the middle of every other trouble."""

from __future__ import annotations

import pytest

from controlplane.contract.requests import Sampling, Submit
from dataplane.core.events import Cancelled, CapacityChanged, Deliver, Effect, Submitted
from tests.core.data.pipeline import PIPELINE
from tests.core.data.test_storm import EVENTS, Storm


class Returning(Storm):
    """Every request can be resumed. `away`: clients that have hung up."""

    def __init__(self, stages: int, seed: int) -> None:
        self.away: set[int] = set()
        self.readers: dict[int, int] = {}
        self.found = self.regenerated = 0
        super().__init__(stages, seed)

    def live(self) -> list[int]:
        return [rid for rid in super().live() if rid not in self.away]

    def submit(self, rid: int, prompt: list[int], max_tokens: int) -> None:
        self.received[rid], self.readers[rid] = [], 0
        first = Submit(rid, PIPELINE, tuple(prompt), Sampling(max_tokens, seed=0), context=b"")
        self.submitted[rid] = first
        self.dispatch(Submitted(first, 1))

    def resubmit_all(self) -> None:
        for rid in self.live():
            self.send_submit(rid, tuple(self.received[rid]))

    def send_submit(self, rid: int, emitted: tuple[int, ...]) -> None:
        first, reader = self.submitted[rid], self.readers[rid]
        message = Submit(rid, PIPELINE, first.prompt, first.sampling, emitted, 0, True, b"", reader)
        self.dispatch(Submitted(message, 1))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            for token in effect.tokens if isinstance(effect, Deliver) else ():
                known = self.received[token.rid][token.position : token.position + 1]
                assert known in ([], [token.token]), f"request {token.rid} position {token.position}"
        super().perform(effects)

    def strike(self, event: str) -> None:
        match event:
            case "hang up" if self.live():
                rid = self.random.choice(self.live())
                self.away.add(rid)
                self.dispatch(Cancelled(rid, 1))
            case "lost tail" if candidates := sorted(self.finished - self.cancelled - self.away):
                rid = self.random.choice(candidates)  # the connection broke just before its end
                self.finished.remove(rid)
                self.away.add(rid)
            case "come back" if self.away:
                self.come_back(self.random.choice(sorted(self.away)))
            case _:
                super().strike(event)

    def come_back(self, rid: int) -> None:
        """What web/gateway/resume/start_or_resume.py does."""
        self.away.remove(rid)
        del self.received[rid][self.random.randrange(len(self.received[rid]) + 1) :]
        if len(self.received[rid]) == self.submitted[rid].sampling.max_tokens:
            self.finished.add(rid)  # it has everything, and its id says so
            return None
        self.finished.discard(rid)
        log = self.scheduler.recall(rid)
        have = len(self.received[rid])
        if log is None:
            self.regenerated += 1
            self.readers[rid] = 1
            return self.send_submit(rid, ())
        self.found += 1
        assert list(log.emitted[:have]) == self.received[rid][: len(log.emitted)]
        self.readers[rid] = log.reader + 1
        return self.send_submit(rid, log.emitted[:have])


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_storm_with_clients_that_return(stages: int, seed: int) -> None:
    storm = Returning(stages, seed)
    events = [*EVENTS, "submit", "hang up", "hang up", "lost tail", "come back", "come back", "come back"]
    for _ in range(4):
        storm.strike("submit")
    storm.strike("hang up")
    for _ in range(80):
        storm.run(storm.random.randrange(40))
        storm.check_copies()
        storm.strike(storm.random.choice(events))
    storm.dispatch(CapacityChanged(20, stages))
    for rid in sorted(storm.away):
        storm.come_back(rid)
    storm.resubmit_all()
    for _ in range(60_000):
        if not storm.live():
            break
        storm.run(1)
    assert not storm.live()
    assert not storm.refused
    storm.check_streams()
    for _ in range(100):  # past the grace
        storm.run(30)
    storm.check_nothing_left()
    assert not storm.scheduler.kept
    assert storm.found + storm.regenerated
