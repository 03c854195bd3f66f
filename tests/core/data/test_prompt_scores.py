"""Log probabilities of prompts are those of one pass over the prompt, whatever dies, however it is cut into chunks, and
whatever of it is cached. And choices of one prompt share what they compute of it.

The real scheduler, stage and sampler; a model whose logits are drawn from the tokens before.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pytest

from controlplane.contract.prompt_scores import unpack_scores
from controlplane.contract.requests import RefusalCode, Sampling, Submit, Token
from dataplane.core.batching import Limits
from dataplane.core.blocks import KvStore
from dataplane.core.events import (
    Ask,
    CapacityChanged,
    Deliver,
    Effect,
    EpochBegan,
    Refuse,
    RunStep,
    Submitted,
)
from dataplane.core.messages import Detail, ResultMeta, StepMeta
from dataplane.core.request import pack_tokens
from dataplane.core.scheduler import Scheduler
from dataplane.core.stage import Prepared, Stage
from dataplane.model.sampler import SamplingTable

VOCAB, BLOCK, TOP = 96, 4, 3
LIMITS = Limits(BLOCK, 16, 8, 8, 512, 1.0, VOCAB)
PROMPT = tuple(range(1, 40))


@lru_cache(4096)
def logits(ids: tuple[int, ...]) -> np.ndarray:
    seed = zlib.crc32(np.array(ids, np.int64).tobytes())
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 2).astype(np.float32)


def expected(prompt: tuple[int, ...], top: int) -> bytes:
    """Of one pass over the whole prompt."""
    rows = np.array([logits(prompt[: at + 1]) for at in range(len(prompt) - 1)]).reshape(-1, VOCAB)
    scored = SamplingTable(1, VOCAB).score(rows, np.array(prompt[1:], np.int32), top)
    return scored.records(slice(0, len(rows)), top)


@dataclass
class World:
    """One pipeline of one stage, whose KV outlives a change of epoch unless it is lost; and a gateway's logs."""

    limits: Limits = LIMITS
    epoch: int = 1
    logs: dict[int, list[Token]] = field(default_factory=dict)
    submitted: dict[int, Submit] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    # Of each step: request -> start, count.
    rows: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    scored_rows: list[int] = field(default_factory=list)
    silent: bool = False  # the stage says nothing of what it scores

    def __post_init__(self) -> None:
        self.steps: list[StepMeta] = []
        self.fresh_stage()
        self.scheduler = Scheduler("p0", 1, 1, self.limits, takeover=False, now=0.0)
        self.perform(self.scheduler.step(CapacityChanged(256, 1), 0.0))

    def fresh_stage(self) -> None:
        store = KvStore(256, BLOCK, 16, 128)
        self.stage = Stage("p0", 0, 1, self.epoch, store, SamplingTable(16, VOCAB))

    def submit(self, rid: int, prompt: tuple[int, ...], **sampling: object) -> None:
        self.logs[rid] = []
        given = {"max_tokens": 3, "seed": rid, "temperature": 0.0, **sampling}
        self.submitted[rid] = Submit(rid, "p0", prompt, Sampling(**given))  # type: ignore[arg-type]
        self.perform(self.scheduler.step(Submitted(self.submitted[rid], 1), 0.0))

    def fail(self, who: str) -> None:
        """link: a new epoch, and the stage has its KV; stage: it has not; scheduler: both are new."""
        self.epoch += 1
        if who != "link":
            self.fresh_stage()
        if who == "scheduler":
            self.scheduler = Scheduler("p0", self.epoch, 1, self.limits, takeover=True, now=0.0)
            self.perform(self.scheduler.step(CapacityChanged(256, 1), 0.0))
            self.perform(self.scheduler.start(0.0))
            for rid, first in self.submitted.items():
                if not (self.logs[rid] and self.logs[rid][-1].finish):
                    emitted = tuple(token.token for token in self.logs[rid])
                    again = replace_submit(first, emitted)
                    self.perform(self.scheduler.step(Submitted(again, 1), 0.0))
        else:
            self.perform(self.scheduler.step(EpochBegan(self.epoch, planned=False), 0.0))

    def perform(self, effects: list[Effect]) -> None:
        todo = list(effects)
        while todo:
            match todo.pop(0):
                case RunStep(meta, _):
                    self.steps.append(meta)
                case Ask(meta):
                    todo += self.scheduler.step(self.stage.rejoin(meta), 0.0)
                case Deliver(_, tokens):
                    for token in tokens:
                        if token.position == len(self.logs[token.rid]):
                            self.logs[token.rid].append(token)
                case Refuse(_, refused) if refused.code is not RefusalCode.SUPERSEDED:
                    self.refused.append(refused.message)

    def turn(self) -> None:
        meta = self.steps.pop(0)
        if self.stage.stale(meta.fence):
            return
        prepared = self.stage.prepare(meta)
        assert isinstance(prepared, Prepared), prepared
        rows = prepared.rows
        starts = zip(rows.rids.tolist(), rows.starts.tolist(), rows.counts.tolist(), strict=True)
        self.rows.append({rid: (start, count) for rid, start, count in starts})
        if not meta.rows:
            self.perform(self.scheduler.step(ResultMeta("p0", meta.fence, meta.step, b""), 0.0))
            return
        made = []
        for rid, (start, count) in self.rows[-1].items():
            ids = (*self.submitted[rid].prompt, *(token.token for token in self.logs[rid]))
            made += [logits(ids[: at + 1]) for at in range(start, start + count)]
        output = np.array(made)[prepared.logit_rows]
        sampled = len(rows.sample_rows)
        self.scored_rows.append(len(output) - sampled)
        tells = prepared.scored is not None and not self.silent
        scores = self.stage.score(prepared.scored, output[sampled:])[0] if tells else ()
        drawn = self.stage.draw(prepared, output[:sampled]) if sampled else None
        self.stage.commit(prepared, drawn.tokens if drawn is not None else None)
        if drawn is None:
            result = ResultMeta("p0", meta.fence, meta.step, b"", scores=scores)
        else:
            details = tuple(Detail(row, value, drawn.top[row]) for row, value in drawn.logprobs.items())
            result = ResultMeta(
                "p0",
                meta.fence,
                meta.step,
                pack_tokens(drawn.tokens.tolist()),
                details,
                (),
                drawn.failed,
                scores,
            )
        self.perform(self.scheduler.step(result, 0.0))

    def run(self, fail_at: int = -1, who: str = "") -> int:
        """Returns how many steps that took. `fail_at`: before which of them."""
        count = 0
        while any(not (log and log[-1].finish) for log in self.logs.values()) and not self.refused:
            if count == fail_at:
                self.fail(who)
            self.turn()
            count += 1
        return count


