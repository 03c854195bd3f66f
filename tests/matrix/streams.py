"""The clients of a cell, and what their streams brought."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import msgspec

from controlplane.kfadmin.loadgen import LoadGenerator, Prompt, Stream, StreamFailed
from tests.e2e.cluster import difference, until
from tests.matrix.cells import Phase

CLIENTS = 8


class Result(msgspec.Struct):
    """What was measured in one cell. Seconds; tokens over all streams of the cell."""

    cell: str
    streams: int = 0
    tokens: int = 0
    lost: int = 0
    duplicated: int = 0
    different: int = 0
    resumed: int = 0  # times that a client went to another gateway
    longest_pause_s: float | None = None  # of any stream, from the fault on
    home_s: float | None = None  # from the end of the fault until every node serves at home
    ended: list[str] = []  # pipelines whose epoch did, from the fault on
    seconds: float = 0.0  # that the cell took
    load: float = 0.0  # average of the machine at its end, over a minute
    problems: list[str] = []


def judge(result: Result, streams: Sequence[Stream], references: Mapping[Prompt, Stream]) -> None:
    """Compare every stream with its undisturbed run."""
    for stream in streams:
        want = references[stream.prompt]
        result.streams += 1
        result.tokens += len(stream.tokens)
        result.resumed += stream.resumes
        result.lost += max(0, len(want.tokens) - len(stream.tokens))
        result.duplicated += max(0, len(stream.tokens) - len(want.tokens))
        result.different += sum(a != b for a, b in zip(stream.tokens, want.tokens, strict=False))
        if stream.error:
            result.problems.append(f"seed {stream.prompt.seed} ended with the error {stream.error!r}")
        elif stream.tokens != want.tokens:
            result.problems.append(f"seed {stream.prompt.seed}: {difference(stream.tokens, want.tokens)}")
        elif not stream.same_as(want):
            result.problems.append(f"seed {stream.prompt.seed}: another answer with the same tokens")


class Load:
    """Clients that ask for stream after stream until `over`; half of them begin at each gateway."""

    def __init__(self, generator: LoadGenerator, prompts: Sequence[Prompt]) -> None:
        self.over = asyncio.Event()
        self.streams: list[Stream] = []
        self.failures: list[str] = []
        self._prompts = prompts
        urls = (generator.url, *generator.others)
        self._generators = [
            dataclasses.replace(generator, url=urls[k], others=urls[k + 1 :] + urls[:k])
            for k in range(len(urls))
        ]

    async def run(self) -> None:
        if not self._prompts:
            return
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        generator = self._generators[number % len(self._generators)]
        start = number * len(self._prompts) // CLIENTS
        async with generator.client() as client:
            for prompt in itertools.cycle([*self._prompts[start:], *self._prompts[:start]]):
                stream = Stream(prompt)
                self.streams.append(stream)
                try:
                    await generator.stream(client, prompt, stream)
                except StreamFailed as error:
                    self.failures.append(f"seed {prompt.seed}: {error}")
                    return
                if self.over.is_set():
                    return

    async def flows(self, phase: Phase) -> None:
        """Until the load is what the phase needs."""
        if phase is Phase.PREFILLING:
            await until(
                lambda: len(self.streams) == CLIENTS and all(s.sent for s in self.streams), "all are sent"
            )
        elif phase is not Phase.IDLE:
            await until(lambda: sum(len(s.tokens) for s in self.streams) >= 20 * CLIENTS, "tokens flow")
