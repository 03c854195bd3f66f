"""A document is the same whichever token its last stage, or its scheduler, dies at: a grammar's state follows the log.

The real scheduler, stage, sampler and grammars; a model whose logits are drawn from the tokens before.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer

from controlplane.contract.requests import FinishReason, Sampling, Submit, Token
from controlplane.grammar import Compiler, load_compiler
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
from dataplane.core.messages import Detail, Fence, ReadyMeta, ResultMeta, StepMeta
from dataplane.core.request import Request, pack_tokens
from dataplane.core.scheduler import Scheduler
from dataplane.core.stage import Prepared, Stage
from dataplane.demo import model_dir
from dataplane.grammars import Grammars
from dataplane.model.sampler import SamplingTable

VOCAB, ENDS, BLOCK = 2048, (1, 2), 4
LIMITS = Limits(BLOCK, 64, 8, 8, 512, 1.0, VOCAB)
LIMIT_S = 20.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 9},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
        "size": {"type": "number", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA | {"x-guidance": {"whitespace_pattern": " ?"}}}]})
SAMPLINGS = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2},
    "min_tokens": {"min_tokens": 40, "logit_bias": ((98, 4.0), (7, -2.0))},
    "nucleus": {"top_p": 0.8, "top_k": 50, "min_p": 0.01, "temperature": 1.4},
    "greedy": {"temperature": 0.0},
}

# Who has these has no drafts.
BAD_WORDS = {"bad_words": (*((token,) for token in range(1000, 1200)), (600, 601)), "logprobs": 1}


def logits(ids: list[int]) -> np.ndarray:
    seed = zlib.crc32(np.array(ids, np.int64).tobytes())
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 2).astype(np.float32)


class Guesser:
    """Drafts of a log that is known; one of seven is another token."""

    def pass_s(self, requests: int) -> float:
        return 0.0

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def propose(self, requests: Sequence[Request], count: int, within_s: float) -> list[list[int]]:
        found = []
        for request in requests:
            at = len(request.output)
            right = self.tokens[at : at + count]
            found.append([token ^ 1 if (at + i) % 7 == 3 else token for i, token in enumerate(right)])
        return found

    def forget(self, rid: int) -> None:
        pass


@dataclass
class World:
    """One pipeline of one stage, and the gateway's log of one request."""

    compiler: Compiler
    message: Submit
    log: list[Token] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    epoch: int = 1
    reference: list[Token] | None = None  # drafts are of these, with an error now and then

    def __post_init__(self) -> None:
        self.steps: list[StepMeta] = []
        self.grammars: Grammars | None = None
        self.fresh_stage()
        self.limits = LIMITS
        self.proposer = None
        if self.reference is not None:
            self.limits = replace(LIMITS, speculation="ngram", max_draft_tokens=5)
            self.proposer = Guesser([token.token for token in self.reference])
        self.scheduler = Scheduler("p0", 1, 1, self.limits, takeover=False, now=0.0, proposer=self.proposer)
        self.perform(self.scheduler.step(CapacityChanged(256, 1), 0.0))

    def fresh_stage(self) -> None:
        if self.grammars is not None:
            self.grammars.close()
        self.grammars = Grammars(self.compiler)
        store = KvStore(256, BLOCK, 16, 128)
        self.stage = Stage("p0", 0, 1, self.epoch, store, SamplingTable(16, VOCAB), self.grammars)

    def kill_stage(self) -> None:
        """What served is gone, compiled grammars included; the scheduler lives."""
        self.epoch += 1
        self.fresh_stage()
        self.perform(self.scheduler.step(EpochBegan(self.epoch, planned=False), 0.0))

    def kill_both(self) -> None:
        self.epoch += 1
        self.fresh_stage()
        self.scheduler = Scheduler(
            "p0", self.epoch, 1, self.limits, takeover=True, now=0.0, proposer=self.proposer
        )
        self.perform(self.scheduler.step(CapacityChanged(256, 1), 0.0))
        self.perform(self.scheduler.start(0.0))
        m, emitted = self.message, tuple(token.token for token in self.log)
        again = Submit(m.rid, m.pipeline, m.prompt, m.sampling, emitted, 0, True)
        self.perform(self.scheduler.step(Submitted(again, 1), 0.0))

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
                        if token.position == len(self.log):
                            self.log.append(token)
                case Refuse(_, refused):
                    self.refused.append(refused.message)

    def turn(self) -> None:
        """Run what is to be run, or wait for the grammar."""
        if not self.steps:
            deadline = time.monotonic() + LIMIT_S
            while not (rids := self.stage.rules.answers()):
                assert time.monotonic() < deadline, "nothing is ever to be done"
                time.sleep(0.0005)
            self.perform(self.scheduler.step(ReadyMeta("p0", self.stage.fence, tuple(rids)), 0.0))
            return
        meta = self.steps.pop(0)
        if self.stage.stale(meta.fence):
            return
        prepared = self.stage.prepare(meta)
        assert isinstance(prepared, Prepared), prepared
        if not meta.rows:
            return
        ids = [*self.message.prompt, *(token.token for token in self.log)]
        rows = []
        for row, depth in enumerate(prepared.rows.depths.tolist()):
            drafts = prepared.drafts[row - depth + 1 : row + 1].tolist() if depth else []
            rows.append(logits([*ids, *drafts]))
        rows = np.array(rows, np.float32).reshape(-1, VOCAB)
        drawn = self.stage.draw(prepared, rows) if len(rows) else None
        self.stage.commit(prepared, drawn.tokens if drawn is not None else None)
        if drawn is None:
            result = ResultMeta("p0", meta.fence, meta.step, b"")
        else:
            details = tuple(Detail(row, value, drawn.top[row]) for row, value in drawn.logprobs.items())
            tokens = pack_tokens(drawn.tokens.tolist())
            result = ResultMeta("p0", meta.fence, meta.step, tokens, details, drawn.waiting, drawn.failed)
            self.stage.rules.ask([int(prepared.rows.sample_rids[row]) for row in drawn.waiting])
        self.perform(self.scheduler.step(result, 0.0))

    def run(self, kills: dict[int, str]) -> list[Token]:
        """`kills`: number of tokens in the log -> who dies then."""
        kills = dict(kills)
        self.perform(self.scheduler.step(Submitted(self.message, 1), 0.0))
        while not self.refused and not (self.log and self.log[-1].finish):
            if (who := kills.pop(len(self.log), None)) is not None:
                (self.kill_stage if who == "stage" else self.kill_both)()
            self.turn()
        return self.log


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return load_compiler(model_dir(), VOCAB, ENDS)


