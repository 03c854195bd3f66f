"""The time between tokens while others' prompts come: every stream is followed by another one with a prompt of its own.

At any time as many streams decode, or wait for their first token, as there are places. What counts is how long a reader
waits for the next token, p99 against the median: a chunk of somebody's prompt, or a whole one, is what holds it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from bench.frontdoor import FrontDoor
from controlplane.contract.requests import GatewayMessage

PLACES = 12  # streams at a time, over all pipelines
PROMPT_MIN, PROMPT_MAX = 20, 300  # tokens
TOKENS = 48
STREAMS = 3  # of each place
LIMIT_S = 300.0


@dataclass(slots=True)
class Gaps:
    """Seconds, unsorted."""

    between: list[float] = field(default_factory=list)  # a token and the next one of its stream
    first: list[float] = field(default_factory=list)  # a stream's question and its first token
    tokens_per_s: float = 0.0

    def quantile(self, share: float) -> float:
        """Of the times between tokens."""
        ordered = sorted(self.between)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(doors: Sequence[FrontDoor], vocab: int, places: int = PLACES, streams: int = STREAMS) -> Gaps:
    """The same prompts each time. Raises NotServed."""
    return asyncio.run(_measure(doors, vocab, places, streams))


async def _measure(doors: Sequence[FrontDoor], vocab: int, places: int, streams: int) -> Gaps:
    gaps = Gaps()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        for number, door in enumerate(doors):
            share = len(range(number, places, len(doors)))
            group.create_task(_one_door(door, random.Random(number), vocab, share, streams, gaps))
    gaps.tokens_per_s = places * streams * TOKENS / (loop.time() - begun)
    return gaps


async def _one_door(
    door: FrontDoor, numbers: random.Random, vocab: int, places: int, streams: int, gaps: Gaps
) -> None:
    waiting: asyncio.Queue[GatewayMessage] = asyncio.Queue()
    last: dict[int, float] = {}
    asked: dict[int, float] = {}
    left = places * streams
    clock = asyncio.get_running_loop().time

    def ask() -> None:
        length = numbers.randint(PROMPT_MIN, PROMPT_MAX)
        question = door.submit([numbers.randrange(3, vocab) for _ in range(length)], TOKENS)
        asked[question.rid] = clock()
        waiting.put_nowait(question)

    async def questions() -> AsyncIterator[GatewayMessage]:
        while True:
            yield await waiting.get()

    for _ in range(places):
        ask()
    begun = places
    async with contextlib.aclosing(door.answers(questions())) as answers:
        async for _, item in answers:
            now = clock()
            if item.rid in last:
                gaps.between.append(now - last[item.rid])
            else:
                gaps.first.append(now - asked[item.rid])
            last[item.rid] = now
            if item.finish is None:
                continue
            left -= 1
            if begun < places * streams:
                begun += 1
                ask()
            if not left:
                return
