"""Real models, cut into stages: with drafts the same tokens and log probabilities come as without, whatever the options
of a request are, and whichever stage dies at whichever token."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from controlplane.contract.ids import Member
from controlplane.contract.requests import FinishReason, Sampling, Submit, Token
from controlplane.grammar import Compiler, load_compiler
from dataplane._fast.blocktable import BlockTable
from dataplane.compute import Compute, Work
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
from dataplane.core.messages import Detail, ReadyMeta, ResultMeta, StepMeta
from dataplane.core.request import Request, pack_tokens
from dataplane.core.scheduler import Scheduler
from dataplane.core.speculation import Proposer
from dataplane.core.stage import Prepared, Stage, join
from dataplane.demo import draft_dir, model_dir
from dataplane.drafting import DraftModel, load_draft_model
from dataplane.executor import StageExecutor
from dataplane.grammars import Grammars
from dataplane.inbox import Message
from dataplane.model.sampler import SamplingTable

VOCAB, BLOCK, BLOCKS, STAGES, CONTEXT = 2048, 8, 200, 2, 256
LIMITS = Limits(BLOCK, 64, 8, 8, CONTEXT, 1.0, VOCAB, max_draft_tokens=5)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.1},
    "nucleus": {"temperature": 0.7, "top_p": 0.8, "top_k": 30, "min_p": 0.02},
    "penalties": {
        "temperature": 0.6,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
    },
    "logprobs": {"temperature": 0.3, "logprobs": 3},
    "min_tokens": {
        "temperature": 0.4,
        "min_tokens": 20,
        "stop_token_ids": (1, 2, 13),
        "logit_bias": ((13, 3.0),),
    },
    "stop": {"temperature": 0.0, "stop_token_ids": (1, 2, 13, 14, 15)},
    "grammar": {"temperature": 0.8, "grammar": 'start: /( [a-z]{2,9}){3,12}/ "."', "stop_token_ids": (1, 2)},
}
# Two of a pair run in one batch, with one prompt, so that they share its KV.
PAIRS = list(itertools.combinations(SAMPLINGS, 2))
TEXT = (
    "The old lady said that she was glad to see him, and he said that he was glad to see the old lady. " * 2
)


class World:
    """One pipeline of real stages, and what a gateway has of each request."""

    def __init__(
        self,
        executors: Sequence[StageExecutor],
        compiler: Compiler,
        submits: Sequence[Submit],
        limits: Limits = LIMITS,
        proposer: Proposer | None = None,
    ) -> None:
        self.executors, self.compiler, self.limits, self.proposer = executors, compiler, limits, proposer
        self.submits = {submit.rid: submit for submit in submits}
        self.logs: dict[int, list[Token]] = {rid: [] for rid in self.submits}
        self.steps: deque[RunStep] = deque()
        self.epoch, self.now = 1, 0.0
        self.computes = [Compute(executor) for executor in executors]
        self.grammars = Grammars(compiler)
        self.stages: list[Stage] = []
        for index in range(len(executors)):
            self.stages.append(self._stage(index))
        self.scheduler = self._scheduler(takeover=False)

    def close(self) -> None:
        self.grammars.close()
        for compute in self.computes:
            compute.close()

    def _stage(self, index: int) -> Stage:
        store = KvStore(BLOCKS, BLOCK, 16, CONTEXT // BLOCK)
        last = index == len(self.executors) - 1
        sampling = SamplingTable(16, VOCAB) if last else None
        return Stage(
            "p0", index, len(self.executors), self.epoch, store, sampling, self.grammars if last else None
        )

    def _scheduler(self, takeover: bool) -> Scheduler:
        scheduler = Scheduler(
            "p0",
            self.epoch,
            len(self.stages),
            self.limits,
            takeover=takeover,
            now=self.now,
            proposer=self.proposer,
        )
        self.perform(scheduler.step(CapacityChanged(BLOCKS // 2, 1), self.now))
        return scheduler

    def kill(self, index: int) -> None:
        """A blank node takes the stage; with the first one the scheduler is gone, too."""
        self.epoch += 1
        self.stages[index] = self._stage(index)
        for stage in self.stages:
            stage.enter(replace_epoch(stage, self.epoch))
        self.steps.clear()
        if index:
            self.perform(self.scheduler.step(EpochBegan(self.epoch, planned=False), self.now))
            return
        self.scheduler = self._scheduler(takeover=True)
        self.perform(self.scheduler.start(self.now))
        for rid, submit in self.submits.items():
            if not self._ended(rid):
                emitted = tuple(token.token for token in self.logs[rid])
                again = Submit(rid, "p0", submit.prompt, submit.sampling, emitted, 0, True)
                self.perform(self.scheduler.step(Submitted(again, 1), self.now))

    def _ended(self, rid: int) -> bool:
        return bool(self.logs[rid]) and self.logs[rid][-1].finish is not None

    def perform(self, effects: list[Effect]) -> None:
        todo = deque(effects)
        while todo:
            match todo.popleft():
                case RunStep() as step:
                    self.steps.append(step)
                case Ask(meta):
                    for stage in self.stages:
                        todo.extend(self.scheduler.step(stage.rejoin(meta), self.now))
                case Deliver(_, tokens):
                    for token in tokens:
                        if token.position == len(self.logs[token.rid]):
                            self.logs[token.rid].append(token)
                case Refuse(_, refused):
                    raise AssertionError(refused.message)

    def turn(self) -> None:
        # What a step takes here: long enough for a draft model's passes to pay on any machine.
        self.now += 0.1
        if not self.steps:
            rids = tuple(self.stages[-1].rules.answers())
            self.perform(self.scheduler.step(ReadyMeta("p0", self.stages[-1].fence, rids), self.now))
            return
        step = self.steps.popleft()
        meta, hidden, drawn = step.meta, b"", None
        for stage, compute in zip(self.stages, self.computes, strict=True):
            prepared = stage.prepare(meta)
            assert isinstance(prepared, Prepared), prepared
            if not meta.rows:
                continue
            work = Work(stage, prepared, Message(Member("n0", "a"), meta, hidden, step.tokens, 0.0))
            computed = compute._pass([work], join([prepared], stage.store.table))[0]
            assert not computed.poisoned
            hidden, drawn = bytes(computed.output), computed.drawn
            stage.commit(prepared, drawn.tokens if drawn is not None else None)
            stage.store.check()
        self.perform(self.scheduler.step(self._result(meta, drawn), self.now))

    def _result(self, meta: StepMeta, drawn: Any) -> ResultMeta:
        if drawn is None:
            return ResultMeta("p0", meta.fence, meta.step, b"")
        details = tuple(Detail(row, value, drawn.top[row]) for row, value in drawn.logprobs.items())
        last = self.stages[-1]
        if drawn.waiting:
            rids = [rid for rid, request in self.scheduler.requests.items() if request.sampling.grammar]
            last.rules.ask(rids)
        tokens = pack_tokens(drawn.tokens.tolist())
        return ResultMeta("p0", meta.fence, meta.step, tokens, details, drawn.waiting, drawn.failed)

    def run(self, kills: dict[int, int]) -> dict[int, list[tuple[Any, ...]]]:
        """`kills`: number of tokens of the first request -> the stage that dies then."""
        kills = dict(kills)
        for submit in self.submits.values():
            self.perform(self.scheduler.step(Submitted(submit, 1), self.now))
        for _ in range(20_000):
            if all(map(self._ended, self.logs)):
                return {rid: [(t.position, t.token, t.logprob, t.top, t.finish) for t in log]
                        for rid, log in self.logs.items()}  # fmt: skip
            due = [at for at in kills if len(next(iter(self.logs.values()))) >= at]
            for at in due:
                self.kill(kills.pop(at))
            self.turn()
        raise AssertionError("it does not end")


def replace_epoch(stage: Stage, epoch: int) -> Any:
    return type(stage.fence)(epoch, 0)


@pytest.fixture(scope="module")
def executors() -> list[StageExecutor]:
    torch.set_num_threads(1)
    return [StageExecutor(model_dir(), i, STAGES, num_blocks=BLOCKS, block_size=BLOCK) for i in range(STAGES)]


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return load_compiler(model_dir(), VOCAB, (1, 2))


@pytest.fixture(scope="module")
def prompt() -> tuple[int, ...]:
    return tuple(Tokenizer.from_file(str(model_dir() / "tokenizer.json")).encode(TEXT).ids)


@pytest.fixture(scope="module")
def draft_model() -> DraftModel:
    return load_draft_model(draft_dir(), VOCAB, BLOCK, 8, CONTEXT, 1)


def submits(prompt: tuple[int, ...], *names: str, tokens: int = 40) -> list[Submit]:
    return [
        Submit(7 + i, "p0", prompt, Sampling(**{"max_tokens": tokens, "seed": 5 + i, **SAMPLINGS[name]}))
        for i, name in enumerate(names)
    ]


_plain: dict[tuple[str, ...], dict[int, list[tuple[Any, ...]]]] = {}


def played(world: World, kills: dict[int, int]) -> dict[int, list[tuple[Any, ...]]]:
    try:
        return world.run(kills)
    finally:
        world.close()


def plain(
    executors: list[StageExecutor], compiler: Compiler, prompt: tuple[int, ...], *names: str
) -> dict[int, list[tuple[Any, ...]]]:
    """Without drafts and without deaths."""
    if names not in _plain:
        _plain[names] = played(World(executors, compiler, submits(prompt, *names)), {})
    return _plain[names]


@pytest.mark.parametrize("speculation", ["ngram", "draft"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_option_alone(
    executors: list[StageExecutor],
    compiler: Compiler,
    prompt: tuple[int, ...],
    draft_model: DraftModel,
    name: str,
    speculation: str,
) -> None:
    limits = replace(LIMITS, speculation=speculation)
    world = World(
        executors, compiler, submits(prompt, name), limits, draft_model if speculation == "draft" else None
    )
    assert played(world, {}) == plain(executors, compiler, prompt, name)
    stats = world.scheduler.stats
    if name == "greedy":
        assert stats.spec_decode_num_accepted_tokens > 0


@pytest.mark.parametrize("pair", random.Random(14).sample(PAIRS, 10), ids="+".join)
def test_pairs_with_a_death_of_each_stage(
    executors: list[StageExecutor], compiler: Compiler, prompt: tuple[int, ...], pair: tuple[str, str]
) -> None:
    """A sample of the tokens at which a stage may die; which, the pair says."""
    chance = random.Random("+".join(pair))
    kills = dict(zip(chance.sample(range(1, 38), 3), [0, 1, 0], strict=True))
    world = World(executors, compiler, submits(prompt, *pair), replace(LIMITS, speculation="ngram"))
    assert played(world, kills) == plain(executors, compiler, prompt, *pair)
    assert world.epoch == 4 or plain(executors, compiler, prompt, *pair)[7][-1][-1] is FinishReason.STOP


@pytest.mark.parametrize("name", ["greedy", "hot", "nucleus", "penalties"])
def test_drafts_are_what_the_model_itself_would_draw(prompt: tuple[int, ...], name: str) -> None:
    """Token by token and behind drafts, for a request that was there before and for one that takes its place."""
    executor = StageExecutor(draft_dir(), 0, 1, num_blocks=40, block_size=BLOCK)
    model = load_draft_model(draft_dir(), VOCAB, BLOCK, 2, CONTEXT, 1)
    for submit in submits(prompt[:30], name, "greedy", name, tokens=20):
        tokens = decoded(executor, submit)
        request = Request.from_submit(submit, 0, None)
        for position, token in enumerate(tokens):
            drafts = model.propose([request], 3, 1e9)[0]
            wanted = tokens[position : position + len(drafts)]
            assert drafts
            assert drafts[: len(wanted)] == wanted
            request.ids.append(token)


def decoded(executor: StageExecutor, submit: Submit) -> list[int]:
    """Each token from its log alone."""
    output: list[int] = []
    while len(output) < submit.sampling.max_tokens:
        ids = np.array([*submit.prompt, *output], np.int64)
        table = BlockTable(1, 40, BLOCK)
        row, sampling = table.new_row(), SamplingTable(1, VOCAB)
        at = np.array([row], np.int32), np.zeros(1, np.int32), np.array([len(ids)], np.int32)
        table.grow(*at, list(range(40)))
        logits = executor.forward(ids, None, table.fill(*at), np.array([len(ids) - 1], np.int32))
        slot = sampling.admit(submit.sampling, submit.prompt, output)
        output.append(int(sampling.sample(logits, np.array([slot], np.int32)).tokens[0]))
    return output


def test_a_draft_model_of_other_tokens_is_refused() -> None:
    with pytest.raises(Exception, match="2048 tokens, and the model has 999"):
        load_draft_model(draft_dir(), 999, BLOCK, 8, CONTEXT, 1)


def test_a_draft_model_that_fails_costs_drafts_only(
    executors: list[StageExecutor],
    compiler: Compiler,
    prompt: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = load_draft_model(draft_dir(), VOCAB, BLOCK, 8, CONTEXT, 1)

    def fails(*_: object) -> None:
        raise ValueError("a step that does not fit")

    monkeypatch.setattr(broken._executor, "forward", fails)
    world = World(
        executors, compiler, submits(prompt, "greedy"), replace(LIMITS, speculation="draft"), broken
    )
    assert played(world, {}) == plain(executors, compiler, prompt, "greedy")
    assert world.scheduler.stats.spec_decode_num_drafts == 0
    assert caplog.text.count("the draft model failed") == 1


def test_a_draft_model_with_room_for_few_requests_makes_room(
    executors: list[StageExecutor], compiler: Compiler, prompt: tuple[int, ...]
) -> None:
    """Of three requests at most one fits into its pool."""
    small = DraftModel(
        StageExecutor(draft_dir(), 0, 1, num_blocks=len(prompt) // BLOCK + 8, block_size=BLOCK), 2
    )
    small.warm_up()
    names = ("greedy", "hot", "logprobs")
    world = World(executors, compiler, submits(prompt, *names), replace(LIMITS, speculation="draft"), small)
    assert played(world, {9: 1}) == plain(executors, compiler, prompt, *names)