def message(seed: int, **fields: object) -> Submit:
    sampling = {"max_tokens": 300, "seed": seed, "grammar": GRAMMAR, "stop_token_ids": ENDS, **fields}
    return Submit(7, "p0", (0, 400, 500, 600, 700), Sampling(**sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*SAMPLINGS, "bad_words"])
def test_a_kill_at_any_token_changes_nothing(compiler: Compiler, name: str) -> None:
    wanted = message(11, **SAMPLINGS.get(name, BAD_WORDS))
    reference = World(compiler, wanted).run({})
    assert reference[-1].finish is FinishReason.STOP
    text = Tokenizer.from_file(str(model_dir() / "tokenizer.json")).decode([t.token for t in reference[:-1]])
    jsonschema_rs.validate(SCHEMA, json.loads(text))
    for at in range(len(reference)):
        world = World(compiler, wanted)
        assert world.run({at: "stage" if at % 2 else "both"}) == reference, f"killed at token {at}"
        assert world.scheduler.fence.epoch == 2
    storm = {at: "stage" if at % 3 else "both" for at in range(len(reference))}
    assert World(compiler, wanted).run(storm) == reference, "killed at each token"


@pytest.mark.parametrize("name", SAMPLINGS)
def test_drafts_change_nothing(compiler: Compiler, name: str) -> None:
    """Masks behind drafts are those of the log that they would make, and nothing of wrong ones stays."""
    wanted = message(11, **SAMPLINGS[name])
    reference = World(compiler, wanted).run({})
    world = World(compiler, wanted, reference=reference)
    assert world.run({}) == reference
    stats = world.scheduler.stats
    assert stats.spec_decode_num_accepted_tokens > len(reference) / 3
    assert stats.spec_decode_num_draft_tokens > stats.spec_decode_num_accepted_tokens
    for at in range(0, len(reference), 7):
        world = World(compiler, wanted, reference=reference)
        assert world.run({at: "stage" if at % 2 else "both"}) == reference, f"killed at token {at}"


def texts(compiler: Compiler, seeds: range, **fields: object) -> Iterator[tuple[str, Token]]:
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    for seed in seeds:
        log = World(compiler, message(seed, **fields)).run({})
        yield tokenizer.decode([token.token for token in log if token.token not in ENDS]), log[-1]


def test_what_ends_with_stop_parses_and_what_is_cut_says_so(compiler: Compiler) -> None:
    ends = []
    for text, last in texts(compiler, range(40), max_tokens=60):
        ends.append(last.finish)
        if last.finish is FinishReason.STOP:
            jsonschema_rs.validate(SCHEMA, json.loads(text))
        else:
            assert last.position == 59
    assert set(ends) == {FinishReason.STOP, FinishReason.LENGTH}


def test_min_tokens_puts_the_end_off_as_long_as_the_grammar_goes_on(compiler: Compiler) -> None:
    fields = {"min_tokens": 20, "grammar": "start: /a{3,}/"}
    lengths = [len(text) for text, _ in texts(compiler, range(8), **fields)]
    assert min(lengths) >= 20
    ends = {
        (text, last.finish) for text, last in texts(compiler, range(8), min_tokens=20, grammar='start: "yes"')
    }
    assert ends == {("yes", FinishReason.STOP)}


def test_a_grammar_that_fails_ends_the_request_with_the_reason(compiler: Compiler) -> None:
    world = World(compiler, message(1, grammar="start: nothing"))
    assert world.run({}) == []
    assert len(world.refused) == 1
    assert 'unknown name: "nothing"' in world.refused[0]
    assert world.stage.fence == Fence(1)