def replace_submit(first: Submit, emitted: tuple[int, ...]) -> Submit:
    return Submit(first.rid, first.pipeline, first.prompt, first.sampling, emitted, 0, True)


def reference(prompt: tuple[int, ...], **sampling: object) -> list[Token]:
    world = World()
    world.submit(7, prompt, **sampling)
    world.run()
    return world.logs[7]


@pytest.mark.parametrize("top", [0, 1, TOP])
@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, len(PROMPT)])
def test_they_are_those_of_one_pass(top: int, length: int) -> None:
    prompt = PROMPT[:length]
    log = reference(prompt, prompt_logprobs=top)
    assert log[0].prompt_scores == expected(prompt, top)
    assert [token.prompt_scores for token in log[1:]] == [None, None]
    plain = reference(prompt)
    assert [token.token for token in plain] == [token.token for token in log]
    assert plain[0].prompt_scores is None


def test_a_record_is_a_log_softmax_and_a_rank() -> None:
    rows = unpack_scores(expected(PROMPT, TOP), TOP)
    for at, row in enumerate(rows):
        values = logits(PROMPT[: at + 1]).astype(np.float64)
        wanted = values - np.log(np.exp(values).sum())
        order = np.argsort(-values, kind="stable").tolist()
        assert row["logprob"] == pytest.approx(wanted[PROMPT[at + 1]])
        assert row["rank"] == order.index(PROMPT[at + 1]) + 1
        assert row["top"]["token"].tolist() == order[:TOP]
        assert row["top"]["logprob"].tolist() == pytest.approx(wanted[order[:TOP]].tolist())


@pytest.mark.parametrize("who", ["link", "stage", "scheduler"])
def test_a_failure_before_any_step_changes_nothing(who: str) -> None:
    world = World()
    world.submit(7, PROMPT, prompt_logprobs=TOP, logprobs=1)
    steps = world.run()
    assert steps > len(PROMPT) // LIMITS.max_batch_tokens
    for at in range(steps):
        failed = World()
        failed.submit(7, PROMPT, prompt_logprobs=TOP, logprobs=1)
        failed.run(at, who)
        assert failed.logs == world.logs, f"before step {at}"
        assert failed.scheduler.fence.epoch == 2


def test_what_has_been_scored_is_not_computed_again_where_its_kv_is_there() -> None:
    world = World()
    world.submit(7, PROMPT, prompt_logprobs=TOP)
    world.run(2, "link")
    starts = [rows[7][0] for rows in world.rows if 7 in rows]
    assert starts[:3] == [0, 13, 24]  # the third chunk of 13 would have begun at 26, within a block


def test_what_is_cached_is_computed_again_for_its_logits_only() -> None:
    world = World()
    world.submit(1, PROMPT)
    world.run()
    world.rows.clear()
    world.submit(2, PROMPT)
    world.run()
    assert next(rows[2] for rows in world.rows if 2 in rows) == (36, 3), "the cache is used"
    world.rows.clear()
    world.submit(3, PROMPT, prompt_logprobs=TOP)
    world.run()
    assert next(rows[3] for rows in world.rows if 3 in rows)[0] == 0
    assert world.logs[3][0].prompt_scores == expected(PROMPT, TOP)
    assert world.logs[3][0].cached == 0
    world.scheduler.batcher.account.check()


