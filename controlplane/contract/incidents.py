"""One row for each failure: what died, how long each phase took, what was chosen, and whose streams it touched."""

from __future__ import annotations

import msgspec

from controlplane.contract.events import EventKind
from controlplane.contract.ids import NodeId, PipelineId

# The events that tell of failures; others may be left out.
TOLD_BY = frozenset(
    {EventKind.DIED, EventKind.LEFT, EventKind.EPOCH, EventKind.RECOVERED, EventKind.UNAVAILABLE}
)


class Affected(msgspec.Struct, frozen=True):
    """What one failure did to one pipeline. Durations in seconds, each from the end of the phase before; None: that
    phase has not ended, or was taken over by a later failure's."""

    pipeline: PipelineId
    epoch: int  # the one that the failure led to
    chosen: str  # who serves what now: "stage 1: n1 -> n5"
    plan_s: float | None = None  # from the death being known to the new topology being written
    connect_s: float | None = None  # until every stage answered in the new epoch
    restore_s: float | None = None  # until the first step was sent
    first_token_s: float | None = None  # until a token was emitted; None also if there was none to emit
    streams: int = 0  # requests that the pipeline had
    tokens_recomputed: int = 0
    down: bool = False  # no node was left for a stage
    ended_unix_s: float = 0.0  # it serves again since then; 0: it does not


class Incident(msgspec.Struct, frozen=True):
    id: int  # of the event that told of the failure
    node: NodeId
    incarnation: str
    cause: str  # the evidence, in words
    began_unix_s: float  # the last sign of life: the failure came after it
    detect_s: float  # from then until it was known
    affected: tuple[Affected, ...] = ()  # empty: it served nothing

    @property
    def over(self) -> bool:
        return all(one.ended_unix_s for one in self.affected)

    @property
    def ended_unix_s(self) -> float:
        """When the last of the pipelines served again; 0: not yet, or none was touched."""
        return max((one.ended_unix_s for one in self.affected), default=0.0) if self.over else 0.0

    @property
    def slowest(self) -> Affected | None:
        """The pipeline that came back last, or has not."""
        return max(self.affected, key=lambda one: one.ended_unix_s or float("inf"), default=None)

    @property
    def streams(self) -> int:
        return sum(one.streams for one in self.affected)
