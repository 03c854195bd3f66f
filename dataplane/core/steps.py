"""Steps of one pipeline between their launch and their result."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.contract.ids import PipelineId
from dataplane.core.account import Account
from dataplane.core.batching import Chunk
from dataplane.core.events import RunStep
from dataplane.core.messages import Admit, Begin, Fence, Row, StepMeta, pack_rows
from dataplane.core.request import Request

ROUNDS_KEPT = 64  # steps whose times tell what is usual


@dataclass(slots=True)
class InFlight:
    rows: list[tuple[Request, int, bool]]  # request, which attempt of it, whether it samples
    since: float
    decodes: int  # rows that are one token after the last
    prompt_tokens: int  # all others
    beside_chunk: bool = False  # another step in flight meanwhile had tokens of prompts

    @property
    def sampled(self) -> list[tuple[Request, int]]:
        return [(request, attempt) for request, attempt, samples in self.rows if samples]


class Steps:
    def __init__(self, pipeline: PipelineId) -> None:
        self.in_flight: dict[int, InFlight] = {}
        self.last_issued = -1  # in this fence
        self._pipeline = pipeline
        self._next = 0
        self._rounds: deque[float] = deque(maxlen=ROUNDS_KEPT)

    def __len__(self) -> int:
        return len(self.in_flight)

    def launch(
        self,
        fence: Fence,
        rows: Sequence[Chunk],
        frees: Sequence[int],
        drops: Sequence[int],
        account: Account,
        now: float,
    ) -> RunStep:
        """The next step, of these rows; they count as issued from here on, and the blocks that they fill as sealed:
        what comes later is computed later. `frees`: requests that stages release with it; `drops`: see StepMeta."""
        metas: list[Row] = []
        admits: list[Admit] = []
        begins: list[Begin] = []
        seals: list[bytes] = []
        tokens: list[int] = []
        flying: list[tuple[Request, int, bool]] = []
        decodes = 0
        for request, count in rows:
            if not request.announced:
                admits.append(request.admit())
                begins.append(request.begin())
                request.announced = True
            start = request.issued
            end = request.issued = start + count
            size = request.hasher.block_size
            for index in range(start // size, end // size):
                name = request.names[index]
                account.seal(request.rid, index, name)
                seals.append(name)
            sample = end == len(request.ids)
            decodes += count == 1 and sample and bool(request.output)
            metas.append((request.rid, start, count, sample))
            tokens.extend(request.ids[start:end])
            flying.append((request, request.attempt, sample))
        step, self._next = self._next, self._next + 1
        self.last_issued = step
        flight = InFlight(flying, now, decodes, len(tokens) - decodes)
        for other in self.in_flight.values():
            other.beside_chunk |= flight.prompt_tokens > 0
            flight.beside_chunk |= other.prompt_tokens > 0
        self.in_flight[step] = flight
        evicts, account.evictions = account.evictions, []
        meta = StepMeta(
            self._pipeline,
            fence,
            step,
            pack_rows(metas),
            tuple(admits),
            tuple(frees),
            tuple(begins),
            b"".join(evicts),
            b"".join(seals),
            tuple(drops),
        )
        return RunStep(meta, tuple(tokens))

    def land(self, step: int, now: float) -> InFlight | None:
        """Its result has come; None: nobody waits for it."""
        flight = self.in_flight.pop(step, None)
        if flight is not None:
            self._rounds.append(now - flight.since)
        return flight

    def void(self) -> None:
        """A new fence: no result of what is in flight counts any more."""
        self.in_flight.clear()
        self.last_issued = -1

    def oldest(self, now: float) -> float:
        """When the one that has been waited for longest was launched; `now` if there is none."""
        return min((flight.since for flight in self.in_flight.values()), default=now)

    @property
    def round_s(self) -> float:
        """The longest that one of the last steps took, from stage 0 to its result."""
        return max(self._rounds, default=0.0)