def test_a_step_has_room_for_so_many_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "scored_rows", 10)
    world = World(replace(LIMITS, max_batch_tokens=64))
    world.submit(1, PROMPT[:20])
    world.submit(2, PROMPT[1:30], prompt_logprobs=0)
    world.submit(3, PROMPT[2:], prompt_logprobs=TOP)
    world.run()
    assert max(world.scored_rows) == 10
    for rid, top in ((2, 0), (3, TOP)):
        assert world.logs[rid][0].prompt_scores == expected(world.submitted[rid].prompt, top)


def test_a_gateway_that_comes_back_for_the_first_token_has_them_again() -> None:
    world = World()
    world.submit(7, PROMPT, prompt_logprobs=TOP)
    world.submitted[7] = replace_submit(world.submitted[7], ())
    while len(world.logs[7]) < 2:
        world.turn()
    log, world.logs[7] = list(world.logs[7]), []
    world.perform(world.scheduler.step(Submitted(world.submitted[7], 2), 0.0))
    assert world.logs[7] == log
    # After a takeover the scheduler has only the tokens that a gateway knows, and another one asks for all.
    world.fail("scheduler")
    world.logs[7] = []
    world.perform(world.scheduler.step(Submitted(world.submitted[7], 3), 0.0))
    world.run()
    assert world.logs[7] == reference(PROMPT, prompt_logprobs=TOP, seed=7)


def test_a_stage_that_gives_none_ends_the_request_and_not_the_others() -> None:
    world = World(silent=True)
    world.submit(1, PROMPT[:9])
    world.submit(7, PROMPT, prompt_logprobs=TOP)
    for _ in range(200):
        if world.steps:
            world.turn()
    assert world.refused == ["the last stage gives no log probabilities of the prompt"]
    assert [token.token for token in world.logs[1]] == [t.token for t in reference(PROMPT[:9], seed=1)]


def test_what_no_stage_could_take_is_refused() -> None:
    for sampling in (
        {"prompt_logprobs": 21},
        {"prompt_logprobs": -1},
        {"bad_words": ((),)},
        {"bad_words": ((96,),)},
    ):
        world = World()
        world.submit(7, PROMPT, **sampling)
        assert len(world.refused) == 1


@pytest.mark.parametrize("words", [((50,),), ((50,), (51, 52)), tuple((i,) for i in range(48))])
def test_bad_words_are_in_no_output_whatever_dies(words: tuple[tuple[int, ...], ...]) -> None:
    sampling = {"bad_words": words, "max_tokens": 40, "temperature": 1.0}
    log = reference(PROMPT, **sampling)
    ids = [token.token for token in log]
    assert not any(tuple(ids[at : at + len(word)]) == word for word in words for at in range(len(ids)))
    free = [token.token for token in reference(PROMPT, max_tokens=40, temperature=1.0)]
    assert (
        any(tuple(free[at : at + len(word)]) == word for word in words for at in range(len(free)))
        or len(words) < 9
    )
    for at in range(0, 40, 3):
        for who in ("link", "scheduler"):
            world = World()
            world.submit(7, PROMPT, **sampling)
            world.run(at, who)
            assert world.logs[7] == log


def test_the_second_token_of_a_bad_word_is_free_elsewhere() -> None:
    first, second = (token.token for token in reference(PROMPT)[:2])
    banned = [token.token for token in reference(PROMPT, bad_words=((first, second),))]
    assert banned[0] == first
    assert banned[1] != second
    free = [
        token.token for token in reference(PROMPT, bad_words=((second, second, second), (first + 1, second)))
    ]
    assert free[:2] == [first, second]


def test_where_bad_words_leave_nothing_the_request_ends_with_the_reason() -> None:
    world = World()
    world.submit(7, PROMPT, bad_words=tuple((i,) for i in range(VOCAB)))
    world.run()
    assert world.refused == ["bad_words and min_tokens allow none of the model's tokens here"]


@pytest.mark.parametrize("batch", [16, 64])
def test_choices_of_one_prompt_compute_it_once(batch: int) -> None:
    world = World(replace(LIMITS, max_batch_tokens=batch))
    world.perform(world.scheduler.step(CapacityChanged(256, 0), 0.0))  # they come together
    for rid in range(1, 6):
        world.submit(rid, PROMPT if rid < 5 else PROMPT[::-1])
    world.perform(world.scheduler.step(CapacityChanged(256, 1), 0.0))
    world.run()
    computed = {rid: sum(rows[rid][1] for rows in world.rows if rid in rows) for rid in range(1, 6)}
    whole = len(PROMPT) + 2
    assert sorted(computed.values()) == [*[whole - 36] * 3, whole, whole]
    world.scheduler.batcher.account.check()
