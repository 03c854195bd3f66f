"""A comparison costs what those cost who reported since the last one, and finds what one from scratch would."""

from __future__ import annotations

import random

from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, PipelineReport, StepTimes
from controlplane.core.pace import Paces, _Measure
from tests.core.counting import calls


def report(member: Member, stage: int, timed_s: float, overdue_s: float, *times: StepTimes) -> NodeReport:
    served = (PipelineReport("p0", 1, stage, 0),)
    return NodeReport(member, 1, 0.0, 1, pipelines=served, times=times, timed_s=timed_s, overdue_s=overdue_s)


def test_a_comparison_looks_at_those_that_reported() -> None:
    costs = {}
    for nodes in (64, 512):
        paces, now = Paces(), 1.0
        members = [Member(f"n{k}", "1") for k in range(nodes)]
        for turn in range(3):
            now = 1.0 + turn
            for k, member in enumerate(members):
                paces.reported(report(member, k % 4, now, now * (k % 7) / 100), now)
            paces.compare(now, ())
        for k, member in enumerate(members[:16]):
            paces.reported(report(member, k % 4, now + 1.0, now * (k % 7) / 100), now + 1.0)
        costs[nodes] = calls(lambda paces=paces, now=now: paces.compare(now + 1.0, ()))
    assert costs[512] == costs[64]


def test_medians_that_are_kept_are_those_from_scratch() -> None:
    rng = random.Random(1)
    members = [Member(f"n{k}", "1") for k in range(12)]
    totals = {member: [0.0, 0.0, 0, 0] for member in members}
    paces, now, late = Paces(), 1.0, 0
    for _ in range(300):
        now += 0.2
        for member in rng.sample(members, 4):
            said = totals[member]
            said[0] += 0.5
            said[1] += rng.choice((0.0, 0.05, 0.3))
            said[2] += 3
            said[3] += rng.randrange(1000, 9000)
            stage = rng.randrange(2)  # of another pipeline, once in a while
            paces.reported(report(member, stage, said[0], said[1], StepTimes(1, said[2], said[3])), now)
        if rng.random() < 0.1:
            paces.forget(rng.choice(members))
        doubtful = set(rng.sample(members, 3))
        demoted = set(rng.sample(sorted(doubtful), 1))
        paces.compare(now, doubtful, demoted)
        fresh = _Measure(paces._runners)
        fresh.renew(set(paces._runners), doubtful, demoted, now)
        for member, runner in paces._runners.items():
            for of in (None, runner.stage):
                assert paces._measure.late(member, of) == fresh.late(member, of)
                late += fresh.late(member, of) > 0.0
            assert paces._measure._peers.get(runner.stage, {}) == fresh._peers.get(runner.stage, {})
    assert late > 1000, "the case that this is about"
