"""Steps of one pipeline between their launch and their result."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlplane.contract.ids import PipelineId
from dataplane.core.account import Account
from dataplane.core.batching import Chunk
from dataplane.core.events import RunStep
from dataplane.core.messages import Admit, Begin, Fence, Place, Row, StepMeta, pack_rows
from dataplane.core.request import Request, pack_tokens

ROUNDS_KEPT = 64  # steps whose times tell what is usual


NO_DRAFTS: Mapping[int, Sequence[int]] = {}


@dataclass(slots=True)
class InFlight:
    # Request, which attempt of it, how many tokens are sampled behind its last ones.
    rows: list[tuple[Request, int, int]]
    since: float
    decodes: int  # rows that are one token after the last, and drafts
    prompt_tokens: int  # all others
    beside_chunk: bool = False  # another step in flight meanwhile had tokens of prompts

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt_tokens

    @property
    def sampled(self) -> list[tuple[Request, int, int]]:
        return [row for row in self.rows if row[2]]


class Steps:
    def __init__(self, pipeline: PipelineId) -> None:
        self.in_flight: dict[int, InFlight] = {}
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
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
        places: tuple[Place, ...] = (),
    ) -> RunStep:
        """The next step, of these rows; they count as issued from here on, and the blocks that they fill as sealed:
        what comes later is computed later. `frees`: requests that stages release with it; `drops`: see StepMeta.
        `drafts`: by request, what may come after its row's last token. Its blocks are there. `places`: see StepMeta."""
        metas: list[Row] = []
        admits: list[Admit] = []
        begins: list[Begin] = []
        seals: list[bytes] = []
        tokens: list[int] = []
        drafted: list[int] = []
        flying: list[tuple[Request, int, int]] = []
        decodes = 0
        for request, count in rows:
            if not request.announced:
                admits.append(request.admit())
                begins.append(request.begin())
                request.announced = True
            start = request.issued
            end = request.issued = start + count
            size = request.hasher.block_size
            settled, request.settled = min(request.settled, start), end
            # With what were drafts before and are tokens now.
            for index in range(settled // size, end // size):
                name = request.names[index]
                account.seal(request.rid, index, name)
                seals.append(name)
            samples = int(end == len(request.ids))
            decodes += count == 1 and samples and bool(request.output)
            tokens.extend(request.ids[start:end])
            if more := drafts.get(request.rid) if samples else None:
                tokens.extend(more)
                drafted.extend(more)
                count += len(more)
                samples += len(more)
            metas.append((request.rid, start, count, samples))
            flying.append((request, request.attempt, samples))
        decodes += len(drafted)
        step, self._next = self._next, self._next + 1
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
            pack_tokens(drafted),
            places,
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

    def oldest(self, now: float) -> float:
        """When the one that has been waited for longest was launched; `now` if there is none."""
        return min((flight.since for flight in self.in_flight.values()), default=now)

    @property
    def rows_max(self) -> int:
        """Of the largest one."""
        return max((flight.tokens for flight in self.in_flight.values()), default=0)

    @property
    def round_s(self) -> float:
        """The longest that one of the last steps took, from stage 0 to its result."""
        return max(self._rounds, default=0.0)
