"""When a step waits for one of another pipeline, so that one pass over the weights serves both.

A node that serves two pipelines may get more steps than it can compute one by one. Who finds the other pipeline's step
waiting takes it along anyhow (`inbox.company`), but two pipelines keep the distance in which they happen to come: as
likely as not the other one's step is there half a pass too late. A step that waits for it leaves together with it, both
come back together, and after a few passes hardly anybody waits any more.

Chunks of a long prompt come one pass behind each other, so whatever waits when one of them is done would go first, and
hold up all chunks behind it by a whole pass. It waits for the next one instead, which is just about to come.
"""

from __future__ import annotations

from collections import deque

from controlplane.contract.ids import PipelineId

STEPS = 16  # that are looked back at: the microbatches of two pipelines, twice over
# Passes that a step waits at most: where steps are that many, the next ones come sooner than that.
PATIENCE = 1.5
WORTH = 1.5  # a pass for two that takes longer than so many for one saves too little to wait for
WEIGHT = 0.2  # of the newest pass in the averages
CLOSE = 0.5  # passes after a chunk until which one waits for the next


class Rhythm:
    """What a node's steps have been like lately. `now`: seconds of one clock."""

    def __init__(self) -> None:
        self._came: deque[tuple[PipelineId, float]] = deque(maxlen=STEPS)
        self._alone_s = 0.0  # how long a pass takes with one step
        self._shared_s = 0.0  # with several; 0: there was none
        self._next: tuple[PipelineId, int, float] | None = None  # chunk to come: its tokens, and until when

    def came(self, pipeline: PipelineId, now: float) -> None:
        """A step that has something to compute has its turn."""
        self._came.append((pipeline, now))

    def ran(self, steps: int, took_s: float) -> None:
        """A pass for so many steps is done."""
        if steps == 1:
            self._alone_s += (took_s - self._alone_s) * (WEIGHT if self._alone_s else 1.0)
        else:
            self._shared_s += (took_s - self._shared_s) * (WEIGHT if self._shared_s else 1.0)

    def goes_on(self, pipeline: PipelineId, tokens: int, now: float) -> None:
        """A pass has ended that had a chunk of a prompt, not the last: the next one will have about as many tokens."""
        self._next = (pipeline, tokens, now + CLOSE * self._alone_s)

    def chunk_s(self, pipeline: PipelineId, tokens_max: int, now: float) -> float:
        """How long a step of this pipeline, which has just come, waits for the next chunk of another one's prompt: not
        at all if together they have more than `tokens_max` tokens besides its own."""
        if self._next is None:
            return 0.0
        other, tokens, until = self._next
        return max(0.0, until - now) if other != pipeline and tokens <= tokens_max else 0.0

    def patience_s(self, pipeline: PipelineId, now: float) -> float:
        """How long a step of this pipeline, which has just come and found nobody, waits for another one's: not at all
        where the node keeps up without that, where nobody else comes, and where one pass for both saves little."""
        if len(self._came) < STEPS or all(other == pipeline for other, _ in self._came):
            return 0.0
        keeps_up = STEPS * self._alone_s < now - self._came[0][1]
        if keeps_up or self._shared_s > WORTH * self._alone_s:
            return 0.0
        return PATIENCE * self._alone_s
