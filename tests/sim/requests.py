"""What clients ask for, what they should get, and what they got."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from controlplane.contract.requests import FinishReason, Sampling
from dataplane._fast.blocktable import BlockTable
from dataplane.model.sampler import SamplingTable
from tests.sim.parts import BLOCK, CONTEXT, VOCAB, make_executor
from tests.sim.world import World
from web.gateway.routing.events import Deliver, Fail, FailCode

TEMPLATES = 40
# Errors that a storm may end a request with. The others mean that the engine or the gateway is wrong.
LAWFUL = (FailCode.UNAVAILABLE, FailCode.OVERLOADED, FailCode.QUARANTINED)


@dataclass(frozen=True)
class Template:
    prompt: tuple[int, ...]
    sampling: Sampling


@functools.cache
def template(number: int) -> Template:
    """One of a fixed set of requests, so that what the model says to each is computed once a process."""
    chance = random.Random(number)
    prompt = tuple(chance.randrange(VOCAB) for _ in range(chance.choice((1, 3, 5, 8, 13, 21))))
    if number % 3 == 0:  # they begin alike
        prompt = tuple(range(number % 2, 9 + number % 2)) + prompt
    hot = chance.random() < 0.5
    return Template(
        prompt,
        Sampling(
            max_tokens=chance.choice((1, 2, 4, 8, 16, 28)),
            seed=chance.getrandbits(32),
            # The oracle's logits have one peak: at this temperature others win as well.
            temperature=chance.choice((3.0, 4.0)) if hot else 0.0,
            top_k=chance.choice((0, 20)) if hot else 0,
            repetition_penalty=chance.choice((1.0, 1.0, 1.3)),
            presence_penalty=chance.choice((0.0, 0.0, 0.5)),
            stop_token_ids=tuple(chance.randrange(VOCAB) for _ in range(8)),
            min_tokens=chance.choice((0, 0, 4)),
            prompt_logprobs=chance.choice((None, None, 0, 2)),
            bad_words=tuple((chance.randrange(VOCAB),) for _ in range(chance.choice((0, 0, VOCAB // 8)))),
        ),
    )


LONG = tuple(n for n in range(TEMPLATES) if template(n).sampling.max_tokens >= 16)


@functools.cache
def expected(number: int, stages: int) -> tuple[tuple[int, ...], FinishReason, bytes | None]:
    """The stream that never fails, and its prompt's log probabilities: the same model on one node, one request, one
    token at a time."""
    asked = template(number)
    blocks = -(-CONTEXT // BLOCK)
    executors = [make_executor(stage, stages, blocks) for stage in range(stages)]
    table = BlockTable(1, blocks, BLOCK)
    row = np.array([table.new_row()], np.int32)
    free = list(range(blocks))
    sampler = SamplingTable(1, VOCAB)
    slot = np.array([sampler.admit(asked.sampling, asked.prompt)], np.int32)
    log, output = list(asked.prompt), []
    rows = np.empty((len(log) - 1, VOCAB), np.float32)  # of the prompt, by which its next token is scored
    top, scores = asked.sampling.prompt_logprobs, None
    for position in range(CONTEXT):
        start, count = np.array([position], np.int32), np.ones(1, np.int32)
        assert table.grow(row, start, count, free) == 0
        arrays = table.fill(row, start, count)
        data: Any = None
        for stage, executor in enumerate(executors):
            tokens = np.array([log[position]], np.int64) if stage == 0 else None
            data = executor.forward(tokens, data, arrays, np.zeros(1, np.int32))
        table.commit(row, start, count)
        if position + 1 < len(log):
            rows[position] = data
            continue
        if top is not None and not output:
            scores = sampler.score(rows, np.array(log[1:], np.int32), top).records(slice(0, len(rows)), top)
        token = int(sampler.sample(data, slot).tokens[0])
        sampler.append_many(slot, np.array([token], np.int64))
        log.append(token)
        output.append(token)
        if token in asked.sampling.stop_token_ids and len(output) > asked.sampling.min_tokens:
            return tuple(output), FinishReason.STOP, scores
        if len(output) >= asked.sampling.max_tokens:
            return tuple(output), FinishReason.LENGTH, scores
    raise AssertionError("no template fills the context")


@dataclass
class Stream:
    """One client. It takes what the gateway gives it, in the place of a DeliveryQueue."""

    world: World
    number: int  # of its template
    stages: int
    gateway: str
    begun_at: float
    rid: int = 0
    received: list[int] = field(default_factory=list)
    ended: str = ""  # "stop", "length", an error's code, "cancelled" or "gateway lost"
    ended_at: float = 0.0

    @property
    def well(self) -> bool:
        return self.ended in ("stop", "length", "cancelled")

    def put(self, item: Any) -> None:
        _, what = item
        if self.ended in ("cancelled", "gateway lost"):
            return
        match what:
            case Deliver():
                for token in what.tokens:
                    self._take(token)
            case Fail(_, code, message):
                self._end(code.value)
                if code not in LAWFUL:
                    self.world.fail(f"request {self.rid} ended with {code.value}: {message}")
            case _:
                raise TypeError(what)

    def close(self, how: str) -> None:
        if not self.ended:
            self._end(how)

    def _take(self, token: Any) -> None:
        right, finish, scores = expected(self.number, self.stages)
        position = len(self.received)
        name = f"stream {self.rid} (template {self.number})"
        if self.ended:
            self.world.fail(f"{name}: position {token.position} after its end")
        elif token.position != position:
            self.world.fail(f"{name}: position {token.position} in the place of {position}")
        elif position >= len(right) or token.token != right[position]:
            wanted = right[position] if position < len(right) else "its end"
            self.world.fail(f"{name}: token {token.token} at position {position} instead of {wanted}")
        elif token.prompt_scores != (scores if position == 0 else None):
            self.world.fail(f"{name}: other log probabilities of the prompt with position {position}")
        elif token.finish is not None and (position + 1 != len(right) or token.finish is not finish):
            self.world.fail(f"{name}: finish {token.finish} at position {position}")
        self.received.append(token.token)
        if token.finish is not None:
            self._end(token.finish.value)

    def _end(self, how: str) -> None:
        if self.ended:
            self.world.fail(f"request {self.rid} ended twice: {self.ended}, then {how}")
        self.ended, self.ended_at = how, self.world.now
