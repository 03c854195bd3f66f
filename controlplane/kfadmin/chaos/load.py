"""The load of a game day: so many streams at any time, each compared token by token with an undisturbed run."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import httpx
import msgspec

from controlplane.contract.errors import KevlarFlowError
from controlplane.kfadmin.chaos.gameday import Course
from controlplane.kfadmin.chaos.judge import Pauses, parts_at, silence_s
from controlplane.kfadmin.loadgen import LoadGenerator, Prompt, Stream, StreamFailed

FAILED_PAUSE_S = 0.5  # after a stream that failed: a gateway that refuses is not asked in a tight loop


class Outcome(msgspec.Struct, frozen=True):
    """One stream that has ended. `began_s`: seconds after the load began."""

    number: int
    seed: int  # of its request: with it the stream can be had again
    began_s: float
    lasted_s: float
    tokens: int
    equal: bool
    resumes: int  # connections after the first one
    pause_max_s: float
    error: str = ""


class Load:
    """`told` hears of each stream that suffers, once, in words."""

    def __init__(
        self,
        generator: LoadGenerator,
        prompts: Sequence[Prompt],
        pause_max_s: float,
        told: Callable[[str], None],
    ) -> None:
        self._generator = generator
        self._prompts = prompts
        self._pause_max_s = pause_max_s
        self._told = told
        self._references: dict[Prompt, Stream] = {}
        self._live: dict[int, Stream] = {}
        self._suffering: set[int] = set()
        self._stopping = False
        self.outcomes: list[Outcome] = []
        self.pauses = Pauses()
        self.began = 0.0

    async def learn(self) -> None:
        """Run each prompt once, undisturbed. Raises KevlarFlowError."""
        for stream in await self._generator.streams(self._prompts):
            if stream.error:
                raise KevlarFlowError(f"an undisturbed stream failed: {stream.error}")
            self._references[stream.prompt] = stream

    async def run(self, courses: Iterable[Course]) -> None:
        """Streams, one after another for each prompt, until `stop`; those that run then come to their ends."""
        self.began = time.monotonic()
        numbers = itertools.count(1)
        async with self._generator.client() as client, asyncio.TaskGroup() as group:
            for prompt in self._prompts:
                group.create_task(self._worker(client, prompt, numbers, courses))

    def stop(self) -> None:
        self._stopping = True

    def look(self, now: float) -> None:
        """Tell of streams that have been silent for too long."""
        for number, stream in self._live.items():
            if (silent_s := silence_s(stream, now)) > self._pause_max_s:
                self._suffers(
                    number, f"has had no token for {silent_s:.1f} s, {self._pause_max_s:g} s are the limit"
                )

    async def _worker(
        self, client: httpx.AsyncClient, prompt: Prompt, numbers: Iterable[int], courses: Iterable[Course]
    ) -> None:
        for number in numbers:
            if self._stopping:
                return
            if not await self._one(client, prompt, number, courses) and not self._stopping:
                await asyncio.sleep(FAILED_PAUSE_S)

    async def _one(
        self, client: httpx.AsyncClient, prompt: Prompt, number: int, courses: Iterable[Course]
    ) -> bool:
        """Whether it ended as its reference did."""
        stream = self._live[number] = Stream(prompt)
        wanted, checked = self._references[prompt], 0

        def compare(fresh: Stream) -> None:
            nonlocal checked
            at = parts_at(fresh.tokens, wanted.tokens, checked)
            checked = len(fresh.tokens)
            if at is not None:
                self._suffers(number, f"differs from its reference at token {at}")

        error = ""
        try:
            await self._generator.stream(client, prompt, stream, compare)
        except StreamFailed as failed:
            error = str(failed)
        finally:
            del self._live[number]
        error = error or stream.error
        equal = stream.same_as(wanted)
        if error:
            self._suffers(number, f"ended with an error: {error}")
        elif not equal:
            self._suffers(number, "ended otherwise than its reference")
        longest_s = self.pauses.take(stream, courses, stream.ended)
        if longest_s > self._pause_max_s:
            self._suffers(number, f"paused for {longest_s:.1f} s, {self._pause_max_s:g} s are the limit")
        ended = Outcome(
            number, prompt.seed, round(stream.sent - self.began, 3), round(stream.ended - stream.sent, 3),
            len(stream.tokens), equal, stream.resumes, round(longest_s, 4), error,
        )  # fmt: skip
        self.outcomes.append(ended)
        return equal and not error

    def _suffers(self, number: int, why: str) -> None:
        if number not in self._suffering:
            self._suffering.add(number)
            self._told(f"stream {number} {why}")
