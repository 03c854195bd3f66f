"""A scheduler whose requests wait for their grammars at the last stage."""

from __future__ import annotations

import numpy as np

from controlplane.contract.requests import FinishReason, RefusalCode, Sampling
from dataplane.core.admission import refusal
from dataplane.core.events import CapacityChanged, Deliver, Effect, EpochBegan, Refuse, RunStep, Tick
from dataplane.core.messages import ROW_FIELDS, Fence, HeldMeta, ReadyMeta, ResultMeta, StepMeta
from dataplane.core.request import Request, pack_tokens
from dataplane.core.scheduler import BLOCKED_RETRY_S, Scheduler
from tests.core.data.parts import LIMITS, submitted

STOP = 9


def constrained(**fields: object) -> Sampling:
    return Sampling(8, seed=1, grammar="start: /a*/", stop_token_ids=(STOP,), **fields)  # type: ignore[arg-type]


def scheduler() -> Scheduler:
    made = Scheduler("p0", 1, 1, LIMITS, takeover=False, now=0.0)
    made.step(CapacityChanged(64, 4), 0.0)
    return made


def steps(effects: list[Effect]) -> list[StepMeta]:
    return [effect.meta for effect in effects if isinstance(effect, RunStep)]


def rows(meta: StepMeta) -> list[tuple[int, ...]]:
    """(rid, start, count, sample) of each."""

    return [tuple(row) for row in np.frombuffer(meta.rows, "<i8").reshape(len(ROW_FIELDS), -1).T.tolist()]


def result(meta: StepMeta, tokens: list[int], **fields: object) -> ResultMeta:
    return ResultMeta("p0", meta.fence, meta.step, pack_tokens(tokens), **fields)  # type: ignore[arg-type]


def test_a_waiting_request_has_no_rows_until_its_grammar_is_there() -> None:
    made = scheduler()
    (first,) = steps(made.step(submitted(1, sampling=constrained()), 0.0))
    (other,) = steps(made.step(submitted(2), 0.0))
    assert steps(made.step(result(first, [-1], waiting=(0,)), 0.1)) == []
    # Nobody is held up by it.
    effects = made.step(result(other, [7]), 0.2)
    assert [rows(meta) for meta in steps(effects)] == [[(2, 4, 1, 1)]]
    (other,) = steps(effects)
    made.step(ReadyMeta("p0", first.fence, (1, 99)), 0.3)
    (both,) = steps(made.step(result(other, [7]), 0.3))
    assert sorted(rows(both)) == [(1, 3, 1, 1), (2, 5, 1, 1)], "its last position once more: that draws"
    assert both.admits == ()
    effects = made.step(result(both, [5, 5]), 0.4)
    assert [item.token for e in effects if isinstance(e, Deliver) for item in e.tokens] == [5, 5]
    assert made.stats.grammar_waits == 1
    assert made.batcher.used_blocks == 3, "the first block of both is one"
    made.batcher.account.check()


def test_a_word_that_is_lost_is_not_waited_for_for_ever() -> None:
    made = scheduler()
    (first,) = steps(made.step(submitted(1, sampling=constrained()), 0.0))
    made.step(result(first, [-1], waiting=(0,)), 0.1)
    assert steps(made.step(Tick(), 0.09 + BLOCKED_RETRY_S)) == []
    (again,) = steps(made.step(Tick(), 0.11 + BLOCKED_RETRY_S))
    made.step(result(again, [-1], waiting=(0,)), 1.2)
    assert steps(made.step(ReadyMeta("p0", first.fence, (1,)), 1.3)) != []


def test_a_word_of_an_earlier_fence_counts_for_nothing() -> None:
    """The stage has forgotten everything since: it compiles again."""
    made = scheduler()
    (first,) = steps(made.step(submitted(1, sampling=constrained()), 0.0))
    made.step(result(first, [-1], waiting=(0,)), 0.1)
    made.step(EpochBegan(2, planned=False), 0.2)
    ask = made.step(Tick(), 0.2)
    assert steps(ask) == []
    assert steps(made.step(ReadyMeta("p0", Fence(1), (1,)), 0.3)) == []
    effects = made.step(HeldMeta("p0", Fence(2), max(made.questions.open), 0, ((1, 4),)), 0.4)
    (again,) = steps(effects)
    assert rows(again) == [(1, 3, 1, 1)]
    assert again.admits[0].sampling.grammar == "start: /a*/"


def test_who_can_have_no_token_ends_with_the_reason_and_others_go_on() -> None:
    made = scheduler()
    (first,) = steps(made.step(submitted(1, sampling=constrained()), 0.0))
    (other,) = steps(made.step(submitted(2, sampling=constrained()), 0.0))
    effects = made.step(result(first, [-1], failed=((0, "no such rule"),)), 0.1)
    (refused,) = (effect.message for effect in effects if isinstance(effect, Refuse))
    assert (refused.rid, refused.code, refused.message) == (1, RefusalCode.INVALID, "no such rule")
    assert list(made.requests) == [2]
    assert made.stats.grammars_failed == 1
    assert [meta.frees for meta in steps(effects)] == [(1,)]
    effects = made.step(result(other, [5]), 0.2)
    assert [item.token for e in effects if isinstance(e, Deliver) for item in e.tokens] == [5]


def test_a_cancelled_request_does_not_come_back() -> None:
    made = scheduler()
    (first,) = steps(made.step(submitted(1, sampling=constrained()), 0.0))
    made.step(result(first, [-1], waiting=(0,)), 0.1)
    made._drop(1)
    made.step(Tick(), 0.2)
    assert all(not meta.rows for meta in steps(made.step(ReadyMeta("p0", first.fence, (1,)), 0.3)))


def finish(sampling: Sampling, token: int, output: int) -> FinishReason | None:
    message = submitted(1, sampling=sampling, emitted=tuple([5] * output)).message
    return Request.from_submit(message, 0, 1).finish_of(token, 1000)


def test_an_end_that_only_a_grammar_can_bring_before_min_tokens_is_a_stop() -> None:
    assert finish(constrained(min_tokens=4), STOP, 1) is FinishReason.STOP
    free = Sampling(8, seed=1, min_tokens=4, stop_token_ids=(STOP,))
    assert finish(free, STOP, 1) is None
    assert finish(free, STOP, 4) is FinishReason.STOP
    assert finish(constrained(), 5, 7) is FinishReason.LENGTH


def test_a_grammar_counts_as_memory_and_is_bounded() -> None:
    made = scheduler()
    long = Sampling(8, seed=1, grammar="x" * (128 << 10))
    made.step(submitted(1, sampling=long), 0.0)
    assert made.bytes_kept > 128 << 10
    too_long = Sampling(8, seed=1, grammar="x" * ((128 << 10) + 1))
    refused = refusal(submitted(2, sampling=too_long).message, made.batcher, 0)
    assert refused is not None
    assert refused[0] is RefusalCode.INVALID
    assert "grammar" in refused[1]
