"""`python -m tests.features.schemas [COUNT]`: documents of random JSON schemas at temperature 1.

From the body of a chat to its answer, by the demo model, which was taught no JSON. None of those that end may be
invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jsonschema_rs
import structlog

import dataplane.demo
from dataplane.core.batching import Limits
from dataplane.executor import StageExecutor
from tests.features.gateway import Client
from tests.features.line import BLOCK, Line, Parts
from tests.features.play import Player
from tests.features.requests import Asked
from tests.random_schemas import random_schema
from tests.web.gateway.stack import MODEL

COUNT = 1000
TOGETHER, TOKENS, CONTEXT = 32, 700, 768
VOCAB = 2048
BATCH_LIMIT_S = 600.0


@dataclass
class Documents:
    """`invalid`: what was wrong with each document, by the number of its schema."""

    asked: int = 0
    whole: int = 0
    cut: int = 0
    invalid: dict[int, str] = field(default_factory=dict)

    def add(self, number: int, answer: object) -> None:
        self.asked += 1
        if isinstance(answer, BaseException):
            self.invalid[number] = f"{type(answer).__name__}: {answer}"
            return
        assert isinstance(answer, dict)
        (choice,) = answer["choices"].values()
        if choice["finish_reason"] == "length":
            self.cut += 1
            return
        self.whole += 1
        try:
            document = json.loads(choice["delta"]["content"])
            jsonschema_rs.validator_for(schema_of(number), validate_formats=True).validate(document)
        except (ValueError, jsonschema_rs.ValidationError) as error:
            self.invalid[number] = f"{str(error).splitlines()[0]}: {choice['delta']['content'][:300]}"


def schema_of(number: int) -> dict[str, object]:
    return random_schema(random.Random(number))


def write(numbers: Sequence[int], into: Documents, tokens: int = TOKENS) -> None:
    """Documents of these schemas, all at once."""
    with Player() as player:
        blocks = TOGETHER * CONTEXT // BLOCK
        made = StageExecutor(
            dataplane.demo.model_dir(), 0, 1, num_blocks=blocks, block_size=BLOCK, context_max=CONTEXT
        )
        parts = Parts([(made, made)], player.compiler, player.model, None, player.metrics, CONTEXT, blocks)
        for first in range(0, len(numbers), TOGETHER):
            some = numbers[first : first + TOGETHER]
            for number, answer in zip(some, asyncio.run(_answers(parts, some, tokens)), strict=True):
                into.add(number, answer)
            print(
                f"{into.asked} schemas: {into.whole} whole, {into.cut} cut, {len(into.invalid)} invalid",
                flush=True,
            )


async def _answers(parts: Parts, numbers: Sequence[int], tokens: int) -> list[object]:
    limits = Limits(BLOCK, 1024, TOGETHER, TOGETHER, CONTEXT, 30.0, VOCAB, step_target_s=10.0)
    line = Line(parts, limits, copies=False, free_drafts=False)
    async with line, asyncio.timeout(BATCH_LIMIT_S):
        clients = [Client(line, _asked(number, tokens), str(number)) for number in numbers]
        ended = await asyncio.gather(*(client.run() for client in clients), return_exceptions=True)
        line.check()
        return [end if isinstance(end, BaseException) else end.answer for end in ended]


def _asked(number: int, tokens: int) -> Asked:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "The old house"}],
        "enable_thinking": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema_of(number)}},
        "temperature": 1.0,
        "seed": number,
        "max_tokens": tokens,
        "stream": True,
    }
    return Asked(f"schema {number}", "chat/completions", body)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.features.schemas", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=COUNT)
    parser.add_argument("--first", type=int, default=0, help="number of the first schema")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    documents, began = Documents(), time.monotonic()
    write(range(given.first, given.first + given.count), documents)
    for number, why in documents.invalid.items():
        print(f"schema {number}: {why}")
    print(f"{documents.whole} documents, {len(documents.invalid)} invalid; {documents.cut} cut at {TOKENS} tokens; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if documents.invalid else 0


if __name__ == "__main__":
    sys.exit(main())
