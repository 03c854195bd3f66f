"""Requests with a grammar at their last stage: who is drawn for, who waits, whose request ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from controlplane.contract.requests import Sampling
from dataplane._fast.blocktable import Rows
from dataplane.core.blocks import KvStore
from dataplane.core.messages import Admit, Fence, StepMeta, pack_rows
from dataplane.core.request import pack_tokens
from dataplane.core.rules import DEAD_END, Rule
from dataplane.core.stage import Prepared, Stage
from dataplane.model.sampler import Foresight, SamplingTable

VOCAB = 40
PLAIN, FIRST, SECOND = 1, 2, 3


class Told:
    """Says what it was asked, and does what the test wants done."""

    def __init__(self) -> None:
        self.begun: list[tuple[Rule, str, list[int]]] = []
        self.moved: list[tuple[Rule, int]] = []
        self.settled = 0

    def begin(self, rule: Rule, grammar: str, output: Sequence[int]) -> None:
        self.begun.append((rule, grammar, list(output)))

    def advance(self, moves: Sequence[tuple[Rule, int]]) -> None:
        self.moved += moves

    def foresee(self, drafts: Sequence[tuple[Rule, int, Sequence[int]]], foresight: Foresight) -> None:
        pass

    def settle(self) -> None:
        self.settled += 1


def allow(rule: Rule, *tokens: int) -> None:
    bits = np.zeros(64, np.uint8)
    bits[list(tokens)] = 1
    rule.masks[rule.slot] = np.packbits(bits, bitorder="little").view(np.int32)
    rule.ready = True


def stage(follower: Told | None) -> Stage:
    return Stage("p0", 0, 1, 1, KvStore(32, 4, 16, 8), SamplingTable(8, VOCAB), follower)


def step(
    made: Stage, number: int, rows: Sequence[tuple[int, int]], outputs: dict[int, list[int]]
) -> Prepared:
    """Rows of one token each at (rid, start); `outputs` are admitted with their logs."""
    admits = tuple(
        Admit(
            rid,
            Sampling(100, seed=rid, temperature=0.0, logprobs=2, grammar="" if rid == PLAIN else f"g{rid}"),
            pack_tokens([5]),
            pack_tokens(output),
        )
        for rid, output in outputs.items()
    )
    meta = StepMeta("p0", Fence(1), number, pack_rows([(rid, at, 1, True) for rid, at in rows]), admits)
    prepared = made.prepare(meta)
    assert isinstance(prepared, Prepared)
    assert isinstance(prepared.rows, Rows)
    return prepared


def logits(*best: int) -> np.ndarray:
    """Rows of which one token is the likeliest, and token 0 the next."""
    values = np.zeros((len(best), VOCAB), np.float32)
    values[:, 0] = 1.0
    values[range(len(best)), best] = 2.0
    return values


def test_a_row_waits_for_its_grammar_and_holds_nobody_up() -> None:
    told = Told()
    made = stage(told)
    prepared = step(made, 0, [(PLAIN, 0), (FIRST, 0), (SECOND, 0)], {PLAIN: [], FIRST: [], SECOND: []})
    assert [(grammar, output) for _, grammar, output in told.begun] == [("g2", []), ("g3", [])]
    allow(told.begun[1][0], 7, 8)
    drawn = made.draw(prepared, logits(9, 9, 9))
    assert drawn.tokens.tolist() == [9, -1, 7]
    assert (drawn.waiting, drawn.failed, drawn.poisoned) == ((1,), (), ())
    assert sorted(drawn.logprobs) == sorted(drawn.top) == [0, 2]
    assert {token for token, _ in drawn.top[2]} == {7, 8}
    made.commit(prepared, drawn.tokens)
    assert told.moved == [(told.begun[1][0], 7)]
    assert [made.sampling.release(slot) for slot in prepared.slots] == [None] * 3  # type: ignore[union-attr]


def test_a_grammar_that_comes_while_a_step_is_drawn_counts_from_the_next_one_on() -> None:
    """Its mask was not there yet: what was drawn for it means nothing."""
    told = Told()
    made = stage(told)
    prepared = step(made, 0, [(FIRST, 0)], {FIRST: []})
    rids = [FIRST]
    waiting = made.rules.waiting(rids)
    allow(told.begun[0][0], 7)
    judged = made.rules.judge(made.sampling.sample(logits(9), prepared.slots), rids, waiting)  # type: ignore[union-attr]
    assert (judged.tokens.tolist(), judged.waiting) == ([-1], (0,))
    assert made.draw(prepared, logits(9)).tokens.tolist() == [7]


def test_who_can_have_no_token_is_named_with_the_reason() -> None:
    told = Told()
    made = stage(told)
    prepared = step(made, 0, [(FIRST, 0), (SECOND, 0)], {FIRST: [], SECOND: []})
    told.begun[0][0].error = "no such rule"
    allow(told.begun[1][0])
    drawn = made.draw(prepared, logits(9, 9))
    assert drawn.failed == ((0, "no such rule"), (1, DEAD_END))
    assert drawn.tokens.tolist() == [-1, -1]
    made.commit(prepared, drawn.tokens)
    assert told.moved == []


def test_poison_goes_before_all_else() -> None:
    told = Told()
    made = stage(told)
    prepared = step(made, 0, [(FIRST, 0), (SECOND, 0)], {FIRST: [], SECOND: []})
    told.begun[0][0].error = "no such rule"
    values = logits(9, 9)
    values[:, 3] = np.nan
    drawn = made.draw(prepared, values)
    assert (drawn.poisoned, drawn.failed, drawn.waiting) == ((0, 1), (), (1,))


def test_the_scheduler_is_told_once_of_each_that_it_waits_for() -> None:
    told = Told()
    made = stage(told)
    step(made, 0, [(FIRST, 0), (SECOND, 0)], {FIRST: [], SECOND: []})
    first, second = (rule for rule, _, _ in told.begun)
    allow(first, 7)
    assert made.rules.answers() == [], "nobody waits for it"
    made.rules.ask([FIRST, SECOND, 99])
    assert made.rules.answers() == [FIRST]
    assert made.rules.answers() == []
    second.error = "too large"
    assert made.rules.answers() == [SECOND]


def test_a_later_fence_begins_again_from_the_log() -> None:
    told = Told()
    made = stage(told)
    step(made, 0, [(FIRST, 0)], {FIRST: []})
    made.enter(Fence(1, 1))
    assert told.begun[0][0].closed
    assert not made.rules
    meta = StepMeta(
        "p0",
        Fence(1, 1),
        1,
        pack_rows([(FIRST, 0, 3, True)]),
        (Admit(FIRST, Sampling(9, seed=0, grammar="g2"), pack_tokens([5]), pack_tokens([7, 8])),),
    )
    assert isinstance(made.prepare(meta), Prepared)
    assert told.begun[1][1:] == ("g2", [7, 8])
    assert not told.begun[1][0].closed


@pytest.mark.parametrize("rid", [FIRST, PLAIN])
def test_without_a_follower_only_grammars_fail(rid: int) -> None:
    made = stage(None)
    drawn = made.draw(step(made, 0, [(rid, 0)], {rid: []}), logits(9))
    assert drawn.failed == (() if rid == PLAIN else ((0, "this node cannot follow grammars"),))
