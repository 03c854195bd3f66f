"""The scheduler alone: admission, batching, refusals, cancellation, stalls."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.contract.requests import FinishReason, RefusalCode, Sampling, Submit
from dataplane._fast.blocktable import Rows
from dataplane.core import events
from dataplane.core.batching import Limits
from dataplane.core.events import (
    Ask,
    Cancelled,
    CapacityChanged,
    Deliver,
    Effect,
    EpochBegan,
    Refuse,
    RunStep,
    SessionLost,
    Submitted,
    Tick,
)
from dataplane.core.messages import Detail, Fence, HeldMeta, LostMeta, ResultMeta, Row, StepFailedMeta
from dataplane.core.patience import STALL_LIMIT_S
from dataplane.core.prefix import NAME_BYTES
from dataplane.core.recovery import GATHER_S
from dataplane.core.request import Phase, pack_tokens
from dataplane.core.scheduler import Scheduler

LIMITS = Limits(
    block_size=4, max_batch_tokens=16, max_running=8, max_waiting=2, context_len=64, orphan_grace_s=0.5
)


def scheduler(stages: int = 2, quota: int = 64, microbatches: int = 0, limits: Limits = LIMITS) -> Scheduler:
    made = Scheduler("p0", 5, stages, limits, takeover=False, now=0.0)
    made.step(CapacityChanged(quota, microbatches or stages), 0.0)
    return made


def submit(rid: int, length: int = 4, max_tokens: int = 8, **fields: object) -> Submitted:
    sampling = fields.pop("sampling", Sampling(max_tokens, seed=1))
    prompt = tuple(range(1000 * rid, 1000 * rid + length))  # no two begin alike
    return Submitted(Submit(rid, "p0", prompt, sampling, **fields), session=1)  # type: ignore[arg-type]


def steps(effects: list[Effect]) -> list[RunStep]:
    return [e for e in effects if isinstance(e, RunStep)]


def rows(*issued: RunStep) -> list[Row]:
    """(rid, start, count, sample) of every row, in order."""
    found: list[Row] = []
    for step in issued:
        r = Rows(step.meta.rows)
        sample = [rid in r.sample_rids for rid in r.rids]
        found += zip(r.rids.tolist(), r.starts.tolist(), r.counts.tolist(), sample, strict=True)
    return found


def result(step: RunStep, token: int = 9) -> ResultMeta:
    tokens = pack_tokens([token for *_, sample in rows(step) if sample])
    return ResultMeta("p0", step.meta.fence, step.meta.step, tokens)


def test_as_many_microbatches_as_can_compute() -> None:
    made = scheduler(stages=4, microbatches=3)
    issued = [steps(made.step(submit(rid), 0.0)) for rid in range(1, 5)]
    assert [len(s) for s in issued] == [1, 1, 1, 0]
    assert len(made.steps) == 3


def decoding(requests: int, microbatches: int) -> tuple[Scheduler, list[RunStep]]:
    """A scheduler whose requests all decode, and the steps in flight."""
    made = scheduler(4, microbatches=microbatches, limits=replace(LIMITS, max_waiting=99))
    flying = [
        step for rid in range(1, requests + 1) for step in steps(made.step(submit(rid, max_tokens=50), 0.0))
    ]
    for _ in range(4 * requests):
        flying += steps(made.step(result(flying.pop(0)), 0.0))
    return made, flying


@pytest.mark.parametrize(
    ("requests", "microbatches", "sizes"),
    [(1, 2, [1]), (4, 2, [4]), (5, 2, [2, 3]), (8, 2, [4, 4]), (8, 4, [4, 4]), (7, 1, [7])],
)
def test_running_requests_share_the_microbatches_that_they_are_worth(
    requests: int, microbatches: int, sizes: list[int]
) -> None:
    _, flying = decoding(requests, microbatches)
    assert sorted(len(rows(step)) for step in flying) == sizes


def test_who_decodes_does_not_wait_for_a_prompt_that_comes() -> None:
    """The prompt goes at once, in a microbatch of its own; then all share one again."""
    made, flying = decoding(2, microbatches=2)
    assert len(flying) == 1
    prompt = steps(made.step(submit(9), 0.0))
    assert [rid for rid, *_ in rows(*prompt)] == [9]
    flying = steps(made.step(result(flying[0]), 0.1))  # nor do the others wait for it
    assert [rid for rid, *_ in rows(*flying)] == [1, 2]
    assert not steps(made.step(result(prompt[0]), 0.2))  # one of three: it waits for its company
    assert sorted(rid for rid, *_ in rows(*steps(made.step(result(flying[0]), 0.3)))) == [1, 2, 9]


def test_decodes_ride_along_with_the_chunks_of_a_long_prompt() -> None:
    """Together, since they are few: every second chunk has both, and each of them a token a round."""
    made, flying = decoding(2, microbatches=2)
    flying += steps(made.step(submit(9, length=60), 0.0))
    company, chunks = [], []
    for _ in range(3):
        (step,) = steps(made.step(result(flying.pop(0)), 0.1))
        flying.append(step)
        *decodes, (rid, _, count, _) = rows(step)
        assert rid == 9
        chunks.append(count)
        company.append([rid for rid, *_ in decodes])
    assert company == [[1, 2], [], [1, 2]]
    assert chunks == [12, 11, 11], "45 tokens are left, and 14 or 16 rows: of one size, as far as that goes"


@pytest.mark.parametrize(("length", "sizes"), [(16, [16]), (17, [9, 8]), (40, [14, 13, 13])])
def test_chunks_of_a_prompt_are_of_one_size(length: int, sizes: list[int]) -> None:
    made = scheduler(4)
    issued = steps(made.step(submit(1, length=length), 0.0))
    assert [count for *_, count, _ in rows(*issued)] == sizes


def test_while_more_wait_than_have_places_all_steps_are_alike() -> None:
    """Rows are split although they need not be, and a prompt goes with the decodes of all microbatches."""
    limits = replace(
        LIMITS, max_batch_tokens=600, context_len=600, max_running=8, max_waiting=99, rows_min=24
    )
    made = scheduler(4, quota=500, microbatches=4, limits=limits)
    flying = [s for rid in range(1, 9) for s in steps(made.step(submit(rid, max_tokens=rid + 5), 0.0))]
    for rid in (9, 10):
        flying += steps(made.step(submit(rid, length=40, max_tokens=50), 0.0))
    prompt: list[tuple[int, int]] = []  # decodes beside it, and its tokens
    for _ in range(40):
        issued = steps(made.step(result(flying.pop(0)), 0.1))
        flying += issued
        prompt += [
            (len(rows(step)) - 1, count)
            for step in issued
            for rid, _, count, _ in rows(step)
            if rid == 9 and count > 1
        ]
    assert [count for _, count in prompt] == [10, 10, 10, 10]
    assert all(1 <= decodes <= 3 for decodes, _ in prompt)


@pytest.mark.parametrize(("rows_min", "sizes"), [(4, [6, 6, 6, 6]), (24, [24]), (12, [12, 12])])
def test_rows_that_cost_nothing_are_not_split(rows_min: int, sizes: list[int]) -> None:
    """A device that reads for as long as it computes 24 rows gets 24 together; a prompt does not wait for them."""
    limits = replace(
        LIMITS, max_running=99, max_waiting=99, max_batch_tokens=600, context_len=600, rows_min=rows_min
    )
    made = scheduler(4, quota=500, microbatches=4, limits=limits)
    flying = [step for rid in range(1, 25) for step in steps(made.step(submit(rid, max_tokens=400), 0.0))]
    for _ in range(60):
        flying += steps(made.step(result(flying.pop(0)), 0.0))
    assert [len(rows(step)) for step in flying] == sizes
    if len(sizes) < 4:
        # In two steps: the longest measured chunk has 27 tokens, and the next has at most twice as many.
        prompt = steps(made.step(submit(99, length=100), 0.0))
        assert [[(rid, count) for rid, _, count, _ in rows(step)] for step in prompt] == [
            [(99, 50)],
            [(99, 50)],
        ]


def test_a_prompt_is_split_over_those_who_can_compute() -> None:
    made = scheduler(
        4, quota=200, microbatches=2, limits=replace(LIMITS, max_batch_tokens=512, context_len=600)
    )
    assert [count for _, _, count, _ in rows(*steps(made.step(submit(1, length=400), 0.0)))] == [200, 200]
    short = scheduler(
        4, quota=200, microbatches=2, limits=replace(LIMITS, max_batch_tokens=512, context_len=600)
    )
    assert [count for _, _, count, _ in rows(*steps(short.step(submit(1, length=90), 0.0)))] == [45, 45]


def test_a_result_that_does_not_fit_its_step_is_a_lost_one() -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    wrong = ResultMeta("p0", step.meta.fence, step.meta.step, pack_tokens([9, 9]))
    ask = next(e for e in made.step(wrong, 0.1) if isinstance(e, Ask)).meta
    assert ask.fence == Fence(5, 1)
    assert not made.requests[1].output


def test_logprobs_reach_the_row_that_asked() -> None:
    made = scheduler(stages=1)
    flying = steps(made.step(submit(1), 0.0))
    made.step(submit(2), 0.0)
    both = steps(made.step(result(flying[0]), 0.1))[0]
    detail = Detail(1, -0.5, ((8, -0.25),))
    effects = made.step(
        ResultMeta("p0", both.meta.fence, both.meta.step, pack_tokens([7, 8]), (detail,)), 0.2
    )
    tokens = next(e for e in effects if isinstance(e, Deliver)).tokens
    assert [(t.rid, t.token, t.logprob, t.top) for t in tokens] == [
        (1, 7, None, ()),
        (2, 8, -0.5, ((8, -0.25),)),
    ]


def test_the_next_step_goes_out_before_what_the_last_one_yielded() -> None:
    made = scheduler(stages=1)
    effects = made.step(result(steps(made.step(submit(1), 0.0))[0]), 0.1)
    assert [type(e) for e in effects] == [RunStep, Deliver]


def test_a_long_prompt_goes_in_chunks_that_overlap() -> None:
    made = scheduler(stages=2)
    sent = steps(made.step(submit(1, length=40), 0.0))
    assert [row[1:] for row in rows(*sent)] == [
        (0, 14, False),
        (14, 13, False),
    ]
    third = steps(made.step(result(sent[0]), 0.1))
    assert [row[1:] for row in rows(*third)] == [(27, 13, True)]
    assert sent[0].meta.admits
    assert not third[0].meta.admits


def test_decode_rows_share_a_step_with_a_prompt_chunk() -> None:
    made = scheduler(stages=1)
    first = steps(made.step(submit(1), 0.0))[0]
    made.step(submit(2, length=30), 0.0)
    both = steps(made.step(result(first), 0.1))[0]
    assert [(rid, count) for rid, _, count, _ in rows(both)] == [(1, 1), (2, 15)]


def test_finish_reasons() -> None:
    made = scheduler(stages=1)
    stop = Sampling(8, seed=1, stop_token_ids=(9,), min_tokens=1)
    first = steps(made.step(submit(1, sampling=stop), 0.0))[0]
    second = made.step(result(first), 0.1)
    assert next(e for e in second if isinstance(e, Deliver)).tokens[0].finish is None  # below min_tokens
    last = made.step(result(steps(second)[0]), 0.2)
    assert next(e for e in last if isinstance(e, Deliver)).tokens[0].finish is FinishReason.STOP
    assert steps(last)[0].meta.frees == (1,)
    assert not made.requests


def test_refusals_are_explicit() -> None:
    made = scheduler(stages=1)
    for rid in range(1, 4):
        made.step(submit(rid), 0.0)
    refused = [e for e in made.step(submit(9), 0.0) if isinstance(e, Refuse)]
    assert refused[0].message.code is RefusalCode.OVERLOADED
    assert refused[0].message.retry_after_s > 0
    too_long = [e for e in made.step(submit(8, length=64), 0.0) if isinstance(e, Refuse)]
    assert too_long[0].message.code is RefusalCode.INVALID
    admitted = [e for e in made.step(submit(7, admitted=True), 0.0) if isinstance(e, Refuse)]
    assert not admitted


def test_a_second_submit_re_attaches_and_repeats_what_was_missed() -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    made.step(SessionLost(1), 0.0)
    assert not [e for e in made.step(result(step), 0.1) if isinstance(e, Deliver)]
    again = made.step(Submitted(submit(1).message, session=2), 0.2)
    deliver = next(e for e in again if isinstance(e, Deliver))
    assert (deliver.session, deliver.tokens[0].token) == (2, 9)


def test_orphans_are_dropped_after_the_grace() -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    made.step(SessionLost(1), 0.0)
    made.step(Tick(), 0.4)
    assert 1 in made.requests
    made.step(Tick(), 0.6)
    assert not made.requests
    assert steps(made.step(result(step), 0.7))[0].meta.frees == (1,)


def test_a_cancelled_request_frees_its_blocks_even_if_nothing_else_runs() -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    assert not made.step(Cancelled(1), 0.0)
    freed = made.step(result(step), 0.1)
    assert not [e for e in freed if isinstance(e, Deliver)]
    assert steps(freed)[0].meta.frees == (1,)
    assert made.batcher.used_blocks == 0


def test_a_new_epoch_voids_what_is_in_flight_and_resumes_at_the_minimum() -> None:
    made = scheduler(stages=2)
    step = steps(made.step(submit(1, length=12), 0.0))[0]
    made.step(result(step), 0.1)
    ask = next(e for e in made.step(EpochBegan(6, planned=False), 0.2) if isinstance(e, Ask)).meta
    assert ask.rids == (1,)
    assert ask.complete
    assert not made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 0, ((1, 12),)), 0.3)
    resumed = steps(made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((1, 8),)), 0.3))[0]
    assert [row[1:] for row in rows(resumed)] == [(8, 5, True)]
    assert resumed.meta.admits
    assert resumed.meta.fence == Fence(6, 0)


def test_what_a_stage_has_lost_while_it_restored_other_blocks_is_not_cached() -> None:
    """Its answer names what it kept when it was asked; a block of that turned out to be damaged meanwhile."""
    made = scheduler(stages=2)
    made.step(result(steps(made.step(submit(1, length=12), 0.0))[0]), 0.1)
    ask = next(e for e in made.step(EpochBegan(6, planned=False), 0.2) if isinstance(e, Ask)).meta
    sound, lost = bytes(NAME_BYTES), b"1" * NAME_BYTES
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 0, ((1, 12),), sound + lost), 0.3)
    made.step(LostMeta("p0", Fence(6, 0), lost), 0.4)
    resumed = steps(made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((1, 12),), sound + lost), 0.5))[0]
    account = made.batcher.account
    assert account.found([sound]) == 1
    assert account.found([lost]) == 0
    assert resumed.meta.evicts == lost, "the stages that have it give it back"


def test_a_request_goes_on_while_a_stage_restores_blocks_of_others() -> None:
    made = scheduler(stages=2)
    for rid in (1, 2):
        made.step(result(steps(made.step(submit(rid, length=12), 0.0))[0]), 0.1)
    ask = next(e for e in made.step(EpochBegan(6, planned=False), 0.2) if isinstance(e, Ask)).meta
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 0, ((1, 12), (2, 12))), 0.3)
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((2, 8),), more=True), 2.9)
    issued = steps(made.step(Tick(), 2.9 + 2 * GATHER_S))
    assert [row[:3] for row in rows(*issued)] == [(2, 8, 5)]
    late = 0.2 + STALL_LIMIT_S + 0.1
    made.step(result(issued[0]), late - 0.05)
    made.step(Tick(), late)
    assert made.fence == Fence(6, 0), "a stage that answers in parts is waited for anew"
    assert made.held_up(late)[1] == 1
    more = steps(made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((1, 4),)), late))
    assert (1, 4, 9) in [row[:3] for row in rows(*more)]
    assert not made.questions


def test_restoring_is_not_counted_as_connecting() -> None:
    made = scheduler(stages=2)
    made.step(result(steps(made.step(submit(1, length=12), 0.0))[0]), 0.1)
    ask = next(e for e in made.step(EpochBegan(6, planned=False), 0.2) if isinstance(e, Ask)).meta
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 0, ((1, 12),)), 0.3)
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, (), more=True), 0.4)
    assert not steps(made.step(Tick(), 0.4 + 2 * GATHER_S)), "nothing is known of what it holds"
    issued = steps(made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((1, 8),)), 1.5))
    effects = made.step(result(issued[0]), 1.7)
    timing = next(e for e in effects if isinstance(e, events.Recovered)).timing
    times = (timing.seen, timing.connected, timing.restored, timing.first_token)
    assert times == (0.2, 0.4, 1.5, 1.7)


def test_who_is_computed_again_does_not_wait_for_who_is_restored() -> None:
    made = scheduler(stages=2)
    for rid in (1, 2):
        made.step(result(steps(made.step(submit(rid, length=12), 0.0))[0]), 0.1)
    ask = next(e for e in made.step(EpochBegan(6, planned=False), 0.2) if isinstance(e, Ask)).meta
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 0, ((1, 12), (2, 12))), 0.3)
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((2, 0),), more=True), 0.3)
    issued = steps(made.step(Tick(), 0.3 + 2 * GATHER_S))
    assert [row[:2] for row in rows(*issued)] == [(2, 0)]
    assert made.questions.adopting
    more = steps(made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((1, 8),)), 0.9))
    found = [row[:2] for step in more for row in rows(step)]
    assert not found or (1, 8) in found
    made.batcher.account.check()


@pytest.mark.parametrize("fence", [Fence(5, 0), Fence(4, 9)])
def test_results_of_an_older_fence_change_nothing(fence: Fence) -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    made.step(EpochBegan(6, planned=False), 0.1)
    stale = ResultMeta("p0", fence, step.meta.step, pack_tokens([9]))
    assert not made.step(stale, 0.2)
    assert not made.requests[1].output


def test_a_stalled_step_is_given_up_and_asked_about() -> None:
    made = scheduler(stages=2)
    made.step(submit(1), 0.0)
    assert not made.step(Tick(), STALL_LIMIT_S)
    effects = made.step(Tick(), STALL_LIMIT_S + 0.01)
    assert next(e for e in effects if isinstance(e, Ask)).meta.fence == Fence(5, 1)


def test_a_scheduler_says_which_stage_it_waits_for_in_a_recovery() -> None:
    made = scheduler(stages=3)
    made.step(submit(1), 0.0)
    assert made.held_up(0.2) == (0.2, -1), "a step is in flight"
    ask = next(e for e in made.step(EpochBegan(6, planned=False), 0.2) if isinstance(e, Ask)).meta
    for stage, owes in ((0, 1), (2, 1)):
        made.step(HeldMeta("p0", Fence(6, 0), ask.ask, stage, ((1, 4),)), 0.3)
        assert made.held_up(1.2) == (1.0, owes)
    made.step(HeldMeta("p0", Fence(6, 0), ask.ask, 1, ((1, 4),)), 1.3)
    assert made.held_up(1.4) == (pytest.approx(0.1), -1), "the first step of the new epoch"


def test_a_step_that_failed_on_its_way_is_repeated_after_a_pause() -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    failed = StepFailedMeta("p0", step.meta.fence, step.meta.step, 0, "link")
    ask = next(e for e in made.step(failed, 0.1) if isinstance(e, Ask)).meta
    assert not steps(made.step(HeldMeta("p0", ask.fence, ask.ask, 0, ()), 0.11))
    assert steps(made.step(Tick(), 0.2))


def test_a_poisoned_request_goes_back_to_its_gateway_and_others_go_on() -> None:
    made = scheduler(stages=1)
    first = steps(made.step(submit(1), 0.0))[0]
    made.step(submit(2), 0.0)
    both = steps(made.step(result(first), 0.1))[0]
    poisoned = StepFailedMeta("p0", both.meta.fence, both.meta.step, 0, "numbers", "n3", (1,))
    effects = made.step(poisoned, 0.2)
    refused = next(e for e in effects if isinstance(e, Refuse)).message
    assert (refused.rid, refused.code, refused.node) == (1, RefusalCode.POISONED, "n3")
    assert list(made.requests) == [2]
    assert made.stats.poisoned == 1
    ask = next(e for e in effects if isinstance(e, Ask)).meta
    assert ask.rids == (2,)
    assert ask.complete, "what the stages hold of the other is given back"
    again = steps(made.step(HeldMeta("p0", ask.fence, ask.ask, 0, ((2, 0),)), 0.2))
    assert [row[0] for row in rows(*again)] == [2]


def test_a_scheduler_that_is_no_more_leaves_nobody_waiting() -> None:
    made = scheduler(stages=1)
    made.step(submit(1), 0.0)
    made.step(Submitted(submit(2).message, session=2), 0.0)
    made.step(Submitted(submit(3).message, session=3), 0.0)
    made.step(SessionLost(3), 0.0)
    told = [(e.session, e.message.rid, e.message.code) for e in made.close() if isinstance(e, Refuse)]
    assert told == [(1, 1, RefusalCode.DROPPED), (2, 2, RefusalCode.DROPPED)]


def test_the_time_of_the_slowest_step_of_late_is_known() -> None:
    made = scheduler(stages=1)
    step = steps(made.step(submit(1), 0.0))[0]
    step = steps(made.step(result(step), 0.5))[0]
    made.step(result(step), 0.7)
    assert made.steps.round_s == 0.5


def test_a_request_that_no_longer_fits_is_refused_not_kept_for_ever() -> None:
    made = scheduler(stages=1, quota=8)
    made.step(submit(1, length=20, max_tokens=30), 0.0)
    made.step(CapacityChanged(4, 1), 0.1)
    refused = [e for e in made.step(Tick(), 0.2) if isinstance(e, Refuse)]
    # Not for ever and not for its own fault: another pipeline may have room for it, and this one again later.
    assert refused[0].message.code is RefusalCode.OVERLOADED
    assert "20 tokens do not fit the 4 KV blocks" in refused[0].message.message
    again = made.step(submit(1, length=20, admitted=True), 0.3)
    assert [e.message.code for e in again if isinstance(e, Refuse)] == [RefusalCode.OVERLOADED]
    made.step(CapacityChanged(8, 1), 0.4)
    assert not [e for e in made.step(submit(1, length=20, admitted=True), 0.5) if isinstance(e, Refuse)]


def test_a_pipeline_that_shares_a_node_refuses_earlier_and_says_when_to_come_back() -> None:
    made = scheduler(stages=1, quota=2, limits=replace(LIMITS, max_waiting=4))
    made.step(submit(1, max_tokens=30), 0.0)
    made.step(CapacityChanged(2, 1, shared=2), 0.0)  # its node was borrowed
    taken = [not [e for e in made.step(submit(rid), 1.0 + rid) if isinstance(e, Refuse)] for rid in (2, 3)]
    assert taken == [True, True]
    (refused,) = [e.message for e in made.step(submit(4), 20.0) if isinstance(e, Refuse)]
    assert refused.code is RefusalCode.OVERLOADED
    assert refused.retry_after_s == 17.0  # the first in the queue has waited so long
    made.step(CapacityChanged(2, 1), 20.0)
    assert not [e for e in made.step(submit(5), 20.0) if isinstance(e, Refuse)]


def test_what_requests_keep_is_bounded_in_bytes() -> None:
    limits = replace(LIMITS, max_waiting=1000, request_bytes=20_000)
    made = scheduler(quota=4, limits=limits)
    context = b"x" * 4000
    taken = []
    for rid in range(1, 10):
        effects = made.step(submit(rid, context=context), 0.0)
        taken.append(not any(isinstance(effect, Refuse) for effect in effects))
    assert taken == [True] * 3 + [False] * 6, "each keeps a little over 6,000 bytes"
    assert made.bytes_kept == sum(r.bytes_kept for r in made.requests.values()) <= limits.request_bytes
    (refused,) = (e for e in made.step(submit(10, context=context), 0.0) if isinstance(e, Refuse))
    assert refused.message.code is RefusalCode.OVERLOADED
    admitted = made.step(submit(11, context=context, admitted=True), 0.0)
    assert not any(isinstance(effect, Refuse) for effect in admitted), "it was taken once"
    for rid in list(made.requests):
        made.step(Cancelled(rid, 1), 0.0)
    assert made.bytes_kept == 0


def test_who_loses_all_in_a_failure_is_interrupted_and_who_is_preempted_is_not() -> None:
    made = scheduler(stages=1)
    (step,) = steps(made.step(submit(1), 0.0))
    made.step(result(step), 0.1)
    request = made.requests[1]
    (ask,) = [e for e in made.step(EpochBegan(6, planned=False), 0.4) if isinstance(e, Ask)]
    made.step(CapacityChanged(64, 0), 0.4)
    made.step(HeldMeta("p0", Fence(6, 0), ask.meta.ask, 0, ()), 0.5)
    assert (request.phase, request.lost) == (Phase.WAITING, True)
    (step,) = steps(made.step(CapacityChanged(64, 1), 0.6))
    assert (request.phase, request.lost) == (Phase.RUNNING, True)
    made.step(CapacityChanged(1, 1), 0.7)
    assert (request.phase, request.lost) == (Phase.WAITING, False)
