"""One forward pass for steps of one or several pipelines, and what each of them gets of it.

A node that serves the same stage of several pipelines reads its weights once for all of them. A row's numbers do not
depend on the rows beside it, so nobody can tell from them who was in the pass."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dataplane._fast.blocktable import Rows, StepArrays
from dataplane.core.finite import nonfinite_rows
from dataplane.core.messages import PromptScores
from dataplane.core.pace import Pace, Progress, Standstill
from dataplane.core.stage import Batch, Part, Prepared, Stage, join
from dataplane.devices import EmulatedDevice
from dataplane.inbox import Message
from dataplane.model.sampler import Drawn
from dataplane.transport.frames import Buffer

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor
    from dataplane.oracle import OracleExecutor

INLINE_S = 0.02  # a computation that is over by then is not worth a thread


@dataclass(frozen=True, slots=True)
class Work:
    """A pipeline's step, with the blocks and the inputs that it needs."""

    stage: Stage
    step: Prepared
    message: Message


@dataclass(frozen=True, slots=True)
class Computed:
    """What a pass brought for one step."""

    output: Buffer = b""  # activations; of the last stage none
    drawn: Drawn | None = None  # on the last stage, if a row sampled
    poisoned: tuple[int, ...] = ()  # requests whose numbers are not finite after this stage
    scores: tuple[PromptScores, ...] = ()  # on the last stage, of requests that asked for their prompts'


class Compute:
    """The device of a node, one pass at a time."""

    def __init__(self, executor: StageExecutor | OracleExecutor) -> None:
        self.pace = Pace()
        self.total_s = 0.0
        self.busy: tuple[float, int] | None = None  # since when a pass computes, and its tokens
        self._executor = executor
        self._device = EmulatedDevice()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._standstill = Standstill()
        self._passes = 0
        self._under_way = False  # a pass is computed, or waits for its thread
        self._thread: int | None = None  # that computes it
        self._last = (1, 1.0)  # tokens of the last pass, and the seconds that it took
        self._ran: StepArrays | None = None  # what it computed, until `account`

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def inline(self, tokens: int) -> bool:
        """Whether a pass runs on the loop, as it is over soon: a thread costs two switches and waits for the
        interpreter, more than all the rest of a step. What may take long has a thread, for heartbeats must go out."""
        tokens_last, took = self._last
        return not self._executor.may_wait and took * max(1.0, tokens / tokens_last) < INLINE_S

    @property
    def still_s(self) -> float | None:
        """How long the computation under way has not advanced, by `look`; None: this device does not say."""
        return None if self._executor.beats() is None else self._standstill.still_s

    def look(self, now: float) -> None:
        """Called every tick: whether the computation under way advances."""
        beats, thread = self._executor.beats(), self._thread
        progress = None
        if self._under_way and beats is not None:
            spent_s = 0.0 if thread is None else time.clock_gettime(time.pthread_getcpuclockid(thread))
            progress = Progress(self._passes, beats, spent_s)
        self._standstill.look(now, progress)

    async def run(self, works: Sequence[Work], not_before: float = 0.0) -> list[Computed]:
        """One pass for steps of one stage index that have rows, of different pipelines; a result for each. The caller
        sends what came of it and then calls `account`. `not_before`: an emulated device stood idle until then."""
        batch = join([work.step for work in works], works[0].stage.store.table)
        tokens = batch.arrays.num_tokens
        self.busy = (time.monotonic(), tokens)
        self._passes += 1
        if self.inline(tokens):
            computed = self._pass(works, batch)
        else:
            self._under_way, self._thread = True, None
            try:
                loop = asyncio.get_running_loop()
                computed = await loop.run_in_executor(self._pool, self._pass, works, batch)
            finally:
                self._under_way = False
        if self._executor.step_s > 0:
            came = max(not_before, *(work.message.came for work in works))
            await self._device.run(came, self.busy[0], self._executor.step_s)
        self.busy = None
        self._ran = batch.arrays
        return computed

    def account(self) -> None:
        """Counts the last pass, if it is not counted yet. Not in `run`: the next stage waits for what it returns."""
        if self._ran is not None:
            self.pace.ran(self._ran.num_tokens, int(self._ran.context_lens.sum()), self._last[1])
            self._ran = None

    def _pass(self, works: Sequence[Work], batch: Batch) -> list[Computed]:
        started = time.monotonic()
        self._thread = threading.get_ident()
        tokens, hidden = inputs(works, batch, self._executor.adopt)
        output = self._executor.forward(tokens, hidden, batch.arrays, batch.logit_rows)
        computed = [self._share(work, part, output) for work, part in zip(works, batch.parts, strict=True)]
        took = time.monotonic() - started
        self.total_s += took
        self._last = (batch.arrays.num_tokens, took)
        return computed

    def _share(self, work: Work, part: Part, output: npt.NDArray[np.generic]) -> Computed:
        """One step's part of what a pass brought; on the last stage its next tokens.

        Poisoned is what is not finite here. What came was: who sees otherwise sends nothing on."""
        rows = work.step.rows
        if work.stage.sampling is not None:
            drawn: Drawn | None = None
            bad: tuple[int, ...] = ()
            scores: tuple[PromptScores, ...] = ()
            if work.step.scored is not None:
                logits = output[part.scores].astype(np.float32, copy=False)
                scores, bad = work.stage.score(work.step.scored, logits)
            if len(work.step.slots):
                logits = output[part.samples].astype(np.float32, copy=False)
                drawn = work.stage.draw(work.step, logits)
                bad = tuple(dict.fromkeys((*bad, *rows.sample_rids[list(drawn.poisoned)].tolist())))
            return Computed(b"", drawn, bad, scores)
        activations = output[part.tokens]
        poisoned: tuple[int, ...] = ()
        if self._executor.suspect and len(found := nonfinite_rows(activations)):
            poisoned = tuple(
                dict.fromkeys(np.repeat(rows.rids, rows.counts)[found[~drafted(rows)[found]]].tolist())
            )
        return Computed(activations.data, None, poisoned)


def drafted(rows: Rows) -> npt.NDArray[np.bool_]:
    """Which of a step's T tokens are drafts. Nobody is poisoned by one: it may be a token that is never drawn."""
    ends = np.repeat(np.cumsum(rows.counts) - rows.drafts, rows.counts)
    return np.arange(len(ends)) >= ends


def inputs(
    works: Sequence[Work], batch: Batch, adopt: Callable[[Buffer, int], Buffer]
) -> tuple[npt.NDArray[np.int64] | None, Buffer | None]:
    """Tokens for a first stage, else activations, of all steps behind one another. Those of a stage with another
    precision are `adopt`ed.

    Raises ValueError if one has not as many as it has tokens: the next one's would be taken for its own."""
    counts = [part.tokens.stop - part.tokens.start for part in batch.parts]
    if works[0].stage.index == 0:
        tokens = [work.message.tokens for work in works]
        if [len(some) for some in tokens] != counts:
            raise ValueError(f"steps of {counts} tokens came with {[len(some) for some in tokens]}")
        return np.array(tuple(chain.from_iterable(tokens)), np.int64), None
    payloads = [adopt(work.message.payload, count) for work, count in zip(works, counts, strict=True)]
    if len(payloads) == 1:
        return None, payloads[0]
    sizes = [memoryview(payload).nbytes for payload in payloads]
    if any(size * counts[0] != sizes[0] * count for size, count in zip(sizes, counts, strict=True)):
        raise ValueError(f"steps of {counts} tokens came with activations of {sizes} bytes")
    return None, b"".join(payloads)
