"""What the router knows of one live request (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.requests import Refused
from web.gateway.routing.tokenlog import TokenLog


@dataclass(slots=True)
class LiveRequest:
    """One request. `sent_to` is the scheduler that has it; None: it is held here."""

    log: TokenLog
    priority: int
    last_token_at: float
    pipeline: PipelineId | None = None
    sent_to: Member | None = None
    sent_at: float = 0.0
    last_member: Member | None = None  # the last one it was sent to, whatever became of it
    held_since: float | None = None  # since when no scheduler has been at work on it; None: one is
    retry_at: float = 0.0
    again_at: float | None = None  # tokens are missing: submit again then
    asked_at: float = -1e9
    how: str = ""  # what befell it since its last token
    torn: bool = False  # from the scheduler that had it; the topology has yet to say whether a node died
    deaths: int = 0  # nodes that died while it was in its first step
    poisoned: set[NodeId] = field(default_factory=set)  # nodes on which its numbers were not finite
    full: set[PipelineId] = field(default_factory=set)  # pipelines that refused it for load
    context: bytes | None = None  # see Submit
    reader: int = 0
    came_at: float = 0.0  # when that reader came
    prefix: tuple[bytes, ...] | None = None  # how its prompt begins: see prefixes.py
    holder: PipelineId | None = None  # who has a copy of its KV, where each request has a holder of its own
    may_overtake: bool = True  # once, and as long as no scheduler can have accepted it: see `overtake`

    @property
    def tokens(self) -> int:
        return len(self.log.prompt) + len(self.log.emitted)

    def overtake(self, refusal: Refused, now: float) -> bool:
        """Come after the reader that a SUPERSEDED names; False: it has the last word.

        Readers are numbered by the microsecond in which they came. One from a moment that is still to come had a
        gateway whose clock is ahead, and the scheduler that knew it may have been out of reach when all were asked for
        it; any other has come since, and this one's client has gone to it. Whoever was accepted
        before is the older connection and gives way, and so does who has overtaken once: two gateways of one stream
        would take it from each other for ever.
        """
        if refusal.reader is None or not self.may_overtake:
            return False
        if refusal.reader <= self.reader + (now - self.came_at) * 1e6:
            return False
        self.reader, self.may_overtake = refusal.reader + 1, False
        return True
