"""Steps and questions of a new round, and requests that would break a stage."""

from __future__ import annotations

import pytest

from controlplane.contract.requests import RefusalCode, Sampling
from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import KvStore
from dataplane.core.events import (
    Ask,
    Cancelled,
    CapacityChanged,
    Effect,
    EpochBegan,
    Refuse,
    RunStep,
    Submitted,
    Tick,
)
from dataplane.core.messages import Fence, HeldMeta, RejoinMeta, ResultMeta, StepFailedMeta
from dataplane.core.patience import STALL_LIMIT_S
from dataplane.core.recovery import GATHER_S
from dataplane.core.request import pack_tokens
from dataplane.core.scheduler import FAILED_RETRY_S, Scheduler
from dataplane.core.stage import Stage
from tests.core.data.parts import LIMITS, submitted


def test_a_step_of_a_new_round_may_come_before_its_question() -> None:
    """Within the orphan grace frees go out at once. Stage and scheduler must agree on the last step after it,
    or no move of an idle pipeline ever finds a quiet moment."""
    made = Scheduler("p0", 5, 3, LIMITS, takeover=True, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    ask = next(e for e in made.start(0.0) if isinstance(e, Ask)).meta
    for index in range(3):
        made.step(HeldMeta("p0", ask.fence, ask.ask, index, ()), 0.1)
    step = next(e for e in made.step(submitted(1), 0.1) if isinstance(e, RunStep)).meta
    failed = StepFailedMeta("p0", step.fence, step.step, 0, "link")
    ask = next(e for e in made.step(failed, 0.2) if isinstance(e, Ask)).meta
    effects = made.step(Cancelled(1), 0.2 + FAILED_RETRY_S)
    freeing = next(e for e in effects if isinstance(e, RunStep)).meta
    assert freeing.fence == ask.fence
    stage = Stage("p0", 2, 3, 5, KvStore(8, 4, 8, 8))
    stage.enter(Fence(5, 0))
    prepared = stage.prepare(freeing)
    assert not isinstance(prepared, str)
    stage.commit(prepared, None)
    stage.rejoin(ask)
    assert stage.last_step == freeing.step


def test_a_new_epoch_is_asked_again_as_soon_as_any() -> None:
    made = Scheduler("p0", 5, 2, LIMITS, takeover=False, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    made.step(submitted(1), 0.0)
    now = 0.0
    for _ in range(4):  # nobody answers: the patience doubles each time
        now += 70.0
        assert made.step(Tick(), now)
    made.step(EpochBegan(6, planned=False), now)
    again = made.step(Tick(), now + STALL_LIMIT_S + 0.1)
    assert next(e for e in again if isinstance(e, Ask)).meta.fence == Fence(6, 1)


@pytest.mark.parametrize(
    "event",
    [
        submitted(2, (1, 1 << 40)),
        submitted(2, (1, 1000)),
        submitted(2, (-1, 1)),
        submitted(2, emitted=(1000,)),
        submitted(2, sampling=Sampling(8, seed=1, logit_bias=((1000, 1.0),))),
        submitted(2, sampling=Sampling(8, seed=1, min_tokens=1, stop_token_ids=(1000,))),
        submitted(2, sampling=Sampling(8, seed=1, min_p=2.0)),
    ],
)
def test_a_request_that_would_break_a_stage_is_refused_and_others_go_on(event: Submitted) -> None:
    made = Scheduler("p0", 5, 1, LIMITS, takeover=False, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    refused = [e for e in made.step(event, 0.0) if isinstance(e, Refuse)]
    assert refused[0].message.code is RefusalCode.INVALID
    step = next(e for e in made.step(submitted(1), 0.0) if isinstance(e, RunStep)).meta
    assert Rows(step.rows).rids.tolist() == [1]
    assert made.step(ResultMeta("p0", step.fence, step.step, pack_tokens([9])), 0.1)


def test_requests_that_gateways_bring_one_after_the_other_resume_in_one_step() -> None:
    """After a takeover the first one was asked about alone and had a step alone, and all others waited for both."""
    made = Scheduler("p0", 5, 1, LIMITS, takeover=True, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    asks = [e.meta for e in made.start(0.0) if isinstance(e, Ask)]
    for rid in range(1, 5):
        effects = made.step(submitted(rid, emitted=(7, 7), admitted=True), 0.001 * rid)
        asks += [e.meta for e in effects if isinstance(e, Ask)]
    assert [ask.rids for ask in asks] == [(), (1,), (2,), (3,), (4,)], "nobody waits for another one's answer"
    effects = [e for number, ask in enumerate(asks) for e in answered(made, ask, 0.01 + 0.001 * number)]
    (step,) = [e for e in effects if isinstance(e, RunStep)]
    assert len(step.meta.admits) == 4
    assert len(step.tokens) == 4 * 2, "of six tokens each stage holds four"


def test_who_resumes_does_not_wait_for_gateways_that_are_late() -> None:
    made = Scheduler("p0", 5, 1, LIMITS, takeover=True, now=0.0)
    made.step(CapacityChanged(64, 1), 0.0)
    asks = [e.meta for e in made.start(0.0) if isinstance(e, Ask)]
    for rid in (1, 2):
        effects = made.step(submitted(rid, emitted=(7, 7), admitted=True), 0.0)
        asks += [e.meta for e in effects if isinstance(e, Ask)]
    assert not [e for e in answered(made, asks[0], 0.01) if isinstance(e, RunStep)]
    assert not [e for e in answered(made, asks[1], 0.01) if isinstance(e, RunStep)]
    assert [e for e in made.step(Tick(), 0.01 + GATHER_S) if isinstance(e, RunStep)]


def answered(made: Scheduler, ask: RejoinMeta, at: float) -> list[Effect]:
    return made.step(HeldMeta("p0", ask.fence, ask.ask, 0, tuple((rid, 4) for rid in ask.rids)), at)
